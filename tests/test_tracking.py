"""Trackers are told of every round while a run goes on, and can stop nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedloom as package
from fedloom import tracking
from fedloom.events import Ended, Event
from fedloom.recipe import load

Fedloom = Callable[..., tuple[int, str, str]]
BOARD = {"federation.track": ["tensorboard"], "reference.rows": ["local"]}


def told(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would show of one stage: by name, steps and values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder))
    board.Reload()
    return {name: [(one.step, one.value) for one in board.Scalars(name)] for name in board.Tags()["scalars"]}


def test_a_board_is_told_of_each_round_as_it_ends(recipe: Path, tmp_path: Path) -> None:
    seen: list[list[int]] = []

    def watch(event: Event) -> None:
        if isinstance(event, Ended) and event.stage == "fedavg":
            seen.append([step for step, _ in told(tmp_path / "run" / "track" / "fedavg")["seconds"]])

    run = package.run(load(recipe, BOARD), tmp_path / "run", watch=watch)
    assert seen == [[1], [1, 2]]
    for stage, lines in (
        ("fedavg", run.rounds),
        ("local-only", package.Run(tmp_path / "run" / "references" / "local").rounds),
    ):
        found = told(tmp_path / "run" / "track" / stage)
        for name in ("oslo", "rome", "kyiv"):
            expected = [line["sites"][name]["metric"] for line in lines]
            assert [value for _, value in found[f"site/{name}"]] == pytest.approx(expected)
        assert [value for _, value in found["sites/answered"]] == [3, 3]
    assert sum(value for _, value in told(tmp_path / "run" / "track" / "fedavg")["bytes/up"]) == run.summary["bytes_up"]


def test_tracking_changes_no_result(recipe: Path, tmp_path: Path) -> None:
    plain = load(recipe, {"reference.rows": []})
    boarded = load(recipe, {**BOARD, "reference.rows": []})
    assert plain.id == boarded.id
    one, two = (package.run(own, tmp_path / name) for own, name in ((plain, "one"), (boarded, "two")))
    assert one.summary["views"] == two.summary["views"]
    assert package.run(plain, tmp_path / "two", resume=True).finished  # a tracker may change on the way


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from accelerate.tracking import TensorBoardTracker

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(TensorBoardTracker, "log", full)
    assert package.run(load(recipe, BOARD), tmp_path / "run").finished
    assert [record.getMessage() for record in caplog.records] == [
        "Tracker 'tensorboard' is left out from here on: OSError: no space left on device"
    ]


def test_a_package_that_is_missing_is_named_with_its_command(
    fedloom: Fedloom, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None if name == "wandb" else object())
    code, out, err = fedloom("run", recipe, "--track", "wandb", "--out", tmp_path / "run")
    assert (code, out) == (2, "")
    assert err == "fedloom: the tracker 'wandb' needs the package wandb: pip install 'fedloom[track]' wandb.\n"
    assert not (tmp_path / "run").exists()
    code, _, err = fedloom("run", recipe, "--track", "tensorbord")
    assert code == 2
    assert "tensorboard" in err
