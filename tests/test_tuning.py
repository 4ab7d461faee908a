"""Tuning: the same points for every row, judged without a test split, and the best one used by the row's cells."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from fedloom import tuning
from fedloom.assembly import assemble, planned
from fedloom.comparisons import compare
from fedloom.data import Pixels
from fedloom.endpoints import Protocol
from fedloom.errors import RecipeError, RunError
from fedloom.events import Event
from fedloom.recipe import Recipe, load
from fedloom.report import comparison_table
from fedloom.tuning import SEEDS, grid_of, held_out, points, tuned

GRID = {"training.lr": [1e-12, 0.01]}


def ignore(event: Event) -> None:
    """A watch that looks away."""


@pytest.fixture
def short(recipe: Path) -> Recipe:
    return load(recipe, {"federation.rounds": 1, "training.finetune": 0, "backbone.cache": True})


def test_test_splits_are_never_read_while_tuning(
    short: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = planned(short)
    tests = {e.image for p in assemble(own).participants.values() for e in p.test.examples}
    read: list[str] = []
    monkeypatch.setattr(Pixels, "usable", lambda self, examples: (tuple(examples), ()))  # which looks at every file

    def noted(self: Pixels, image: str) -> Tensor:
        read.append(image)
        return real(self, image)

    real = Pixels.__getitem__
    monkeypatch.setattr(Pixels, "__getitem__", noted)
    held_out(own, tmp_path / "point", ignore)
    assert len(tests) > 5
    assert not tests & set(read)
    assert len(set(read)) + len(tests) == 48


def test_the_best_point_on_held_out_examples_is_taken_and_used(
    short: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {("LoRA", 1e-12): 0.2, ("LoRA", 0.01): 0.7, ("Head", 1e-12): 0.6, ("Head", 0.01): 0.6}
    seen: list[tuple[str, float, int]] = []

    def told_of(recipe: Recipe, folder: Path, watch: Any) -> float:
        kind, lr = type(recipe.method.adapter).__name__, recipe.training.lr
        seen.append((kind, lr, recipe.federation.seed))
        return told[kind, lr]

    monkeypatch.setattr(tuning, "held_out", told_of)
    folder = tmp_path / "compared"
    comparison = compare(short, ("fedavg", "linear-probe"), [0], folder, False, ignore, grid=GRID)
    assert sorted(seen) == sorted((kind, lr, seed) for kind, lr in told for seed in SEEDS)  # the same budget for both
    saved = json.loads((folder / "comparison.json").read_text())["tuning"]
    assert saved == comparison.tuning
    assert {row: own["choice"]["training.lr"] for row, own in saved["rows"].items()} == {
        "fedavg": 0.01,
        "linear-probe": 1e-12,  # of equals the first
    }
    rates = {load(cell / "recipe.toml").training.lr for cell in (folder / "cells").iterdir()}
    assert rates == {0.01, 1e-12}
    with pytest.raises(RunError, match="tuned otherwise"):
        compare(short, ("fedavg", "linear-probe"), [0], folder, True, ignore)
    page = (folder / "comparison.html").read_text()
    assert "What was tuned" in page
    assert "training.lr = 0.01" in page


def test_a_point_is_what_the_sites_reach_and_is_not_run_twice(short: Recipe, tmp_path: Path) -> None:
    first = tuned(short, ["fedavg"], {"training.lr": [0.01]}, tmp_path, 1, ignore)
    (point,) = first["rows"]["fedavg"]["tried"]
    assert 0 < point["held_out"] == sum(point["by_seed"]) / len(SEEDS) <= 1
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json*")}
    assert tuned(short, ["fedavg"], {"training.lr": [0.01]}, tmp_path, 1, ignore) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json*")} == times


def test_a_point_that_fails_is_recorded_and_not_taken(short: Recipe, tmp_path: Path) -> None:
    grid = {"training.lr": [-1.0, 0.01]}
    own = tuned(short, ["fedavg"], grid, tmp_path / "a", 1, ignore)["rows"]["fedavg"]
    assert "cannot run" in own["tried"][0]["failed"]
    assert own["choice"] == {"training.lr": 0.01}
    comparison = compare(short, ["fedavg"], [0], tmp_path / "b", False, ignore, grid={"training.lr": [-1.0]})
    assert "cannot run" in comparison.rows["fedavg"]["missing"]["0"]


def test_the_grid_is_the_recipes_or_else_the_protocols(short: Recipe) -> None:
    protocol = Protocol(Path("p.toml"), "0", (), {"lr": [0.1, 0.2], "finetune": 4, "method": {"mu": [0, 1]}})
    assert grid_of(short, protocol) == {"training.lr": [0.1, 0.2], "method.mu": [0, 1]}
    own = short.altered({"compare.tune.training.lr": [0.3]})
    assert own.id == short.id
    assert "tune" not in own.rows
    assert grid_of(own, protocol) == {"training.lr": [0.3]}
    with pytest.raises(RecipeError, match="there is nothing to tune"):
        grid_of(short, None)
    with pytest.raises(RecipeError, match="expected a list"):
        grid_of(short.altered({"compare.tune.training.lr": 0.3}), None)


def test_a_key_of_a_method_is_tried_for_the_rows_that_have_it(short: Recipe) -> None:
    grid = {"training.lr": [0.1, 0.2], "method.mu": [0, 1], "method.adapter.rank": [2, 4]}
    found = points(short, ["fedprox", "local", "fedavg-adapter", "majority"], grid)
    assert {row: len(own) for row, own in found.items()} == {
        "fedprox": 8,
        "local": 4,
        "fedavg-adapter": 4,
        "majority": 2,
    }
    assert found["majority"] == [{"training.lr": 0.1}, {"training.lr": 0.2}]
    assert points(short, ["local"], {"rows": {"fedprox": {"method.mu": [1]}}}) == {"local": [{}]}
    with pytest.raises(RecipeError, match=r"no method of the rows \['local'\] has 'method.mu', which is to be tuned"):
        points(short, ["local"], grid)


def test_a_row_may_have_a_grid_of_its_own(short: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "held_out", lambda recipe, folder, watch: getattr(recipe.method, "mu", 0.0))
    tune = {"lr": [0.1, 0.2], "rows": {"fedprox": {"method": {"mu": [0.1, 1.0]}, "lr": [0.3]}}}
    own = short.altered({"compare.tune": tune})
    grid = grid_of(own, None)
    assert grid["rows"] == {"fedprox": {"method.mu": [0.1, 1.0], "training.lr": [0.3]}}
    noted: list[str] = []
    found = compare(own, ("local", "fedprox"), [0], tmp_path / "c", False, lambda e: noted.append(str(e)), grid=grid)
    assert found.tuning is not None
    assert {row: one["points"] for row, one in found.tuning["rows"].items()} == {"local": 2, "fedprox": 2}
    assert found.tuning["rows"]["fedprox"]["choice"] == {"method.mu": 1.0, "training.lr": 0.3}
    assert any("points to tune by: local 2, fedprox 2" in said for said in noted)
    assert "2 points" in (tmp_path / "c" / "comparison.html").read_text()
    shown = comparison_table(found).partition(f"chosen on seeds {SEEDS[0]} and {SEEDS[1]}, ")[2]
    assert re.search(r"^  fedprox +training.lr = 0.3, method.mu = 1.0, of 2 points$", shown, re.MULTILINE)
    again = compare(own, ("local", "fedprox"), [0], tmp_path / "c", True, ignore, grid=grid)
    assert again.tuning == found.tuning
    with pytest.raises(RecipeError, match=r"a row that there is not; did you mean 'fedprox'\?"):
        grid_of(short.altered({"compare.tune.rows.fedpro.method.mu": [1]}), None)
    with pytest.raises(RecipeError, match=r"rows.fedprox in .* is .*1.*; expected keys with lists"):
        grid_of(short.altered({"compare.tune.rows.fedprox": [1]}), None)
    with pytest.raises(RecipeError, match=r"rows in .* is 3; expected tables by row"):
        grid_of(short.altered({"compare.tune.rows": 3}), None)


def test_a_row_that_a_recipe_refuses_has_one_point_and_stops_no_other() -> None:
    recipe = load("vqamed-organ")
    tried = points(recipe, ["fedavg", "promptfl"], {"training.lr": [0.1, 0.2]})
    assert tried == {"fedavg": [{"training.lr": 0.1}, {"training.lr": 0.2}], "promptfl": [{}]}
    with pytest.raises(RecipeError):
        points(recipe, ["fedavg", "nobody"], {"training.lr": [0.1]})
