"""Trackers: the figures of every round on a board of your own while a run goes on, through accelerate's trackers.

Each stage of a run (the method, local-only training) becomes a run of the tracker with the same names, so that their
curves lie on one another; a round is a step, from one. What is told is what rounds.jsonl holds: no example, no tensor.
A tracker that fails is left out with a warning, and the run goes on.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedloom.errors import RunError
from fedloom.events import Began, Ended, Event, Watch
from fedloom.overrides import dotted, leaves
from fedloom.recipe import Recipe
from fedloom.report.result import held_out_means

log = logging.getLogger(__name__)

PROJECT = "fedloom"
Made = tuple[str, Callable[[Path, str], dict[str, Any]]]
TRACKERS: Mapping[str, Made] = {  # accelerate's class, and what it is made with: a run's folder and stage
    "mlflow": ("MLflowTracker", lambda run, stage: {"experiment_name": PROJECT, "run_name": f"{run.name}, {stage}"}),
    "tensorboard": ("TensorBoardTracker", lambda run, stage: {"run_name": stage, "logging_dir": str(run / "track")}),
    "trackio": ("TrackioTracker", lambda run, stage: {"run_name": PROJECT, "name": f"{run.name}, {stage}"}),
    "wandb": ("WandBTracker", lambda run, stage: {"run_name": PROJECT, "name": f"{run.name}, {stage}"}),
}


@contextmanager
def tracked(recipe: Recipe, folder: Path, watch: Watch) -> Iterator[Watch]:
    """`watch`, with the trackers that [federation] track names told of every round before it.

    raises RunError: a tracker's package is not installed
    """
    if not recipe.federation.track:
        yield watch
        return
    for name in recipe.federation.track:
        for package in ("accelerate", name):
            if find_spec(package) is None:
                extra = "'fedloom[track]'" if name == "tensorboard" else f"'fedloom[track]' {name}"
                raise RunError(f"the tracker '{name}' needs the package {package}: pip install {extra}.")
    board = _Board(recipe, folder)
    try:

        def both(event: Event) -> None:
            board(event)
            watch(event)

        yield both
    finally:
        board.finish()


def figures(line: Mapping[str, Any]) -> dict[str, float]:
    """What is told of a round: held_out/TASK, the mean over sites, and site/NAME; the mean loss; who answered; bytes;
    seconds; and what the method tells of itself."""
    rows = line["sites"]
    losses = [row["loss"] for row in rows.values() if row.get("loss") is not None]
    found = {
        **{f"held_out/{task}": mean for task, mean in held_out_means(line).items()},
        **{f"site/{name}": row["metric"] for name, row in rows.items() if row.get("metric") is not None},
        "sites/asked": len(rows),
        "sites/answered": sum(row["answered"] for row in rows.values()),
        "bytes/up": sum(row.get("bytes_up", 0) for row in rows.values()),
        "bytes/down": sum(row.get("bytes_down", 0) for row in rows.values()),
        "seconds": line["seconds"],
        **{f"method/{name}": value for name, value in line["method"].items() if value is not None},
    }
    return found | ({"loss": sum(losses) / len(losses)} if losses else {})


class _Board:
    """The trackers of the stage that goes on."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.names: list[str] = list(recipe.federation.track)
        self.open: dict[str, Any] = {}

    def __call__(self, event: Event) -> None:
        match event:
            case Began():
                self.finish()
                for name in list(self.names):
                    self._safely(name, partial(self._start, name, event.stage))
            case Ended():
                told, step = figures(event.line), event.line["round"] + 1
                for name, tracker in list(self.open.items()):
                    self._safely(name, partial(tracker.log, told, step=step))

    def finish(self) -> None:
        for name, tracker in list(self.open.items()):
            self._safely(name, tracker.finish)
        self.open = {}

    def _start(self, name: str, stage: str) -> None:
        from accelerate import PartialState

        PartialState()  # its trackers log through it
        kind, made = TRACKERS[name]
        tracker = getattr(import_module("accelerate.tracking"), kind)(**made(self.folder, stage))
        tracker.start()
        self.open[name] = tracker
        values = {dotted(names): leaf for names, leaf in leaves(self.recipe.table())}
        tracker.store_init_configuration({key: _plain(value) for key, value in values.items()})

    def _safely(self, name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as e:  # a board, a disk or a network of someone else's: no reason to lose a run
            log.warning("Tracker '%s' is left out from here on: %s: %s", name, type(e).__name__, e)
            self.open.pop(name, None)
            self.names.remove(name)


def _plain(value: object) -> str | float | bool:
    return value if isinstance(value, bool | int | float | str) else str(value)
