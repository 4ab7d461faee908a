"""The coordinator's end: it submits an experiment, shows how it goes on, and submits it again after a fault.

A job of FLARE's is one segment of an experiment. It ends when a site's process dies, or the server; and it is ended
here when a site that was lost is back. The next one goes on where the last checkpoint is.
"""

import base64
import contextlib
import json
import secrets
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedloom import __version__
from fedloom.assembly import planned
from fedloom.deploy.conduct import deployable
from fedloom.deploy.kits import SERVER_END, SITE_END, approved, needs_nvflare
from fedloom.deploy.look import remember
from fedloom.deploy.session import Session
from fedloom.errors import LinkError, RunError
from fedloom.events import Began, Ended, Event, Note, Replied, Watch
from fedloom.recipe import Recipe
from fedloom.runs import WRITTEN, Run, checked, ended
from fedloom.site import Answer, Silence, Update
from fedloom.store import write
from fedloom.tensors import Shared

ATTEMPTS = 5  # segments in a row in which no round ended
POLL = 0.5  # seconds
HEARTBEAT = 40.0  # seconds in which a server hears of every site that is connected


@dataclass(frozen=True)
class Consortium:
    """The coordinator's project, and how patient to be."""

    project: Path
    patience: float = 120.0  # seconds for a server that is away, and for sites before a segment begins


def run_across(recipe: Recipe, consortium: Consortium, out: Path, resume: bool, watch: Watch) -> Run:
    """Run a recipe across the sites of a project, into the folder that a simulation would leave.

    raises RunError: the server or the sites say why it cannot go on; what was reached is kept for --resume
    """
    needs_nvflare()
    recipe = planned(recipe.altered({"federation.engine": "nvflare"}))
    deployable(recipe)
    roster = tuple(sorted(approved(consortium.project)))
    if not roster:
        raise RunError(f"no site was approved in '{consortium.project}' yet: fedloom deploy approve.")
    folder = checked(out, recipe, resume)
    done = Run(folder)
    if done.finished and done.recipe.federation.rounds == recipe.federation.rounds:
        return done
    write(folder / "recipe.toml", f"{WRITTEN} {__version__}\n{recipe.dump()}".encode())
    experiment = _experiment(folder)
    lines: dict[int, Any] = {}

    def watched(event: Event) -> None:
        if isinstance(event, Ended):
            lines[event.line["round"]] = event.line
            kept = [lines[round] for round in sorted(lines) if round <= event.line["round"]]
            write(folder / "rounds.jsonl", "".join(json.dumps(line) + "\n" for line in kept).encode())
        watch(event)

    with tempfile.TemporaryDirectory() as scratch, Session(consortium.project / "coordinator") as session:
        job = definition(Path(scratch), experiment, recipe, roster)
        result = _supervised(session, job, roster, consortium, folder, watched)
    return ended(folder, recipe, result)


def definition(folder: Path, experiment: str, recipe: Recipe, roster: tuple[str, ...]) -> Path:
    """Write a job: three JSON files that name our two classes, and nothing else."""
    job = folder / f"fedloom-{experiment[:8]}"
    text = recipe.altered({"federation.engine": "nvflare"}).dump()
    server = {"experiment": experiment, "recipe": text, "roster": list(roster)}
    files: dict[str, Any] = {
        "meta.json": {"name": job.name, "resource_spec": {}, "min_clients": 1, "deploy_map": {"app": ["@ALL"]}},
        "app/config/config_fed_server.json": {
            "format_version": 2,
            "workflows": [{"id": "fedloom", "path": SERVER_END, "args": server}],
        },
        "app/config/config_fed_client.json": {
            "format_version": 2,
            "executors": [{"tasks": ["none"], "executor": {"path": SITE_END, "args": {}}}],
        },
    }
    for name, content in files.items():
        write(job / name, json.dumps(content, indent=2).encode())
    return job


@dataclass(frozen=True)
class Broken:
    """A segment that ended before the experiment did, and why."""

    why: str


def _supervised(
    session: Session, job: Path, roster: tuple[str, ...], consortium: Consortium, folder: Path, watch: Watch
) -> Mapping[str, Any]:
    barren = 0
    while True:
        _gathered(session, roster, consortium.patience, watch)
        segment = _Segment(session, _only(session, job, folder), consortium.patience, watch)
        try:
            outcome = segment.followed()
        except KeyboardInterrupt:
            session.abort(segment.job)
            raise
        if not isinstance(outcome, Broken):
            for name in outcome["files"]:
                write(folder / name, segment.fetched(name))
            session.ask(segment.job, {"fetched": True})
            remember(consortium.project, outcome["said"])
            result: Mapping[str, Any] = outcome["result"]
            return result
        barren = 0 if segment.rounds else barren + 1
        if barren == ATTEMPTS:
            raise RunError(f"{ATTEMPTS} times in a row no round came to its end; the last time {outcome.why}.")
        watch(Note(f"{outcome.why}; going on from the last checkpoint"))


