"""The two classes that a job names, and that are all that a site or a server lets a job name."""

import base64
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedloom.deploy.conduct import Experiment, Standing, conduct
from fedloom.deploy.policy import load_limits, load_site
from fedloom.deploy.resident import EXPERIMENT, Resident
from fedloom.engines.messages import Message
from fedloom.engines.nvflare import FlareLink, Leading, Listening, settled
from fedloom.errors import FedloomError, RecipeError
from fedloom.events import Began, Ended, Event, Note, Replied
from fedloom.recipe import Recipe, parsed
from fedloom.runs import MAY_CHANGE
from fedloom.site import Silence
from fedloom.store import write

LINGER = 60.0  # seconds in which the coordinator may fetch what came out
CHUNK = 2**20  # bytes of a file in one answer to the coordinator


class SiteEnd(Listening):
    """A site's part of a job. It takes no arguments: all that it does is in the site's own file."""

    def open(self, kit: Path) -> Callable[[Message], dict[str, Any]]:
        resident = Resident(load_site(kit / "local" / "site.toml"))

        def answer(message: Message) -> dict[str, Any]:
            reply = resident.answer(message)
            if message.get("kind") == "hello":
                settled()
            return reply

        return answer


class ServerEnd(Leading):
    """The server's part of a job: one segment of an experiment."""

    def __init__(self, experiment: str, recipe: str, roster: list[str]) -> None:
        super().__init__()
        if not EXPERIMENT.fullmatch(experiment):
            raise RecipeError(f"'{experiment}' is no experiment's id.")
        self.experiment, self.recipe, self.roster = experiment, recipe, roster
        self.events: list[dict[str, Any]] = []
        self.state: dict[str, Any] = {}
        self.standing = Standing()
        self.folder = Path()
        self.fetched = threading.Event()

    def lead(self, kit: Path, link: FlareLink, aborted: Callable[[], bool]) -> None:
        try:
            self.folder = kit / "experiments" / self.experiment
            recipe = parsed(self.recipe, "the recipe")
            self._same(recipe)
            write(self.folder / "recipe.toml", self.recipe.encode())
            limits = load_limits(kit / "local" / "server.toml", recipe.federation.deadline)
            experiment = Experiment(self.experiment, recipe, tuple(self.roster), self.folder)
            result = conduct(experiment, link, limits, self._watch, self.standing)
            self.state |= {"result": result}
        except FedloomError as e:
            self.state |= {"error": str(e)}
        except Exception as e:
            self.state |= {"error": f"the server failed with {type(e).__name__}: {e}; its log says where"}
            traceback.print_exc()
        until = time.monotonic() + LINGER
        while time.monotonic() < until and not (aborted() or self.fetched.wait(0.1)):
            pass

    def _same(self, recipe: Recipe) -> None:
        """An experiment keeps its recipe; only its rounds may grow."""
        if (path := self.folder / "recipe.toml").is_file():
            changed = set(recipe.difference(parsed(path.read_text(), str(path)))) - MAY_CHANGE
            if changed:
                raise RecipeError(f"the experiment was begun with another recipe: {min(changed)} differs.")

    def told(self, question: dict[str, Any]) -> dict[str, Any]:
        """after: events from this number on; file, offset: a part of a file of the experiment; fetched: it is done"""
        if question.get("fetched"):
            self.fetched.set()
        if name := question.get("file"):
            return self._part(str(name), int(question.get("offset", 0)))
        after = int(question.get("after", 0))
        files = sorted(str(path.relative_to(self.folder)) for path in self._files()) if "result" in self.state else []
        return {
            "events": self.events[after:],
            "files": files,
            "lost": dict(self.standing.lost),
            "said": dict(self.standing.said),
            **self.state,
        }

    def _files(self) -> list[Path]:
        return [self.folder / "rounds.jsonl", *(self.folder / "server").glob("[0-9]*.safetensors")]

    def _part(self, name: str, offset: int) -> dict[str, Any]:
        path = self.folder / name
        if path not in self._files():
            return {"error": f"there is no file '{name}'"}
        with path.open("rb") as file:
            file.seek(offset)
            part = file.read(CHUNK)
        return {"part": base64.b64encode(part).decode(), "size": path.stat().st_size}

    def _watch(self, event: Event) -> None:
        self.events.append(to_json(event))
        if isinstance(event, Began):
            settled()


def to_json(event: Event) -> dict[str, Any]:
    """An event, as it crosses from the server to the coordinator."""
    match event:
        case Note(text):
            return {"note": text}
        case Began(stage, first, rounds, sites):
            return {"began": [stage, first, rounds, sites]}
        case Replied(stage, round, reply):
            return {"replied": [stage, round, reply.site, reply.reason if isinstance(reply, Silence) else None]}
        case Ended(stage, line):
            return {"ended": [stage, dict(line)]}
