"""Comparisons: every cell once, whatever happens in between; intervals as SciPy has them."""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import permutation_test, ttest_1samp, ttest_rel

from fedloom.cells import Cell, each
from fedloom.comparisons import compare
from fedloom.errors import RecipeError, RunError
from fedloom.events import Event, Note
from fedloom.outcomes import Comparison, summarised
from fedloom.recipe import Recipe, load
from fedloom.report import comparison_table

Fedloom = Callable[..., tuple[int, str, str]]
SEEDS = (0, 1)

# FedAvg that notes each of its starts in a file, and fails the first so many times.
METHOD = """
from dataclasses import dataclass
from pathlib import Path
from fedloom.methods import FedAvg

@dataclass(frozen=True)
class Noted(FedAvg):
    log: str = ""
    fails: int = 0

    def start(self, model, task, sites, seed):
        with Path(self.log).open("a") as file:
            file.write(f"{self.fails} {self.mu} {seed}\\n")
        if Path(self.log).read_text().splitlines().count(f"{self.fails} {self.mu} {seed}") <= self.fails:
            raise RuntimeError("out of luck")
        return super().start(model, task, sites, seed)
"""


def ignore(event: Event) -> None:
    """A watch that looks away."""


@pytest.fixture
def short(recipe: Path) -> Path:
    """The recipe of three sites, with one round and no fine-tuning."""
    recipe.write_text(recipe.read_text().replace("rounds = 2", "rounds = 1").replace("finetune = 1", "finetune = 0"))
    return recipe


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "noting.py").write_text(METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "noting", raising=False)
    return tmp_path / "starts.txt"


@pytest.fixture
def noted(short: Path, log: Path) -> Recipe:
    """A recipe whose rows `a`, `b` and `twin` note their starts; `twin` is what `a` is."""
    method = {"name": "noting:Noted", "log": str(log)}
    rows = {"a": {}, "twin": {}, "b": {"mu": 0.5}, "unlucky": {"fails": 1}, "hopeless": {"fails": 9}}
    return load(short, {f"compare.{row}.method": {**method, **change} for row, change in rows.items()})


def starts(log: Path) -> Counter[str]:
    return Counter(log.read_text().splitlines())


