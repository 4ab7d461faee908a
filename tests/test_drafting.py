"""`fedloom init`: a recipe for data of one's own that loads and passes `fedloom check`, and never stands in a way."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedloom.drafting import draft
from fedloom.recipe import Recipe, load
from fedloom.tensors import generator

Fedloom = Callable[..., tuple[int, str, str]]
ANIMALS = ("cat", "dog")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def picture(path: Path, i: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = torch.randint(0, 256, (16, 16, 3), generator=generator("drafted", i), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(path)
    return path.name


def manifest(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def written(fedloom: Fedloom, *arguments: object) -> tuple[Recipe, str]:
    code, out, err = fedloom("init", *arguments, "--to", "mine.toml")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    return load("mine.toml"), " ".join(out.split())


def test_a_folder_of_classes_becomes_a_recipe_that_passes_check(fedloom: Fedloom, tmp_path: Path) -> None:
    for i in range(48):
        picture(tmp_path / "photos" / ANIMALS[i % 2] / f"{i}.png", i)
    code, out, err = fedloom("init", "photos")
    assert (code, err) == (0, "")
    assert "Wrote photos.toml." in out
    recipe = load("photos.toml")
    assert recipe.data is not None
    assert recipe.data.source == str(tmp_path / "photos")
    assert (recipe.backbone.name, recipe.data.partition.kind) == ("clip-small", "dirichlet")
    code, out, err = fedloom("check", "photos.toml")
    assert (code, err) == (0, "")
    assert "5 sites, 0 newcomers" in out  # of eight pictures or more each, unlike
    code, out, err = fedloom("init", "photos")
    assert code == 2
    assert err == "fedloom: 'photos.toml' is there already, and is left as it is; name another file with --to.\n"


def test_a_hospital_s_table_is_read_by_its_own_names(fedloom: Fedloom, tmp_path: Path) -> None:
    rows = [
        {
            "file": picture(tmp_path / "films" / f"{i}.png", i),
            "diagnosis": ("effusion", "none", "edema")[i % 3],
            "Hospital": ("north", "south")[i // 24],
            "patient_id": f"p{i // 2}",
            "scanner": "GE",
        }
        for i in range(48)
    ]
    manifest(tmp_path / "films" / "manifest.csv", rows)
    recipe, out = written(fedloom, "films")
    assert recipe.data is not None
    columns = recipe.data.columns
    assert (columns.image, columns.label, columns.site, columns.group) == (
        "file",
        "diagnosis",
        "Hospital",
        "patient_id",
    )
    assert recipe.data.partition.kind == "natural"
    assert "2 sites in 'Hospital', with 12 values of 'patient_id' each" in out
    assert fedloom("check", "mine.toml")[0] == 0


@pytest.mark.parametrize(
    ("rows", "task", "backbone"),
    [
        ([{"image": "a.png", "label": ["x", "y"]}, {"image": "b.png", "label": []}], "detection", "clip-small"),
        ([{"image": "a.png", "question": "what?", "answer": a} for a in ("one", "two")], "vqa", "vilt-small"),
        (
            [{"sentence": f"so it is {i}", "intent": ("ask", "tell")[i % 2]} for i in range(9)],
            "classification",
            "text-small",
        ),
        (
            [{"image": f"{i}.png", "text": "cat dog"[i % 2 * 4 :][:3], "label": ANIMALS[i % 2]} for i in range(4)],
            "classification",
            "clip-small",
        ),
    ],
)
def test_what_an_example_is_says_what_the_task_is(
    rows: list[dict[str, Any]], task: str, backbone: str, tmp_path: Path
) -> None:
    path = manifest(tmp_path / "manifest.jsonl", [row | {"patient": f"{i}"} for i in range(20) for row in rows])
    own = draft(str(path), {})
    assert (own.task, own.backbone) == (task, backbone)
    (tmp_path / "own.toml").write_text(own.text(tmp_path), "utf-8")
    assert load(tmp_path / "own.toml").backbone.name == backbone


def test_what_is_said_is_not_guessed(fedloom: Fedloom, tmp_path: Path) -> None:
    rows = [
        {
            "image": picture(tmp_path / f"{i}.png", i),
            "label": ANIMALS[i % 2],
            "colour": ("red", "blue")[i // 2 % 2],
            "site": "a",
        }
        for i in range(40)
    ]
    path = manifest(tmp_path / "rows.jsonl", rows)
    recipe, out = written(
        fedloom, path, "--label", "colour", "--sites", 3, "--method", "fedpia", "--backbone", "vilt-small"
    )
    assert recipe.data is not None
    assert recipe.data.columns.label == "colour"
    assert recipe.data.partition.sites == 3
    assert (recipe.method_name, recipe.backbone.name) == ("fedpia", "vilt-small")
    assert out.count("as you said") >= 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("rows.jsonl", "--label", "colr"), "has no column 'colr' for the label (did you mean 'colour'?); its columns"),
        (
            ("rows.jsonl",),
            "no column of 'rows.jsonl' looks like a label; its columns are image, colour, size. Name one",
        ),
        (("rows.jsonl", "--label", "colour", "--task", "vqe"), "there is no task 'vqe' (did you mean 'vqa'?)"),
        (("rows.jsonl", "--label", "colour", "--sites", "40"), "are too few for 40 sites of 8"),
        (("./nowhere",), "there is no file or folder './nowhere'"),
        (("rows.jsonl", "--label", "colour", "--to", "no/such.toml"), "cannot be written"),
    ],
)
def test_a_mistake_is_a_sentence_and_leaves_nothing(
    fedloom: Fedloom, arguments: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    rows = [{"image": f"{i}.png", "colour": ("red", "blue")[i % 2], "size": ("s", "l")[i // 2 % 2]} for i in range(40)]
    manifest(tmp_path / "rows.jsonl", rows)
    code, out, err = fedloom("init", *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("*.toml"))


def test_on_a_terminal_each_guess_may_be_changed(
    fedloom: Fedloom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    rows = [{"image": f"{i}.png", "label": ANIMALS[i % 2], "site": ("a", "b")[i // 20]} for i in range(40)]
    manifest(tmp_path / "rows.jsonl", rows)
    monkeypatch.setattr("sys.stdin", Terminal("\n\n\n\nfedpia\n"))
    code, out, _ = fedloom("init", "rows.jsonl")
    assert code == 0
    assert "label (by its name) [label]" in out
    assert load("rows.toml").method_name == "fedpia"
    monkeypatch.setattr("sys.stdin", Terminal(""))  # --yes asks nothing
    assert fedloom("init", "rows.jsonl", "--to", "other.toml", "--yes")[0] == 0


@given(
    st.lists(st.text(min_size=1, max_size=20).filter(lambda s: s.strip()), min_size=2, max_size=6, unique_by=str.strip)
)
def test_no_label_can_break_the_recipe(labels: list[str]) -> None:
    rows = [{"image": f"{i}.png", "label": labels[i % len(labels)]} for i in range(48)]
    path = manifest(Path.cwd() / "odd.jsonl", rows)
    own = draft(str(path), {})
    Path("odd.toml").write_text(own.text(Path.cwd()), "utf-8")
    assert load("odd.toml").backbone.name == "clip-small"
