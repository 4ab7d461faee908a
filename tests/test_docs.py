"""What the documentation shows is true: commands that run, recipes that load, files that are there."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import fedloom as package
from fedloom.cli import app
from fedloom.recipe import load

Fedloom = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[1]
PAGES = [
    *(path for path in (ROOT / "docs").rglob("*.md") if not {"results", "studies"} & set(path.parts)),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
]
TOURS = sorted((ROOT / "docs" / "tours").glob("*.md"))
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^ {4,}(fedloom .*)$", re.MULTILINE)
LOADS = ("run", "compare", "check", "advise")  # commands whose first argument is a recipe


def commands(page: Path) -> Iterator[list[str]]:
    """Every `fedloom ...` that a page shows, split as a shell would."""
    text = page.read_text("utf-8")
    shown = [line for kind, _, body in FENCE.findall(text) if kind == "sh" for line in body.splitlines()]
    for line in [*shown, *INDENTED.findall(text)]:
        words = shlex.split(line, comments=True)
        while words and "=" in words[0]:
            words = words[1:]
        if words and words[0] == "fedloom":
            yield words[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_command_that_is_shown_is_one(page: Path) -> None:
    group: Any = typer.main.get_command(app)
    for words in commands(page):
        if "..." in words or not words:
            continue
        command, rest = group, list(words)
        while hasattr(command, "commands"):
            command = command.commands[rest.pop(0)]
        context = command.make_context(words[0], rest)
        recipe = str(context.params.get("recipe"))
        if words[0] in LOADS and not recipe.endswith(".toml"):
            load(recipe, context.params.get("settings") or ())


@pytest.mark.parametrize("page", TOURS, ids=lambda path: path.stem)
def test_a_tour_can_be_followed_to_the_letter(
    page: Path, fedloom: Fedloom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for kind, title, body in FENCE.findall(page.read_text("utf-8")):
        if title:
            Path(title).write_text(body, "utf-8")
        for line in body.splitlines() if kind == "sh" else ():
            words = [word for word in shlex.split(line, comments=True) if word != "PYTHONPATH=."]
            if words[0] == "python":
                runpy.run_path(words[1], run_name="__main__")
                continue
            code, out, err = fedloom(*words[1:])
            assert (code, err) == (0, ""), line
            lines = [shown for shown in out.splitlines() if str(tmp_path) not in shown]  # no path is torn
            assert max(map(len, lines)) <= 80 or words[1] in ("run", "compare"), line
    assert "TIME_" not in page.read_text("utf-8")
    for folder in Path("runs").glob("*/report.html"):
        assert package.Run(folder.parent).finished


@pytest.mark.slow
def test_the_recipe_of_the_readme_runs(recipe: Path, monkeypatch: pytest.MonkeyPatch, fedloom: Fedloom) -> None:
    page = ROOT / "README.md"
    (toml,) = (body for kind, _, body in FENCE.findall(page.read_text("utf-8")) if kind == "toml")
    monkeypatch.chdir(recipe.parent)
    Path("mine.toml").write_text(toml)
    own = [words for words in commands(page) if "mine.toml" in words]
    assert [words[0] for words in own] == ["check", "run", "run", "compare"]
    for words in own[:3]:  # a tour runs a comparison
        code, _, err = fedloom(*words)
        assert (code, err) == (0, "")


@pytest.mark.slow
def test_the_exports_that_are_shown_are_made(recipe: Path, monkeypatch: pytest.MonkeyPatch, fedloom: Fedloom) -> None:
    monkeypatch.chdir(recipe.parent)
    manifest = recipe.with_name("manifest.jsonl")
    manifest.write_text(manifest.read_text().replace("oslo", "north"))
    package.run(recipe, Path("runs/hospitals"))
    *shown, pushed = [words for words in commands(ROOT / "docs" / "export.md") if words[0] in ("export", "evaluate")]
    assert len(shown) == 5
    for words in shown:
        code, _, err = fedloom(*words)
        assert (code, err) == (0, ""), words
    assert "--push" in pushed
    assert fedloom(*pushed)[0] == 2  # nobody is signed in here


SHOWN = [words for name in ("README.md", "docs/recipes.md") for words in commands(ROOT / name) if words[0] == "run"]
FEWER = (
    "federation.rounds=1",
    "federation.evaluate_every=0",
    "training.warmup_head=0",
    "training.finetune=0",
    "data.train=20",
    "data.test=4",
)
FETCHED = ("feddlp-", "fedpia-")  # of data that users bring; these are run in test_recipes_built_in.py


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [words for words in SHOWN if words[1] != "mine.toml" and not words[1].startswith(FETCHED)], ids=" ".join
)
def test_a_run_that_is_shown_goes_through_a_round(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fedloom: Fedloom
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = [word for change in FEWER for word in ("--set", change)]
    code, _, err = fedloom(*words, *settings, "--out", "runs/quickstart")
    assert (code, err) == (0, "")
    if words[1] == "quickstart":
        for shown in commands(ROOT / "README.md"):
            if shown[0] == "export":
                assert fedloom(*shown)[0] == 0


@pytest.mark.slow
def test_the_suite_that_is_shown_is_run_for_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fedloom: Fedloom
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    (words,) = (words for words in commands(ROOT / "docs" / "recipes.md") if words[0] == "suite")
    code, _, err = fedloom(*words, "--seeds", "0-0", "--rows", "majority")
    assert (code, err) == (0, "")


@pytest.mark.slow
def test_the_benchmark_that_is_shown_is_run_once(tmp_path: Path) -> None:
    (words,) = (words for words in commands(ROOT / "docs" / "performance.md") if "lora-step" in words)
    call = [sys.executable, "-c", "import sys; from fedloom.cli import main; sys.exit(main())"]
    done = subprocess.run([*call, *words, "--repeats", "1"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "bench.json").read_text())["lines"]


def test_the_page_of_a_consortium_leads_to_a_kit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fedloom: Fedloom
) -> None:
    """A server and sites that run are those of test_flare.py."""
    monkeypatch.chdir(tmp_path)
    shown = {words[1]: words for words in commands(ROOT / "docs" / "deploy.md") if words[0] == "deploy"}
    assert shown.keys() == {"init", "approve", "status", "join", "package", "doctor"}

    def said(step: str, *more: str) -> str:
        code, out, err = fedloom(*shown[step], *more)
        assert (code, err) == (0, ""), step
        return out.split()[-1]

    project, request = said("init"), said("join")
    shutil.copy("oslo/oslo.request.zip", tmp_path)
    said("approve", "--fingerprint", request)
    said("package", "--fingerprint", project)
    assert (tmp_path / "oslo" / "kit" / "startup").is_dir()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere_in_a_checkout(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", FENCE.sub("", page.read_text("utf-8")))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_the_run_folder_is_as_it_is_described(recipe: Path, tmp_path: Path) -> None:
    run = package.run(recipe, tmp_path / "run")
    described = set(re.findall(r"`([a-z_.]+)`", (ROOT / "docs" / "run-folder.md").read_text("utf-8")))
    row = next(iter(run.summary["views"]["personal"]["sites"].values()))
    beside = next(iter(run.summary["references"]["local"]["personal"]["sites"].values()))
    line = json.loads((run.folder / "rounds.jsonl").read_text().splitlines()[0])
    site = next(iter(line["sites"].values()))
    for keys in (run.summary, run.summary["views"], row, beside, line, site, run.summary["details"]["oslo"]):
        assert set(keys) - {"metric"} <= described
    assert {path.name for path in run.folder.iterdir()} <= described
