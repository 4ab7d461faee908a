"""Every study on a tiny federation, and what must hold of any study, whatever it finds."""

import hashlib
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import publish
import publish_study
import pytest
import torch
from joined import joined, without
from PIL import Image
from torch.testing import assert_close

from fedloom import cli
from fedloom.errors import RecipeError
from fedloom.federation import visible
from fedloom.methods import FedPIA
from fedloom.studies import (
    STUDIES,
    Result,
    client,
    conduct,
    gamma,
    page,
    picture,
    probe,
    recovery,
    sora_overfitting,
    write_result,
)
from fedloom.studies.setting import HELD_OUT, Setting, loss, prepared
from fedloom.studies.study import Options, Part, verdict
from fedloom.studies.units import COSTS, agreement, matched, orders, permuted, read
from fedloom.tensors import Private, generator, under

ROOT = Path(__file__).parents[1]
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "plane", "is", "this", "?")
RECIPE = """
[data]
source = "manifest.jsonl"
columns = {{ text = "question", label = "answer" }}
train = 18
held_out = 4
test = 4

[backbone]
name = "{backbone}"

[task]
kind = "vqa"
head = "linear"
objective = "cross_entropy"

[method]
name = "fedpia"

[method.adapter]
kind = "bottleneck"
width = 6
last = 2
"""
SMALL = {  # over what a study asks for
    "data.train": 18,
    "data.test": 4,
    "training.epochs": 1,
    "training.lr": 1e-2,
    "method.adapter.last": 2,
    "method.adapter.std": 0.3,  # so that an adapter is felt
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A recipe of four sites with 30 random pictures each, on a random ViLT."""
    from transformers import BertTokenizer, ViltConfig, ViltModel, ViTImageProcessorPil

    folder = tmp_path_factory.mktemp("tiny")
    shape = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"image_size": 16, "patch_size": 8, "max_position_embeddings": 8, "vocab_size": len(WORDS)}
        ViltModel(ViltConfig(**shape, **sizes)).save_pretrained(folder / "vilt")
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, model_max_length=8).save_pretrained(folder / "vilt")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "vilt")
    rows = []
    for i in range(120):
        noise = torch.randint(0, 256, (16, 16, 3), generator=generator("picture", i), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{i}.png")
        answer = ("axial", "sagittal", "coronal")[i % 3]
        rows.append({"image": f"{i}.png", "question": "what plane is this?", "answer": answer, "site": f"s{i % 4}"})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny.toml").write_text(RECIPE.format(backbone=folder / "vilt"))
    return str(folder / "tiny.toml")


@pytest.fixture(scope="module")
def setting(recipe: str) -> Setting:
    return prepared(Options(1, recipe, SMALL), 100, {}, sites=3)


@pytest.fixture
def made(recipe: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Result]:
    """`made("costs")`: the study on the tiny federation, with a smaller grid."""
    monkeypatch.setattr(gamma, "GAMMAS", (0.0, 10.0))
    monkeypatch.setattr(gamma, "SCALES", ("previous", "one"))
    monkeypatch.setattr(probe, "LARGEST", 8)
    monkeypatch.setattr(probe, "SIZES", (1, 2))
    monkeypatch.setattr(sora_overfitting, "ROUNDS", 2)
    monkeypatch.setattr(sora_overfitting, "EVERY", 1)

    def make(name: str) -> Result:
        changes = [f"{key}={value}" for key, value in SMALL.items()]
        if name == "sensitivity":
            changes += ["data.partition.sites=3", "data.partition.minimum=26"]
        if name == "sora-overfitting":
            changes = [change for change in changes if "std" not in change]
            changes += ["method.adapter={kind='lora', last=2}", "backbone.towers=none"]
        if name == "wire":
            changes += ["federation.rounds=2", "method.adapter.width=24"]  # for a budget, more numbers than names
        return conduct(name, seeds=2, recipe=recipe, settings=changes)

    return make


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_runs_and_its_page_is_made_from_its_json(
    name: str, made: Callable[[str], Result], tmp_path: Path
) -> None:
    result = made(name)
    write_result(result, tmp_path)
    read = Result.of((tmp_path / f"{name}.json").read_text("utf-8"))
    assert read == result
    assert (result.name, result.question) == (name, STUDIES[name].question)
    text = (tmp_path / f"{name}.md").read_text("utf-8")
    assert text == page(read)
    assert all(sentence in text for sentence in result.found)
    assert all(str(seed) in text for seed in result.seeds)
    assert "no confirmatory result" in text
    assert result.command in text
    first = result.parts[0]
    changed = tuple({**row, first.figures[0]: 4321.0} for row in first.rows)
    assert "4321" in page(replace(read, parts=(replace(first, rows=changed), *read.parts[1:])))
    drawn = (tmp_path / f"{name}.svg").read_text("utf-8")
    ElementTree.fromstring(drawn)
    assert drawn == picture(read)
    assert drawn.count("http") == 1, "the picture needs nothing but its name space"


@pytest.mark.parametrize("cost", COSTS)
def test_a_permuted_copy_without_noise_is_found_again(cost: str, setting: Setting) -> None:
    own = setting.model.init(setting.adapter, 5, "own")
    copy, order = permuted(setting.adapter, own, "copy")
    reads = recovery.synthetic(own, 5)
    assert agreement(matched(setting.adapter, copy, own, COSTS[cost], reads), order) == 100
    assert agreement(matched(setting.adapter, own, own, COSTS[cost], reads), order) < 100


def test_noise_that_hides_the_weights_leaves_chance(setting: Setting) -> None:
    own = setting.model.init(setting.adapter, 5, "own")
    rows = recovery.copied(setting, "synthetic", own, recovery.synthetic(own, 5))
    found = Part("", ("cost", "noise"), (recovery.FOUND,), tuple(rows))
    for cost in COSTS:
        clean, lost = (found.mean(recovery.FOUND, cost=cost, noise=n) for n in (recovery.NOISE[0], recovery.NOISE[-1]))
        assert clean == 100
        assert lost < 80


def test_the_ends_of_the_path_are_the_adapters(setting: Setting) -> None:
    after = setting.last(FedPIA(setting.adapter, init="independent", gamma=0.0), 1)
    site, current = setting.sites[0], visible(after.shared)
    weight = torch.randn(3, 16, generator=generator("head"))
    private = Private({**after.privates[site.name], "head/weight": weight})
    lines = client.along(setting, "one start", private, current)
    for split, data in {"held-out": site.held_out, "training": site.train}.items():
        own, theirs = (loss(setting, site, private, end, data) for end in (under("local", private), current))
        assert abs(own - theirs) > 1e-2, "ends that are told apart"
        for row in lines:
            if row["t"] in (0.0, 1.0):
                assert_close(row[f"{split} loss"], own if row["t"] == 0 else theirs, rtol=1e-5, atol=1e-6)


def test_a_barrier_is_what_rises_above_the_straight_line() -> None:
    heights = [0.0, 1.0, 4.0, 2.0, 1.0, 0.0]
    path = [
        {
            "start": "one start",
            "global": "x",
            "seed": 1,
            "t": t,
            "held-out loss": 10 * t + h,
            "training loss": 7 - 3 * t,
        }
        for t, h in zip(client.STEPS, heights, strict=True)
    ]
    (row,) = client.barriers(path)
    assert_close(row[client.BARRIER.format("held-out")], 4.0)
    assert_close(row[client.BARRIER.format("training")], 0.0, rtol=0, atol=1e-9)


def test_at_gamma_zero_forms_and_scales_are_one(setting: Setting) -> None:
    base = FedPIA(setting.adapter, predict_with="global", beta=(1.0,), permute="server", gamma=0.0)
    one = gamma.run(setting, base)
    for scale in gamma.SCALES:
        for mode in gamma.MODES:
            assert gamma.run(setting, replace(base, integration=mode, scale=scale)) == one
    assert gamma.run(setting, replace(base, gamma=10.0, integration="literal", scale="one")) != one


def test_a_probe_of_the_same_images_agrees_with_itself(setting: Setting) -> None:
    after = setting.last(FedPIA(setting.adapter, init="independent", gamma=0.0), 1)
    site = setting.sites[0]
    own = under("local", after.privates[site.name])
    for cost in probe.SIMILARITIES.values():
        plans = matched(
            setting.adapter, visible(after.shared), own, COSTS[cost], read(site, setting.adapter, own, [1, 2])
        )
        assert agreement(plans, orders(plans)) == 100


def test_the_merge_of_one_start_keeps_more_than_a_random_order(made: Callable[[str], Result]) -> None:
    part = made("costs").parts[0]
    assert part.mean("units moved, %", merge="none: the naive mean") == 0
    assert part.mean("units moved, %", merge="random order") > 0
    exact, earth = (part.values(HELD_OUT, merge=f"in+out{end}") for end in ("", ", earth mover's"))
    assert_close(list(exact.values()), list(earth.values()), rtol=1e-4, atol=1e-5)


def test_unlike_depths_and_backbones_are_refused_with_the_servers_words(setting: Setting) -> None:
    from fedloom.studies import widths

    depth, backbone = widths.refused(setting)
    assert "did not send" in depth
    assert "expected" in backbone


def test_a_verdict_says_no_more_than_its_interval() -> None:
    def told(mean: float, low: float | None, high: float | None) -> str:
        return verdict("loss", "a", "b", {"mean": mean, "low": low, "high": high, "n": 3})

    assert "no difference beyond noise" in told(1.0, -0.1, 2.1)
    assert "higher" in told(1.0, 0.1, 1.9)
    assert "lower" in told(-1.0, -1.9, -0.1)
    assert "the same at each of 3 seeds" in told(0.0, 0.0, 0.0)
    assert "says nothing of chance" in told(1.0, None, None)


def test_differences_are_paired_by_seed() -> None:
    rows = tuple({"way": way, "seed": seed, "x": seed + (way == "a")} for seed in (1, 5, 9) for way in ("a", "b"))
    part = Part("", ("way",), ("x",), rows)
    found = part.compared("x", {"way": "a"}, {"way": "b"})
    assert (found["mean"], found["low"], found["high"], found["n"]) == (1.0, 1.0, 1.0, 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["recovry"], "did you mean 'recovery'?"),
        ([], "--list"),
        (["recovery", "--seeds", "0"], "needs one at least"),
        (["recovery", "--seeds", "11"], "100 to 109"),
        (["recovery", "--recipe", "no-such"], "there is no recipe 'no-such'"),
        (["recovery", "--set", "method.adapter.kind=lora"], "hidden units"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: str
) -> None:
    if "--set" in arguments:
        arguments = [*arguments, "--recipe", recipe]
    monkeypatch.setattr(sys, "argv", ["fedloom", "study", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_every_study_is_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["fedloom", "study", "--list"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    shown = capsys.readouterr().out
    assert all(name in shown and one.question in shown for name, one in STUDIES.items())


def test_too_few_sites_are_named(recipe: str) -> None:
    with pytest.raises(RecipeError, match="has 4 sites, and this study needs 9"):
        prepared(Options(1, recipe, SMALL), 100, {}, sites=9)


def test_what_is_published_is_made_from_its_figures() -> None:
    for path in sorted(publish_study.RESULTS.glob("*.json")):
        result = Result.of(path.read_text("utf-8"))
        assert set(result.seeds) <= set(range(100, 110))
        assert {"commit", "machine", "fedloom"} <= result.lineage.keys()
        assert (publish_study.PAGES / f"{path.stem}.md").read_text("utf-8") == page(result)
        assert (publish_study.PAGES / f"{path.stem}.svg").read_text("utf-8") == picture(result)
    assert (publish_study.PAGES / "README.md").read_text("utf-8") == publish_study.index()


def test_every_page_of_results_is_made_from_its_figures() -> None:
    made = dict(publish.pages())
    assert {path.name for path in made} | {"advise.md"} == {path.name for path in (ROOT / "docs/results").iterdir()}
    assert [path.name for path, written in made.items() if path.read_text("utf-8") != written] == []


def test_what_is_published_says_what_its_runs_say_of_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "ROOT", tmp_path)
    file = tmp_path / "benchmarks" / "protocol.toml"
    file.parent.mkdir()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    commits = []
    for text in ("first", "second"):
        file.write_text(text)
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-qm", text], check=True)
        commits.append(publish.lineage()["commit"])
    file.write_text("never committed")
    first, second = (hashlib.sha256(text.encode()).hexdigest() for text in ("first", "second"))
    run = tmp_path / "run"
    (run / "cells" / "one").mkdir(parents=True)
    (run / "cells" / "one" / "recipe.toml").write_text(
        "[backbone]\ndtype = 'float32'\nattention = 'sdpa'\nkernels = 'auto'"
    )
    lineage = {"plan": "float32, sdpa, 1 thread, cuda of x86_64", "versions": {"python": "3.12", "torch": "2.9"}}
    (run / "cells" / "one" / "summary.json").write_text(json.dumps({"lineage": lineage}))
    content = {"rows": {}, "differences": [], "seeds": [0], "recipe": "", "fedloom": ""}
    for own, hashes in (({}, ([first], [second])), ({"protocols": ["its", "own"]}, (["its", "own"],) * 2)):
        (run / "comparison.json").write_text(json.dumps(content | own))
        found = [publish.published(run, "made", commit) for commit in commits]
        assert tuple(one["protocols"] for one in found) == hashes
    assert {one["machine"] for one in found} == {"1 thread, cuda of x86_64, python 3.12, torch 2.9"}
    assert "protocol its, own, 1 thread, cuda of x86_64" in publish.compared_page("x", found[0])
    assert publish.protocols_at("0" * 40) == []


def published(**rows: list[float | None]) -> dict[str, Any]:
    """A page of these rows, by seed."""

    def cells(values: list[float | None]) -> dict[str, Any]:
        scores = {str(n): value for n, value in enumerate(values) if value is not None}
        return {seed: {"personal.accuracy.mean": value, "bytes_up": 7} for seed, value in scores.items()}

    return {
        "command": f"compare --methods {','.join(rows)}",
        "commit": "c" * 40,
        "machine": "one",
        "protocols": [],
        "recipe": "r",
        "plan": {"dtype": "float32"},
        "differences": [],
        "endpoints": [],
        "seeds": sorted({n for values in rows.values() for n, value in enumerate(values) if value is not None}),
        "rows": {
            row: {"cells": cells(values), "summary": {}, "sites": row, "missing": {}} for row, values in rows.items()
        },
    }


def test_rows_and_seeds_are_added_to_a_page_whose_cells_come_out_the_same_again() -> None:
    before = published(local=[0.5, 0.25], fedavg=[0.75, 0.5])
    after = published(local=[0.5, None, 1.0, 0.25], ditto=[0.5, 0.5])
    after["rows"]["local"] |= {"sites": "of more seeds"}
    after["rows"]["local"]["cells"]["0"]["bytes_up"] = 8
    before["rows"]["local"]["missing"] = {"3": "crashed", "4": "crashed"}
    page = joined(before, after)
    assert list(page["rows"]) == ["local", "fedavg", "ditto"]
    assert (page["seeds"], page["command"], page["rows"]["local"]["sites"]) == (
        *([0, 1, 2, 3], "compare --methods local,ditto", "of more seeds"),
    )
    assert list(page["rows"]["local"]["cells"]) == ["0", "1", "2", "3"]
    assert page["rows"]["local"]["summary"]["personal.accuracy.mean"]["mean"] == 0.5
    assert page["rows"]["local"]["missing"] == {"4": "crashed"}  # seed 3 has been run since
    (earlier,) = page["earlier"]
    assert (earlier["command"], earlier["rows"]) == ("compare --methods local,fedavg", ["local", "fedavg"])
    pairs = {(one["of"], one["minus"], one["figure"]): one for one in page["differences"]}
    assert pairs["fedavg", "ditto", "personal.accuracy.mean"]["mean"] == 0.125
    assert pairs["local", "fedavg", "personal.accuracy.mean"]["n"] == 2
    assert "endpoints" not in page
    again = joined(page, published(local=[0.5, 0.25, 1.0, 0.25], scaffold=[0.25, 0.25]))
    assert [one["rows"] for one in again["earlier"]] == [["local", "fedavg"], ["local", "ditto"]]
    confirmed = joined(page, published(local=[None, 0.25]) | {"commit": "d" * 40})  # nothing that was not there
    assert {key: own for key, own in confirmed.items() if key != "again"} == page
    assert [(one["command"], one["commit"]) for one in confirmed["again"]] == [("compare --methods local", "d" * 40)]
    assert joined(confirmed, published(local=[0.5], feddat=[0.5]))["again"] == confirmed["again"]
    told = publish.compared_page("x", confirmed | {"rows": {}, "differences": []})
    assert "Run again as `compare --methods local`, commit dddddddddd, one, it came out the same to the bit." in told
    for other, why in [
        (published(local=[0.5, 0.26]), "local, seed 1, personal.accuracy.mean: it was 0.25, and now 0.26"),
        (published(local=[None, None, 0.5]), "No cell"),
        (published(ditto=[0.5, 0.5]), "No cell"),
        (after | {"recipe": "q"}, "another recipe: r, and now q"),
        (after | {"plan": {"dtype": "bfloat16"}}, "another dtype"),
        (after | {"tuning": {"grid": {"training.lr": [0.1]}, "seeds": [100], "rows": {}}}, "another tuning: grid"),
    ]:
        with pytest.raises(SystemExit, match=why):
            joined(before, other)


def test_rows_that_were_wrong_are_withdrawn_and_run_anew() -> None:
    def tuned(**rates: float) -> dict[str, Any]:
        rows = {
            row: {"choice": {"training.lr": lr}, "tried": [{"set": {"training.lr": lr}}]} for row, lr in rates.items()
        }
        return {"tuning": {"grid": {"training.lr": [0.1, 0.2]}, "seeds": [100], "rows": rows}}

    before = published(local=[0.5, 0.25], ditto=[0.5, 0.5], feddat=[0.25, 0.0]) | tuned(
        local=0.1, ditto=0.1, feddat=0.1
    )
    before["earlier"] = [{"command": "x", "commit": "c" * 40, "machine": "", "protocols": [], "rows": ["feddat"]}]
    after = published(local=[0.5], feddat=[0.75, 0.5]) | tuned(local=0.1, feddat=0.2)
    with pytest.raises(SystemExit, match="another tuning of feddat"):
        joined(before, after)
    of_one = {"training.lr": [0.1, 0.2], "rows": {"pooled": {"training.lr": [0.01]}}}  # no other row's grid
    after["tuning"]["grid"] = of_one
    page = joined(without(before, ["feddat"]), after)
    assert {row: list(own["cells"].values())[-1]["personal.accuracy.mean"] for row, own in page["rows"].items()} == {
        "local": 0.25,
        "ditto": 0.5,
        "feddat": 0.5,
    }
    assert {row: own["choice"]["training.lr"] for row, own in page["tuning"]["rows"].items()} == {
        "local": 0.1,
        "ditto": 0.1,
        "feddat": 0.2,
    }
    assert [(one["rows"], one.get("withdrawn")) for one in page["earlier"]] == [
        (["local", "ditto"], ["feddat"]),
    ]
    assert "Its feddat were wrong" in publish.compared_page("x", page | {"rows": {}, "differences": [], "tuning": None})
    with pytest.raises(SystemExit, match="no row 'flora' to withdraw"):
        without(before, ["flora"])


def test_an_endpoint_tells_its_seeds_and_whether_it_is_open() -> None:
    named = {"method": "m", "kind": "primary", "setting": "s", "view": "personal", "of": "a", "minus": "b"}

    def line(**figures: Any) -> str:
        said: str = publish.endpoint({**named, "mean": 0.02, "margin": 0.01, "p": 1.0, "figure": "mean", **figures})
        return said.removeprefix("| m | primary | s, personal | a - b | ")

    assert line(low=None, high=None, above=None, n=1) == "1 | +2.0 one seed | 1.0 | – | 1.00 |"
    assert line(low=-0.01, high=0.05, above=False, n=5) == "5, open | +2.0 [-1.0, 5.0] | 1.0 | no | 1.00 |"
    assert line(low=0.005, high=0.035, above=False, n=5).startswith("5 | ")  # zero is out
    assert line(low=-0.01, high=0.009, above=False, n=5).startswith("5 | ")  # the margin is out
    assert line(low=-0.01, high=0.05, above=False, n=15).startswith("15 | ")
    assert publish.endpoint({**named, "why": "not run", "margin": 0.01, "figure": "mean"}).endswith(
        "| not yet: not run | 1.0 | | |"
    )


def test_the_small_easy_vqa_is_of_its_test_part_and_whole() -> None:
    folder = ROOT / "benchmarks" / "data" / "easyvqa"
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text("utf-8").splitlines()]
    images = {row["image"] for row in rows}
    assert images == {f"images/{path.name}" for path in (folder / "images").iterdir()}
    assert len(images) == 700
    for image in images:
        with Image.open(folder / image) as opened:
            assert opened.convert("RGB").size == (64, 64)
    assert "test part" in (folder / "SOURCE.md").read_text("utf-8")
    assert "MIT" in (folder / "LICENSE").read_text("utf-8")
