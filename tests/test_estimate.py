"""What is counted on a few steps is what a whole run computes."""

from pathlib import Path
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from fedloom.assembly import assemble, planned
from fedloom.comparisons import compare
from fedloom.estimate import estimate
from fedloom.recipe import Recipe, load
from fedloom.rounds import train

QUIET = {"federation.evaluate_every": 0, "reference.rows": ()}
UNEVEN = {
    "training.batch": 5,
    "training.epochs": 2,
    "training.finetune": 3,
    "federation.rounds": 3,
    "data.held_out": 0.3,
}


def computed(recipe: Recipe, folder: Path) -> int:
    """FLOPs of a run, from reading its data to what sites do after the last round."""
    with FlopCounterMode(display=False) as counter:
        federation = assemble(planned(recipe), tested=False)
        train("run", federation.method, federation, folder, lambda event: None)
    return int(counter.get_total_flops())


PIA = {"compare.fedpia.method": {"name": "fedpia", "probe": 4, "choose": [0.5]}}


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ("fedavg", {"sites.oslo.joins": 2}),
        ("linear-probe", {"backbone.cache": True}),
        ("frozen", {}),
        ("frozen", {"backbone.cache": True, "training.warmup_head": 0}),
        ("feddlp", {}),
        ("feddlp", {"backbone.cache": True, "training.finetune": 0}),
        ("fedpia", {}),
        ("fedpia", {"training.batch": 1}),  # its few steps hold fewer images than its probe
        ("ensemble-distilled", {"federation.rounds": 2}),
    ],
)
def test_the_whole_training_is_counted(row: str, settings: dict[str, Any], recipe: Path, tmp_path: Path) -> None:
    own = load(recipe, {**QUIET, **UNEVEN, **PIA}).row(row).altered(settings)
    assert estimate(own).flops_training == pytest.approx(computed(own, tmp_path / "run"), rel=0.02)


def test_texts_that_are_trained_cost_a_step_whatever_its_size(recipe: Path, tmp_path: Path) -> None:
    text = {"task.head": "prompts", "backbone.towers": ["text"], "training.warmup_head": 0}
    own = load(recipe, {**QUIET, **UNEVEN, **text})
    assert estimate(own).flops_training == pytest.approx(computed(own, tmp_path / "run"), rel=0.02)


def test_a_comparison_tells_the_whole_training(recipe: Path, tmp_path: Path) -> None:
    rows = ("frozen", "linear-probe")
    asked = load(recipe, {"training.warmup_head": 0, "training.finetune": 0})
    found = compare(asked, rows, [0], tmp_path / "runs", False, lambda event: None, counted=True)
    for row in rows:
        own = asked.row(row).altered(QUIET)
        assert found.rows[row]["costs"]["flops"] == pytest.approx(computed(own, tmp_path / row), rel=0.02)