def test_baselines_run_and_equal_recipes_share_a_cell(short: Path, tmp_path: Path) -> None:
    rows = ("fedavg", "fedavg-lora", "frozen", "local", "linear-probe", "full", "majority", "pooled")
    comparison = compare(load(short), rows, [0], tmp_path / "compared", False, ignore)
    assert list(comparison.rows) == list(rows)
    assert all(content["missing"] == {} for content in comparison.rows.values())
    assert len(list((tmp_path / "compared" / "cells").iterdir())) == len(rows) - 1  # the first two are one
    sent = {row: content["cells"]["0"]["bytes_up"] for row, content in comparison.rows.items()}
    assert sent["fedavg"] == sent["fedavg-lora"]
    assert sent["frozen"] == sent["local"] == sent["linear-probe"] == sent["majority"] < sent["fedavg"] < sent["full"]
    table = comparison_table(comparison)
    assert table.count("one seed: no interval") == 2 * (len(rows) + len(rows) * (len(rows) - 1) // 2)  # of two views
    assert "fedavg - frozen" in table


def test_what_pruning_saves_at_a_site_is_told(short: Path, tmp_path: Path) -> None:
    rows = {
        "whole": {"name": "feddlp", "adapter": {"kind": "lora", "rank": 4}, "pruning": "none"},
        "half": {"name": "feddlp", "adapter": {"kind": "lora", "rank": 4}, "pruning": {"schedule": "constant"}},
    }
    recipe = load(short, {f"compare.{row}.method": method for row, method in rows.items()})
    comparison = compare(recipe, [*rows, "fedavg"], [0], tmp_path / "compared", False, ignore)
    whole, half, fedavg = (content["cells"]["0"] for content in comparison.rows.values())
    assert (whole["rank"], half["rank"]) == (4.0, 2.0)
    assert "rank" not in fedavg
    sites = tmp_path / "compared" / "cells"
    sizes = {
        sum(max(site.glob("*.safetensors")).stat().st_size for site in (cell / "sites").iterdir())
        for cell in sites.iterdir()
    }
    assert sizes == {own["private_bytes"] for own in (whole, half, fedavg)}
    assert fedavg["private_bytes"] < half["private_bytes"] < whole["private_bytes"]
    head, *lines = comparison_table(comparison).partition("cost ")[2].splitlines()
    assert head.split() == ["up", "down", "private", "ranks", "time"]
    assert any(line.startswith("half ") and " 2.00 " in line for line in lines)
    page = (tmp_path / "compared" / "comparison.html").read_text()
    assert "ranks left" in page
    assert '<td class="n">2.00</td>' in page


def test_no_cell_is_run_twice_though_the_comparison_is_stopped(noted: Recipe, log: Path, tmp_path: Path) -> None:
    folder, notes = tmp_path / "compared", []

    def stop(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)
            if len(notes) > 1:  # it is there after each cell, and holds all that were run
                saved = json.loads((folder / "comparison.json").read_text())
                assert sum(len(row["cells"]) for row in saved["rows"].values()) == len(notes) - 1
            if len(notes) == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(noted, ("a", "b", "twin"), SEEDS, folder, False, stop)
    assert notes == ["a, seed 0", "b, seed 0", "twin, seed 0"]
    assert sum(starts(log).values()) == 2
    with pytest.raises(RunError, match="--resume"):
        compare(noted, ("a", "b", "twin"), SEEDS, folder, False, ignore)
    with pytest.raises(RunError, match="another recipe"):
        compare(noted.altered({"training.lr": 0.5}), ("a", "b"), SEEDS, folder, True, ignore)
    comparison = compare(noted, ("a", "b", "twin"), SEEDS, folder, True, ignore)
    assert starts(log) == {f"0 {mu} {seed}": 1 for mu in (0.0, 0.5) for seed in SEEDS}
    assert comparison.rows["a"]["cells"] == comparison.rows["twin"]["cells"]
    saved = json.loads((folder / "comparison.json").read_text())
    assert Comparison(saved["rows"], saved["differences"], saved["seeds"]) == comparison
    same = [difference for difference in comparison.differences if difference["minus"] == "twin"]
    assert all(difference["mean"] == 0 for difference in same if difference["of"] == "a")


def test_a_cell_that_crashes_is_tried_once_more_and_costs_the_others_nothing(
    noted: Recipe, log: Path, tmp_path: Path
) -> None:
    comparison = compare(noted, ("hopeless", "unlucky", "a"), [3], tmp_path / "compared", False, ignore)
    assert starts(log) == {"9 0.0 3": 2, "1 0.0 3": 2, "0 0.0 3": 1}
    assert comparison.rows["hopeless"]["missing"] == {"3": "crashed: RuntimeError: out of luck"}
    assert comparison.rows["unlucky"]["missing"] == {}
    assert comparison.rows["unlucky"]["cells"] == comparison.rows["a"]["cells"]
    assert "hopeless, seed 3: crashed: RuntimeError: out of luck" in comparison_table(comparison)


def test_a_row_that_cannot_run_is_listed_with_the_reason(short: Path, groups: Path, tmp_path: Path) -> None:
    unlike = load(groups, {"compare.shared.method": {"name": "fedavg", "heads": "shared"}})
    ranking = load(short, {"task.kind": "ranking"})
    nowhere = {"name": "fedavg", "adapter": {"kind": "lora", "targets": ["nothing"]}}
    for number, (recipe, row, reason) in enumerate(
        (
            (unlike, "shared", "a shared head needs one task at all sites"),
            (ranking, "linear-probe", "there is nothing to train"),
            (load(short, {"compare.nowhere.method": nowhere}), "nowhere", "LoRA(rank=2"),
        )
    ):
        comparison = compare(recipe, [row], SEEDS, tmp_path / str(number), False, ignore)
        for seed in SEEDS:
            assert f"{row}, seed {seed}: cannot run: {reason}" in comparison_table(comparison)


def test_an_unknown_row_is_refused_before_anything_runs(short: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no row 'fedavgg'.*did you mean 'fedavg'"):
        compare(load(short), ("frozen", "fedavgg"), SEEDS, tmp_path / "compared", False, ignore)
    assert not (tmp_path / "compared").exists()


def test_the_command_prints_rows_and_differences(fedloom: Fedloom, short: Path, tmp_path: Path) -> None:
    arguments = ("compare", short, "--methods", "frozen, local", "--seeds", 2, "--out", tmp_path / "compared")
    (protocol := tmp_path / "protocol.toml").write_text("[grid]\nlr = [0.1]\n")  # of no endpoint here
    code, out, err = fedloom(*arguments, "--protocol", protocol)
    assert (code, err) == (0, "")
    saved = json.loads((tmp_path / "compared" / "comparison.json").read_text())
    assert saved["protocols"] == [hashlib.sha256(protocol.read_bytes()).hexdigest()]
    assert "frozen - local" in out
    assert out.rstrip().endswith("comparison.json")
    code, _, err = fedloom(*arguments)
    assert code == 2
    assert "--resume" in err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    code, _, err = fedloom(*arguments[:-1], tmp_path / "mine")
    assert code == 2
    assert "is not empty and is no comparison" in err


def told(values: dict[int, float | str]) -> dict[int, Cell | str]:
    """Cells of one figure, and reasons."""
    return {seed: own if isinstance(own, str) else Cell({"accuracy": own}, {}, ()) for seed, own in values.items()}


@pytest.mark.parametrize("n", [2, 5])
def test_intervals_are_those_of_scipy(n: int) -> None:
    rng = np.random.default_rng(n)
    values = {row: rng.normal(0.6, 0.1, n).tolist() for row in ("one", "other")}
    comparison = summarised({row: told(dict(enumerate(own))) for row, own in values.items()}, range(n))
    for row, own in values.items():
        low, high = ttest_1samp(own, 0).confidence_interval(0.95)
        expected = {"mean": np.mean(own), "low": low, "high": high, "n": n}
        assert comparison.rows[row]["summary"]["accuracy"] == pytest.approx(expected)
    low, high = ttest_rel(values["one"], values["other"]).confidence_interval(0.95)
    (difference,) = comparison.differences
    assert (difference["of"], difference["minus"], difference["n"]) == ("one", "other", n)
    assert (difference["low"], difference["high"]) == pytest.approx((low, high))
    paired = np.subtract(values["one"], values["other"])
    flips = permutation_test((paired,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert difference["p"] == pytest.approx(flips.pvalue)


def test_differences_are_of_the_seeds_that_both_rows_have() -> None:
    found = {"one": told({0: 1.0, 1: 3.0, 2: "crashed: ..."}), "other": told({1: 1.0, 2: 0.0})}
    (difference,) = summarised(found, (0, 1, 2)).differences
    assert (difference["mean"], difference["n"], difference["low"]) == (2.0, 1, None)


def measured(sites: dict[str, float], held_out: list[float]) -> Cell:
    """A cell of these sites and of these rounds, of ten bytes each."""
    rounds = [{"round": i, "bytes": 10 * i, "held_out": {"accuracy": x}} for i, x in enumerate(held_out, 1)]
    return Cell({"bytes_up": len(sites)}, {"personal": sites}, rounds)


def test_each_site_has_its_gain_over_local_only_at_the_same_seeds() -> None:
    local = {0: measured({"oslo": 0.5, "rome": 0.8}, []), 1: measured({"oslo": 0.6, "rome": 0.8}, [])}
    own = {0: measured({"oslo": 0.7, "rome": 0.5}, []), 1: measured({"oslo": 0.6, "rome": 0.7}, []), 2: "crashed"}
    rows = summarised({"local": local, "own": own}, (0, 1, 2)).rows
    sites = rows["own"]["sites"]["personal"]
    assert {site: row["mean"] for site, row in sites.items()} == pytest.approx({"oslo": 0.65, "rome": 0.6})
    assert {site: row["gain"]["mean"] for site, row in sites.items()} == pytest.approx({"oslo": 0.1, "rome": -0.2})
    assert sites["oslo"]["gain"]["n"] == 2
    assert rows["local"]["sites"]["personal"]["oslo"]["gain"] is None


def test_curves_are_means_over_seeds() -> None:
    cells = {0: measured({}, [0.2, 0.4]), 1: measured({}, [0.4, 0.8])}
    (first, second) = summarised({"own": cells}, (0, 1)).rows["own"]["held_out"]["accuracy"]
    assert (first["round"], first["bytes"], second["round"], second["bytes"]) == (1, 10, 2, 20)
    assert (first["mean"], second["mean"]) == pytest.approx((0.3, 0.6))


def test_rounds_to_a_value_and_to_what_a_row_ends_with() -> None:
    aim = {0: measured({}, [0.1, 0.5]), 1: measured({}, [0.9, 0.6])}
    own = {0: measured({}, [0.2, 0.5, 0.6]), 1: measured({}, [0.2, 0.3, 0.5]), 2: measured({}, [1.0])}
    reached = summarised({"aim": aim, "own": own}, (0, 1, 2), "aim").rows["own"]["reached"]
    assert reached == {"accuracy": {"mean": 2.0, "reached": 1, "n": 2}}  # at seed 0 the second, at seed 1 never
    reached = summarised({"own": own}, (0, 1, 2), 0.3).rows["own"]["reached"]
    assert reached == {"accuracy": {"mean": pytest.approx(5 / 3), "reached": 3, "n": 3}}
    reached = summarised({"own": own}, (0, 1, 2), 2.0).rows["own"]["reached"]
    assert reached == {"accuracy": {"mean": None, "reached": 0, "n": 3}}
    assert summarised({"own": own}, (0, 1, 2)).rows["own"]["reached"] == {}


def test_cells_side_by_side_have_the_bits_of_cells_in_turn(noted: Recipe, log: Path, tmp_path: Path) -> None:
    rows, notes = ("a", "hopeless", "twin"), []
    one = compare(noted, rows, [3], tmp_path / "one", False, ignore)
    before = starts(log)
    watch = lambda event: notes.append(event.text)  # noqa: E731
    two = compare(noted, rows, [3], tmp_path / "two", False, watch, workers=2)
    assert starts(log) - before == {"0 0.0 3": 1, "9 0.0 3": 2}  # equal cells once, the crashed one twice
    assert {row: own["cells"] for row, own in two.rows.items()} == {row: own["cells"] for row, own in one.rows.items()}
    assert two.rows["a"]["sites"] == one.rows["a"]["sites"]
    assert two.rows["hopeless"]["missing"] == {"3": "crashed: RuntimeError: out of luck"}
    assert sorted(notes) == [
        "a, seed 3: done",
        "hopeless, seed 3: crashed: RuntimeError: out of luck",
        "twin, seed 3: done",
    ]
    folders = [sorted((tmp_path / name / "cells").glob("*/server/*")) for name in ("one", "two")]
    assert [path.read_bytes() for path in folders[0]] == [path.read_bytes() for path in folders[1]]
    compare(noted, ("a",), [3], tmp_path / "two", True, ignore, workers=2)
    assert starts(log) - before == {"0 0.0 3": 1, "9 0.0 3": 2}  # resumed: not run again


def test_rows_and_seeds_of_before_stay_and_are_not_run_again(noted: Recipe, log: Path, tmp_path: Path) -> None:
    folder, noticed = tmp_path / "compared", []
    first = compare(noted, ("a", "hopeless"), [1], folder, False, ignore, target="a", protocol="first")
    ran = starts(log)
    watch = lambda event: noticed.append(event.text) if isinstance(event, Note) else None  # noqa: E731
    second = compare(noted, ("b",), [0, 1], folder, True, watch, protocol="second")
    assert starts(log) - ran == {"0 0.5 0": 1, "0 0.5 1": 1}
    assert noticed == ["b, seed 0", "b, seed 1"]
    assert (list(second.rows), second.seeds, second.target) == (["a", "hopeless", "b"], [0, 1], "a")
    assert {row: list(own["cells"]) for row, own in second.rows.items()} == {
        "a": ["1"],
        "hopeless": [],
        "b": ["0", "1"],
    }
    assert {**second.rows["a"], "reached": 0} == {**first.rows["a"], "reached": 0}
    assert second.rows["hopeless"]["missing"] == {"1": "crashed: RuntimeError: out of luck"}
    assert {(one["of"], one["minus"], one["n"]) for one in second.differences} == {("a", "b", 1)}
    third = compare(noted, ("a",), [1], folder, True, ignore, protocol="third")
    assert sum(starts(log).values()) == sum(ran.values()) + 2
    assert (first.protocols, second.protocols) == (("first",), ("first", "second"))
    assert third == second  # no cell was run under the third
    assert json.loads((folder / "comparison.json").read_text())["protocols"] == ["first", "second"]
    other = noted.altered({"compare.b.method.mu": 0.7})  # [compare] is no part of the recipe that a folder is of
    fourth = compare(other, ("a",), [1], folder, True, watch)
    assert list(fourth.rows) == ["a", "hopeless"]
    assert noticed[2].startswith("b: nothing that was run of it is of ")


def test_cells_of_another_source_are_told_and_stay(noted: Recipe, log: Path, tmp_path: Path) -> None:
    """After a fault was mended, what it had spoilt must not pass for new."""
    folder, noticed = tmp_path / "compared", []
    watch = lambda event: noticed.append(event.text) if isinstance(event, Note) else None  # noqa: E731
    compare(noted, ("a",), [0, 1], folder, False, ignore)
    ran = starts(log)
    compare(noted, ("a",), [0, 1], folder, True, watch)
    assert noticed == []
    summaries = {path: json.loads(path.read_text()) for path in folder.glob("cells/*/summary.json")}
    (own,) = (path for path, said in summaries.items() if said["seed"] == 1)
    summaries[own]["lineage"]["source"] = "0" * 64
    own.write_text(json.dumps(summaries[own]))
    compare(noted, ("a",), [0, 1], folder, True, watch)
    (note,) = noticed
    assert note.startswith("finished cells of another source of fedloom: 1, the first is a, seed 1; ")
    assert starts(log) == ran


def test_a_lora_is_judged_against_a_lora_and_what_was_counted_stays(short: Path, tmp_path: Path) -> None:
    recipe, folder = load(short, {"method.adapter": {"kind": "bottleneck", "width": 4}}), tmp_path / "compared"
    rows = ("local", "linear-probe", "fedavg-lora", "majority")
    first = compare(recipe, rows, [0], folder, False, ignore, counted=True)
    assert {row: own["alone"] for row, own in first.rows.items()} == dict.fromkeys(rows, "local")
    second = compare(recipe, ("local-lora", "fedavg"), [0], folder, True, ignore)
    judges = {"fedavg-lora": "local-lora", **dict.fromkeys((*rows[:2], "majority", "local-lora", "fedavg"), "local")}
    assert {row: own["alone"] for row, own in second.rows.items()} == judges
    kinds = {row: own["adapter"] and own["adapter"]["kind"] for row, own in second.rows.items()}
    lora = dict.fromkeys(("fedavg-lora", "local-lora"), "lora")
    bottleneck = dict.fromkeys(("local", "fedavg"), "bottleneck")
    assert kinds == {"linear-probe": "head", "majority": None, **lora, **bottleneck}
    for before, alone in ((first, "local"), (second, "local-lora")):
        own, other = (before.rows[row]["sites"]["personal"] for row in ("fedavg-lora", alone))
        for site, one in own.items():
            assert one["gain"]["mean"] == pytest.approx(one["mean"] - other[site]["mean"])
    assert all(second.rows[row]["costs"] == first.rows[row]["costs"] != {} for row in rows)
    third = compare(recipe, ("local-lora", "fedavg-lora"), [0], tmp_path / "without", False, ignore)
    assert {row: own["alone"] for row, own in third.rows.items()} == dict.fromkeys(third.rows, "local-lora")


def test_a_damaged_comparison_is_one_sentence(fedloom: Fedloom, short: Path, tmp_path: Path) -> None:
    whole = {"recipe": "", "rows": {}, "seeds": [], "differences": []}
    broken = ({"rows": {"local": 3}}, {"rows": [1]}, {"seeds": None}, {"tuning": 3}, {"target": [1]})
    for text in ('{"recipe": ', "[]", "{}", *(json.dumps(whole | one) for one in broken)):
        (tmp_path / "comparison.json").write_text(text)
        code, _, err = fedloom("compare", short, "--methods", "local", "--out", tmp_path, "--resume")
        assert (code, err.count("\n")) == (2, 1)
        assert f"'{tmp_path / 'comparison.json'}' is no whole comparison" in err


# As a process that is out of memory: always, or but the first time.
DYING = """
import os

def dies(recipe, folder, watch):
    tries = folder.with_suffix(".tries")
    with tries.open("a") as file:
        file.write("x")
    if folder.parent.name == "always" or len(tries.read_text()) == 1:
        os._exit(9)
    return 0.5
"""


@pytest.mark.parametrize(
    ("name", "expected"),
    [("once", 0.5), ("always", "crashed: its process was killed; is there memory for so many --workers?")],
)
def test_a_process_that_is_killed_is_tried_once_more(
    name: str, expected: object, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "dying", raising=False)
    (tmp_path / name).mkdir()
    found = dict(each({"cell": load(short)}, import_module("dying").dies, tmp_path / name, 2, ignore))
    assert found == {"cell": expected}
    (tries,) = (tmp_path / name).glob("*.tries")
    assert tries.read_text() == "xx"
