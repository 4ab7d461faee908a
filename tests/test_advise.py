"""`fedloom advise`: what one round says on held-out examples, and nothing of the test."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import fedloom as package
from fedloom.advise import Advice, advise
from fedloom.recipe import load

Fedloom = Callable[..., tuple[int, str, str]]


def test_advice_is_the_difference_of_two_short_runs(recipe: Path, tmp_path: Path) -> None:
    short = {"federation.rounds": 1, "data.held_out": 0.3}
    found = {one.site: one for one in advise(load(recipe, {"data.held_out": 0.3}))}
    together = package.run(load(recipe, short), tmp_path / "together").evaluate("held_out")
    alone = package.run(load(recipe, {**short, "method.name": "local"}), tmp_path / "alone").evaluate("held_out")
    assert set(found) == {"oslo", "rome", "kyiv"}
    for site, one in found.items():
        assert (one.together, one.alone) == (together[site]["accuracy"], alone[site]["accuracy"])
        assert one.low is not None
        assert one.high is not None
        assert one.low <= one.gain <= one.high


def test_no_test_example_is_looked_at(recipe: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    marked = [row | {"split": "test" if i % 4 == 3 else "train"} for i, row in enumerate(rows)]
    path = tmp_path / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in marked))
    own = load(recipe, {"data.test": "column"})
    before = advise(own)
    wrong = [row | ({"label": "red"} if row["split"] == "test" else {}) for row in marked]
    path.write_text("".join(json.dumps(row) + "\n" for row in wrong))
    assert advise(own) == before


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.01, 0.2, "join"),
        (-0.2, -0.01, "stay"),
        (-0.1, 0.1, "unclear"),
        (0.0, 0.1, "unclear"),
        (None, None, "unclear"),
    ],
)
def test_a_verdict_is_no_surer_than_its_interval(low: float | None, high: float | None, verdict: str) -> None:
    assert Advice("a", "accuracy", 9, 0.5, 0.6, low, high).verdict == verdict


def test_the_command_tells_one_site_or_all(fedloom: Fedloom, recipe: Path, tmp_path: Path) -> None:
    code, out, err = fedloom("advise", recipe, "--site", "rome")
    assert (code, err) == (0, "")
    assert "rome" in out
    assert "oslo" not in out
    assert "A forecast from one round" in out
    assert max(map(len, out.splitlines())) <= 80
    assert not (tmp_path / "runs").exists()
    code, _, err = fedloom("advise", recipe, "--site", "bern")
    assert code == 2
    assert "there is no site 'bern' with held-out examples" in err
    code, _, err = fedloom("advise", recipe, "--set", "method.name=local")
    assert code == 2
    assert "'local' in [method]" in err
    code, _, err = fedloom("advise", recipe, "--set", "data.held_out=0")
    assert code == 2
    assert "raise [data] held_out" in err