def _only(session: Session, job: Path, folder: Path) -> str:
    """Submit a job, when the one before it has ended: two at once would set each other back."""
    before = folder / "job"
    if before.is_file():
        session.end(before.read_text())
    name = session.submit(job)
    write(before, name.encode())
    return name


def _gathered(session: Session, roster: tuple[str, ...], patience: float, watch: Watch) -> None:
    """Wait for the sites that are expected; a segment begins without those that do not come."""
    until, told = time.monotonic() + patience, False
    while absent := [site for site in roster if site not in session.sites()]:
        if time.monotonic() > until:
            if len(absent) == len(roster):
                raise LinkError(f"none of the sites {', '.join(roster)} is connected to the server.")
            watch(Note(f"beginning without {', '.join(absent)}"))
            return
        if not told:
            watch(Note(f"waiting for {', '.join(absent)}"))
            told = True
        time.sleep(POLL)


class _Segment:
    """One job, followed."""

    def __init__(self, session: Session, job: str, patience: float, watch: Watch) -> None:
        self.session, self.job, self.patience, self.watch = session, job, patience, watch
        self.rounds = 0  # that ended in it
        self.lost: dict[str, float] = {}  # by lost site: when the server had last heard of it

    def followed(self) -> dict[str, Any] | Broken:
        """What came out of the experiment, or why the segment ended before it."""
        after, running, began = 0, False, time.monotonic()
        while True:
            told = self.session.ask(self.job, {"after": after})
            if told is None:
                status = self.session.status(self.job)
                if status.startswith("FINISHED") or running:
                    return Broken(f"the job ended early ({status.lower()})")
                if time.monotonic() - began > self.patience:
                    return Broken(f"the job did not begin within {self.patience:g} s ({status.lower()})")
                time.sleep(POLL)
                continue
            running = True
            for event in map(_event, told["events"]):
                self.rounds += isinstance(event, Ended)
                self.watch(event)
            after += len(told["events"])
            if "error" in told:
                with contextlib.suppress(LinkError):
                    self.session.ask(self.job, {"fetched": True})
                if back := self._coming_back(told["lost"]):
                    return Broken(f"{', '.join(back)} is back")
                raise RunError(f"{told['error'].rstrip('.')}. Go on with --resume.")
            if "result" in told:
                return told
            if back := self._back(told["lost"]):
                return Broken(f"{', '.join(back)} is back")
            time.sleep(POLL)

    def fetched(self, name: str) -> bytes:
        """A file of the experiment at the server."""
        whole = bytearray()
        while True:
            told = self.session.ask(self.job, {"file": name, "offset": len(whole)})
            if told is None or "part" not in told:
                raise LinkError(f"the server did not send '{name}'; what it is, is safe there: go on with --resume.")
            whole += base64.b64decode(told["part"])
            if len(whole) >= told["size"]:
                return bytes(whole)

    def _coming_back(self, lost: Mapping[str, str]) -> list[str]:
        """As `_back`, for as long as a site that is there needs to be heard of."""
        until = time.monotonic() + HEARTBEAT
        while lost and time.monotonic() < until:
            if back := self._back(lost):
                return back
            time.sleep(POLL)
        return []

    def _back(self, lost: Mapping[str, str]) -> list[str]:
        """Lost sites of which the server has heard since."""
        if not lost:
            self.lost = {}
            return []
        heard = self.session.sites()
        self.lost = {site: self.lost.get(site, heard.get(site, 0.0)) for site in lost}
        return [site for site, before in self.lost.items() if heard.get(site, 0.0) > before]


def _experiment(folder: Path) -> str:
    path = folder / "experiment"
    if not path.is_file():
        write(path, secrets.token_hex(16).encode())
    return path.read_text()


def _event(told: Mapping[str, Any]) -> Event:
    match told:
        case {"began": [stage, first, rounds, sites]}:
            return Began(stage, first, rounds, sites)
        case {"replied": [stage, round, site, None]}:
            return Replied(stage, round, Answer(site, Update(Shared({}), 0.0, 0)))
        case {"replied": [stage, round, site, reason]}:
            return Replied(stage, round, Silence(site, reason))
        case {"ended": [stage, line]}:
            return Ended(stage, line)
    return Note(str(told.get("note", told)))
