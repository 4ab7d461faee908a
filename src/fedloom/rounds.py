"""The rounds of a run on disk: a checkpoint and a line after each, and the newest place to go on from."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedloom.assembly import Federation, site_folder
from fedloom.engines.local import LocalEngine, Participant
from fedloom.errors import RunError
from fedloom.events import Began, Ended, Note, Replied, Watch
from fedloom.federation import Engine, Round, Schedule, federate, own_state, visible
from fedloom.methods import Method, Pooled
from fedloom.sections import Federation as Options
from fedloom.site import Answer, Reply
from fedloom.store import Store, write
from fedloom.tensors import Private, Shared

NEWCOMER_EPOCHS = 1


@dataclass(frozen=True)
class Course:
    """The rounds of a method: by which engine, and what is known of each site."""

    stage: str
    method: Method
    engine: Engine
    schedule: Schedule
    options: Options
    kinds: Mapping[str, str]  # by site: under what its figures are averaged
    metrics: Mapping[str, str]  # by site: its task's own metric
    held: Callable[[str], Sequence[int]]  # the rounds of which a site holds a state


def train(
    stage: str, method: Method, federation: Federation, folder: Path, watch: Watch
) -> tuple[Shared, dict[str, Private]]:
    """All rounds of a method in this process, and what each site does after the last."""
    schedule, engine = federation.schedule, federation.engine(method, folder)
    if isinstance(method, Pooled):
        watch(Note(f"{stage}: all training data at one place"))
        return _pooled(method, engine, Store(folder / "server", federation.recipe.federation.keep), federation)
    course = Course(
        stage,
        method,
        engine,
        schedule,
        federation.recipe.federation,
        {name: own.kind for name, own in engine.participants.items()},
        {name: own.site.task.metric for name, own in engine.participants.items()},
        lambda name: engine.participants[name].store.rounds(),
    )

    def start() -> Shared:
        return method.start(federation.model, federation.task, len(schedule.roster), schedule.seed)

    shared = follow(course, start, folder, watch)
    return shared, _personalised(method, engine, shared, federation)


def follow(course: Course, start: Callable[[], Shared], folder: Path, watch: Watch) -> Shared:
    """All rounds of a course, from its newest checkpoint: `shared` after the last.

    start: makes what the first round begins with
    """
    schedule, options = course.schedule, course.options
    checkpoints = Store(folder / "server", options.keep)
    last, shared = _resumed(checkpoints, course, lines := lines_of(folder))
    lines = lines[: last + 1]
    if last < 0:
        shared = start()
    else:
        checkpoints.trim(last)
    watch(Began(course.stage, last + 1, schedule.rounds, len(schedule.roster)))
    watched = _Watched(course.engine, course.stage, watch)
    for done in federate(course.method, watched, shared, schedule, last + 1):
        shared = done.shared
        due = options.evaluate_every and (done.round + 1) % options.evaluate_every == 0
        lines.append(_line(done, course.kinds, _held_out(course, done) if due else {}))
        # The line first: after a kill between the two the round is run again, and says the same.
        write(folder / "rounds.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
        checkpoints.after(done.round, shared)
        watch(Ended(course.stage, lines[-1]))
    return shared


def _pooled(
    method: Pooled, engine: LocalEngine, checkpoints: Store, federation: Federation
) -> tuple[Shared, dict[str, Private]]:
    """No rounds, only what they would leave."""
    schedule, participants = federation.schedule, engine.participants.values()
    start = method.start(federation.model, federation.task, len(participants), schedule.seed)
    shared, privates = method.train([own.site for own in participants], start, schedule.rounds, schedule.seed)
    checkpoints.after(schedule.rounds - 1, shared)
    for own, private in zip(participants, privates, strict=True):
        own.store.after(schedule.rounds - 1, private)
    return shared, _personalised(method, engine, shared, federation)


def newcomers(method: Method, federation: Federation, shared: Shared, folder: Path) -> dict[str, Private]:
    """What the sites that come after the last round make of the shared adapter, kept in their folders."""
    privates = {name: arrived(method, own, shared) for name, own in federation.newcomers.items()}
    for name, private in privates.items():
        Store(site_folder(folder, name)).personalised(private)
    return privates


def arrived(method: Method, own: Participant, shared: Shared) -> Private:
    """One of them: its head is fitted, then it trains an epoch."""
    return method.personalise(own.site, visible(shared), Private({}), NEWCOMER_EPOCHS)


def _resumed(checkpoints: Store, course: Course, lines: Sequence[Mapping[str, Any]]) -> tuple[int, Shared]:
    """The newest round after which server and sites have all that it left; later ones are run again."""
    last, tensors = checkpoints.before(len(lines))
    for name in course.schedule.roster:
        answered = [line["round"] for line in lines[: last + 1] if line["sites"].get(name, {}).get("answered")]
        if answered and max((r for r in course.held(name) if r <= last), default=-1) < answered[-1]:
            return _resumed(checkpoints, course, lines[: answered[-1]])
    return last, Shared(tensors)


def _personalised(method: Method, engine: LocalEngine, shared: Shared, federation: Federation) -> dict[str, Private]:
    privates = {}
    for name, own in engine.participants.items():
        private = own_state(own.store.before(federation.schedule.rounds)[1])
        if epochs := federation.recipe.training.finetune:
            private = method.personalise(own.site, visible(shared), private, epochs)
            own.store.personalised(private)
        privates[name] = private
    return privates


@dataclass(frozen=True)
class _Watched:
    """An engine whose replies are seen as they pass."""

    engine: Engine
    stage: str
    watch: Watch

    def round(self, round: int, shared: Shared, sites: Sequence[str]) -> Iterator[Reply]:
        for reply in self.engine.round(round, shared, sites):
            self.watch(Replied(self.stage, round, reply))
            yield reply

    def evaluate(self, round: int, shared: Shared, split: str, sites: Sequence[str]) -> Iterator[Reply]:
        return self.engine.evaluate(round, shared, split, sites)


def _held_out(course: Course, done: Round) -> dict[str, float]:
    replies = course.engine.evaluate(done.round, done.shared, "held_out", done.asked)
    metrics = {reply.site: reply.update.metrics for reply in replies if isinstance(reply, Answer)}
    return {site: own[course.metrics[site]] for site, own in metrics.items() if course.metrics[site] in own}


def _line(done: Round, kinds: Mapping[str, str], held_out: Mapping[str, float]) -> dict[str, Any]:
    sites: dict[str, Any] = {}
    for name in done.asked:
        measured = {"task": kinds[name], "metric": held_out.get(name)}
        if (answer := done.answers.get(name)) is not None:
            sites[name] = {
                "answered": True,
                "examples": answer.update.examples,
                "loss": _finite(answer.update.metrics.get("loss")),
                **measured,
                "bytes_up": answer.bytes_up,
                "bytes_down": answer.bytes_down,
                "method": {name: _finite(x) for name, x in answer.update.metrics.items() if name != "loss"},
            }
        else:
            sites[name] = {"answered": False, "reason": done.silent.get(name, "no reply"), **measured}
    return {
        "round": done.round,
        "seconds": done.seconds,
        "sites": sites,
        "method": {name: _finite(x) for name, x in done.metrics.items()},
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def totals(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Bytes and seconds of all rounds, and who answered in each.

    bytes_site: what the site that moved most moved in a round, both ways, the mean over rounds: a round waits for it
    """
    rows = [row for line in lines for row in line["sites"].values()]
    moved = [[row.get("bytes_up", 0) + row.get("bytes_down", 0) for row in line["sites"].values()] for line in lines]
    return {
        "bytes_up": sum(row.get("bytes_up", 0) for row in rows),
        "bytes_down": sum(row.get("bytes_down", 0) for row in rows),
        "bytes_site": sum(max(own, default=0) for own in moved) / max(1, len(moved)),
        "seconds": sum(line["seconds"] for line in lines),
        "roster": [
            {
                "round": line["round"],
                "answered": [name for name, row in line["sites"].items() if row["answered"]],
                "silent": {name: row["reason"] for name, row in line["sites"].items() if not row["answered"]},
            }
            for line in lines
        ],
    }


def summary_of(folder: Path) -> dict[str, Any] | None:
    """A run's summary.json, None where there is none yet; raises RunError where it is damaged."""
    path = folder / "summary.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("rounds"), int):
        raise RunError(f"'{path}' is damaged; remove it, and --resume writes it again.")
    return found


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's rounds.jsonl; raises RunError where it is damaged."""
    path = folder / "rounds.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    except ValueError as e:
        raise RunError(f"'{path}' is damaged ({e}); delete it, and --resume starts the run anew.") from e
