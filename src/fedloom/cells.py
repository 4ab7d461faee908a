"""The cells of a comparison: one row at one seed, run once, alone or side by side; a crash costs the others nothing."""

import multiprocessing
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fedloom.errors import AdapterError, BackboneError, FedloomError, MethodError, RecipeError
from fedloom.events import Event, Note, Watch
from fedloom.recipe import Recipe
from fedloom.report.result import OWN_LABELS, STATISTICS, held_out_means
from fedloom.runs import Run, run
from fedloom.store import Store

TRIES = 2  # of a cell that crashes
Figures = Mapping[str, float]
Key = TypeVar("Key")
Found = TypeVar("Found")
Work = Callable[[Recipe, Path, Watch], Found]  # a recipe, the folder of its run


@dataclass(frozen=True)
class Cell:
    """What a finished run is compared by."""

    figures: Figures  # VIEW.TASK.STATISTIC, bytes, and `rank` where a method tells it: the same at every run
    sites: Mapping[str, Mapping[str, float]]  # each site's value, by view
    rounds: Sequence[Mapping[str, Any]]  # evaluated ones: `round` from one, `bytes` so far, `held_out` by task
    seconds: float = 0.0  # of all rounds
    source: str | None = None  # what of fedloom made it, where its run says so


def cell(recipe: Recipe, folder: Path, watch: Watch) -> Cell:
    """What the run of a recipe came to; it is run where it was not."""
    done = Run(folder)
    if not (folder / "summary.json").is_file():
        run(recipe, folder, resume=True, watch=watch)
    views = {view: content for view, content in done.summary["views"].items() if content is not None}
    sites = {view: {name: row["value"] for name, row in content["sites"].items()} for view, content in views.items()}
    kept = figures(done.summary) | _private(folder, done.rounds)
    source = done.summary.get("lineage", {}).get("source")
    return Cell(kept, sites, list(_rounds(done.rounds)), done.summary["seconds"], source)


def figures(summary: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a run by which it is compared, as VIEW.TASK.STATISTIC, and its bytes."""
    found = {
        f"{view}.{task}.{statistic}": values[statistic]
        for view, content in summary["views"].items()
        if content is not None
        for task, values in content["by_task"].items()
        for statistic in (*STATISTICS, OWN_LABELS)
        if statistic in values
    }
    return found | {"bytes_up": summary["bytes_up"], "bytes_down": summary["bytes_down"]}


def each(
    jobs: Mapping[Key, Recipe], work: Work[Found], folder: Path, workers: int, watch: Watch
) -> Iterator[tuple[Key, Found | str]]:
    """What `work` makes of every recipe, or the sentence that says why it makes nothing; equal recipes share a folder.

    workers: processes side by side, one thread each and one for each recipe; 1: this process. The bits are the same.
    """
    if workers == 1:
        for key, recipe in jobs.items():
            watch(Note(str(key)))
            found = attempt(work, recipe, folder_of(recipe, folder), watch)
            if isinstance(found, str):
                watch(Note(found))
            yield key, found
        return
    alike: dict[Path, list[Key]] = {}
    for key, recipe in jobs.items():
        alike.setdefault(folder_of(recipe, folder), []).append(key)
    threads, stopped = ThreadPoolExecutor(workers), threading.Event()
    try:
        started = {threads.submit(_elsewhere, work, jobs[keys[0]], own, stopped): keys for own, keys in alike.items()}
        for done in as_completed(started):
            for key in started[done]:
                found = done.result()
                watch(Note(f"{key}: {found}" if isinstance(found, str) else f"{key}: done"))
                yield key, found
    finally:
        stopped.set()
        threads.shutdown(cancel_futures=True)


def folder_of(recipe: Recipe, folder: Path) -> Path:
    """Where among the cells in `folder` that of a recipe is."""
    return folder / recipe.id[:16]


def attempt(work: Work[Found], recipe: Recipe, folder: Path, watch: Watch) -> Found | str:
    """What `work` makes of a recipe, or why it makes nothing: what fails is tried once more, what cannot run is not."""
    reason = ""
    for _ in range(TRIES):
        try:
            return work(recipe, folder, watch)
        except (AdapterError, BackboneError, MethodError, RecipeError) as e:
            return f"cannot run: {e}"
        except FedloomError as e:
            reason = f"failed: {e}"
        except Exception as e:  # one cell's fault, in whoever's method, must not cost the others
            reason = f"crashed: {type(e).__name__}: {e}"
    return reason


def _elsewhere(work: Work[Found], recipe: Recipe, folder: Path, stopped: threading.Event) -> Found | str:
    """`attempt` in a process of its own, and in another one where that dies."""
    for _ in range(TRIES):
        try:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                return process.submit(attempt, work, recipe, folder, _unwatched).result()
        except BrokenProcessPool:
            if stopped.is_set():
                break
    return "crashed: its process was killed; is there memory for so many --workers?"


def _unwatched(event: Event) -> None:
    """No one sees into another process."""


def _private(folder: Path, lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The bytes of all sites' private states at the end, and the ranks a layer and site that the last round left; what
    is trained on pooled data has no rounds."""
    told = [row.get("method", {}) for line in lines[-1:] for row in line["sites"].values()]
    ranks = [metrics["rank"] for metrics in told if "rank" in metrics]
    held = {"private_bytes": sum(Store(site).held() for site in (folder / "sites").glob("*"))}
    return held | ({"rank": sum(ranks) / len(ranks)} if ranks else {})


def _rounds(lines: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    sent = 0
    for line in lines:
        sent += sum(row.get("bytes_up", 0) + row.get("bytes_down", 0) for row in line["sites"].values())
        if held_out := held_out_means(line):
            yield {"round": line["round"] + 1, "bytes": sent, "held_out": held_out}
