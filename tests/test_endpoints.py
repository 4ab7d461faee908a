"""Endpoints: the interval beside SciPy's, the margin, Holm over a method's own family, and what is not there."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import permutation_test, ttest_1samp

from fedloom.endpoints import Endpoint, judge, judged, protocol, stamp
from fedloom.errors import RecipeError
from fedloom.report import endpoints_table

PROTOCOL = """
[grid]
lr = [0.1, 0.2]

[fedpia]
primary = { setting = "merge", view = "personal", of = "a", minus = "b", margin = -1.0 }
[[fedpia.secondary]]
setting = "merge"
view = "global"
of = "a"
minus = "b"
margin = 0.0
[[fedpia.secondary]]
setting = "widths"
view = "personal"
of = "a"
minus = "b"
margin = 0.0
"""


def content(a: list[float], b: list[float]) -> dict[str, Any]:
    def cells(values: list[float]) -> dict[str, Any]:
        return {
            str(seed): {"personal.accuracy.mean": x, "personal.accuracy.worst": 0.0, "global.accuracy.mean": x}
            for seed, x in enumerate(values)
        }

    def row(values: list[float]) -> dict[str, Any]:
        return {"cells": cells(values), "summary": {}, "missing": {}}

    rows = {"a": row(a), "b": row(b)}
    return {"fedloom": "0.1.0", "recipe": "0", "seeds": list(range(len(a))), "rows": rows, "differences": []}


@pytest.mark.parametrize("margin", [0.0, 0.09, 0.2])
def test_an_endpoint_is_judged_by_its_lower_limit(margin: float) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.6, 0.05, 8), rng.normal(0.55, 0.05, 8)
    endpoint = Endpoint("m", "primary", "s", "personal", "a", "b", margin)
    (found,) = judged([endpoint], {"s": content(a.tolist(), b.tolist())})
    low, high = ttest_1samp(a - b, 0).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    assert found["above"] == (low > margin)  # 0.09 is above the limit and below the mean
    flips = permutation_test((a - b - margin,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert found["p"] == pytest.approx(flips.pvalue)
    assert "holm" not in found  # the primary one stands alone


def test_an_endpoint_may_be_of_the_worst_fifth() -> None:
    own = content([0.6, 0.7, 0.8], [0.5, 0.6, 0.7])
    for row, worst in (("a", 0.3), ("b", 0.35)):
        for cell in own["rows"][row]["cells"].values():
            cell["personal.accuracy.worst_fifth"] = worst
    asked = [Endpoint("m", "primary", "s", "personal", "a", "b", 0.0, figure=name) for name in ("mean", "worst_fifth")]
    assert [one["mean"] for one in judged(asked, {"s": own})] == pytest.approx([0.1, -0.05])


def test_holm_is_over_all_secondary_endpoints_that_a_method_names() -> None:
    def secondary(method: str, setting: str) -> Endpoint:
        return Endpoint(method, "secondary", setting, "personal", "a", "b", 0.0)

    contents = {"clear": content([0.6] * 8, [0.5] * 8), "even": content([0.5, 0.6, 0.5, 0.6], [0.6, 0.5, 0.6, 0.5])}
    asked = [secondary("m", "clear"), secondary("m", "even"), secondary("m", "gone"), secondary("n", "clear")]
    clear, even, gone, other = judged(asked, contents)
    assert clear["p"] == other["p"] == 2 / 2**8
    assert clear["holm"] == 3 * 2 / 2**8  # the one that was not run counts
    assert even["holm"] == 1.0
    assert (gone["holm"], gone["why"]) == (None, "gone was not run")
    assert other["holm"] == 2 / 2**8  # another method's family


def test_the_protocol_goes_into_the_comparison(tmp_path: Path) -> None:
    file = tmp_path / "protocol.toml"
    file.write_text(PROTOCOL)
    own = protocol(file)
    assert own is not None
    assert own.hash == hashlib.sha256(PROTOCOL.encode()).hexdigest()
    assert (own.endpoints[0].margin, own.grid) == (-0.01, {"lr": [0.1, 0.2]})
    folder = tmp_path / "merge"
    folder.mkdir()
    (folder / "comparison.json").write_text(json.dumps(content([0.6, 0.7, 0.8], [0.5, 0.61, 0.69])))
    found = judge(own, {"merge": folder, "widths": tmp_path / "widths"})
    assert [one["kind"] for one in found] == ["primary", "secondary"]
    saved = json.loads((folder / "comparison.json").read_text())
    assert (saved["protocols"], saved["endpoints"]) == ([own.hash], found)
    assert own.hash in (folder / "comparison.html").read_text()
    (folder / "comparison.json").write_text(json.dumps({**saved, "protocols": ["of before"]}))
    judge(own, {"merge": folder})
    assert json.loads((folder / "comparison.json").read_text())["protocols"] == ["of before"]  # it was not run again
    table = endpoints_table(found)
    assert "fedpia, primary: merge, personal: a - b" in table
    assert "merge, personal, worst fifth: a - b" in endpoints_table([{**found[0], "figure": "worst_fifth"}])
    assert "lower limit above the margin -1.0; p 0.250" in table
    assert "p by Holm 0.500" in table


def test_only_what_a_protocol_asks_of_is_told_to_have_been_run_under_it(tmp_path: Path) -> None:
    (file := tmp_path / "protocol.toml").write_text(PROTOCOL)
    own = protocol(file)
    assert own is not None
    setting = own.endpoints[0].setting
    assert [stamp(own, setting, False), stamp(own, "another", False)] == [own.hash, None]
    assert [stamp(own, "another", True), stamp(None, setting, False)] == [own.hash, None]


NAMES = "setting = 's', view = 'personal', of = 'a', minus = 'b'"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[fedpia]\nprimary = { setting = 'x' }", r"'view' is missing in \[fedpia.primary\]"),
        ("grid = ['a']", "grid = .* expected a table"),
        (f"[fedpia]\nprimary = {{ {NAMES}, margin = true }}", "margin = true in .*; expected a number"),
        (f"[fedpia]\nprimary = {{ {NAMES}, margin = 1, figure = 'worst' }}", 'figure = "worst" in .*worst_fifth'),
        (f"[fedpia]\nprimary = {{ {NAMES.replace(chr(39) + 's' + chr(39), '3')}, margin = 1 }}", "setting = 3 in"),
        (f"[fedpia]\nprimary = {{ {NAMES}, margin = 1 }}\nsecondary = [1]", "secondary = .* in \\[fedpia\\]"),
        ("fedpia = [", "is no protocol"),
        (None, "cannot be read"),
    ],
)
def test_a_damaged_protocol_is_one_sentence(text: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "protocol.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(RecipeError, match=message):
        protocol(file)


def test_without_a_checkout_there_is_no_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert protocol(None) is None


def test_the_protocol_of_this_project_reads() -> None:
    own = protocol(Path(__file__).parents[1] / "benchmarks" / "protocol.toml")
    assert own is not None
    assert {one.method for one in own.endpoints if one.kind == "primary"} >= {"fedpia", "feddlp"}
