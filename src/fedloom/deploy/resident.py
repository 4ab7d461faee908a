"""A site's end of a federation: it answers messages, one after the other, with its model loaded and its data at hand.

hello         a recipe            -> what this site is, if its policy allows the recipe
ping                              -> that it lives
round         shared              -> its update
evaluate      shared              -> the metrics of what it would serve
personalise   shared, at the end  -> the metrics of what it serves, on its test split

Every message is written down, and what is refused with it. No message makes it stop: what goes wrong is a reply with
the sentence that a person needs.
"""

import contextlib
import logging
import re
import threading
import time
import traceback
from dataclasses import dataclass, replace
from typing import Any

from fedloom import __version__
from fedloom.assembly import alone
from fedloom.deploy.audit import Audit
from fedloom.deploy.policy import SiteConfig, allowed, data_fingerprint
from fedloom.engines.local import Participant
from fedloom.engines.messages import Message, digest, sent
from fedloom.errors import FedloomError, PolicyError, StoreError, UpdateError
from fedloom.federation import End, own_state, site_evaluate, site_round
from fedloom.recipe import Recipe
from fedloom.store import Store, write
from fedloom.tensors import Shared, Tensors, from_bytes
from fedloom.tested import SURE
from fedloom.views import measured

log = logging.getLogger(__name__)

EXPERIMENT = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Fenced(Store):
    """A store that only the process which was greeted last may write: one that was left behind would set it back."""

    token: str = ""

    def claim(self) -> None:
        write(self.folder / "owner", self.token.encode())

    def after(self, round: int, tensors: Tensors) -> None:
        self._mine()
        super().after(round, tensors)

    def personalised(self, tensors: Tensors) -> None:
        self._mine()
        super().personalised(tensors)

    def _mine(self) -> None:
        if (self.folder / "owner").read_text() != self.token:
            raise StoreError("another process of this site has taken the experiment over")


@dataclass(frozen=True)
class Loaded:
    """What a recipe has become at this site."""

    experiment: str
    recipe: Recipe
    own: Participant
    group: str


class Resident:
    """A site that stays loaded from hello to the end of the job."""

    def __init__(self, config: SiteConfig) -> None:
        self.config = config
        self.audit = Audit(config.folder / "audit.log")
        self._loaded: Loaded | None = None
        self._seen: set[str] = set()
        self._one = threading.Lock()  # a round at a time; a ping is answered meanwhile

    def answer(self, message: Message) -> dict[str, Any]:
        """The reply to a message. It bears the message's number, so that it answers no other one."""
        nonce = message.get("nonce")
        reply = {"nonce": nonce if isinstance(nonce, str) else ""}
        if message.get("kind") == "ping":
            return reply
        experiment = str(message.get("experiment", ""))
        try:
            with self._one:
                if reply["nonce"] in self._seen or not reply["nonce"]:
                    raise UpdateError("this message was answered before; it is not answered twice")
                self._seen.add(reply["nonce"])
                return {**reply, **self._answered(message)}
        except FedloomError as e:
            said, noted = str(e), f"refused '{message.get('kind')}' of the server: {e}"
        except Exception as e:
            log.exception("A message of the server could not be answered.")
            last = traceback.extract_tb(e.__traceback__)[-1]
            said = f"it failed with {type(e).__name__}; its own log says where"
            noted = f"failed at '{message.get('kind')}': {e!r} ({last.filename}:{last.lineno})"
        with contextlib.suppress(StoreError):  # a full disk, of which the server is told all the same
            self.audit.note(experiment, noted)
        return {**reply, "error": said}

    def _answered(self, message: Message) -> dict[str, Any]:
        if not (isinstance(name := message.get("experiment"), str) and EXPERIMENT.fullmatch(name)):
            raise UpdateError("the message names no experiment")
        if message.get("kind") == "hello":
            return self._hello(name, message)
        if self._loaded is None or self._loaded.experiment != name:
            raise UpdateError("this site knows no such experiment; it is told of one by hello")
        round, frame = message.get("round"), message.get("frame")
        if not isinstance(round, int) or not isinstance(frame, bytes):
            raise UpdateError("the message has no round, or no tensors")
        if not 0 <= round <= self._loaded.recipe.federation.rounds:
            raise PolicyError(f"there is no round {round} in the recipe that this site was told of")
        self.audit.frame(name, f"came from the server: '{message['kind']}' of round {round + 1}", frame)
        match message.get("kind"):
            case "round":
                return self._round(self._loaded, round, frame)
            case "evaluate":
                return self._evaluate(self._loaded, round, Shared(from_bytes(frame)))
            case "personalise":
                return self._personalise(self._loaded, round, Shared(from_bytes(frame)))
        raise UpdateError(f"this site does not know what '{message.get('kind')}' asks for")

    def _hello(self, experiment: str, message: Message) -> dict[str, Any]:
        text, version, sites, clock = (message.get(key) for key in ("recipe", "version", "sites", "clock"))
        ahead = time.time() - clock if isinstance(clock, float) else 0.0
        if version != __version__:
            raise PolicyError(
                f"the server runs fedloom {version} and this site {__version__}; with unlike versions results would "
                "differ without a word: install the same one."
            )
        if not isinstance(text, str) or not isinstance(sites, int):
            raise UpdateError("the server's hello has no recipe, or no number of sites")
        self.audit.note(experiment, f"came from the server: a recipe, sha256 {digest(text.encode())}, {sites} sites")
        recipe, group = allowed(self.config, text, sites)
        if self._loaded is None or self._loaded.experiment != experiment or self._loaded.recipe != recipe:
            own = alone(recipe, self.config.name, group)
            folder = self.config.folder / "experiments" / experiment
            store = Fenced(folder, recipe.federation.keep + 1, token=str(message["nonce"]))
            store.claim()
            self._loaded = Loaded(experiment, recipe, replace(own, store=store), self.config.data.group)
        own = self._loaded.own
        reply = {
            "version": __version__,
            "device": self.config.device,
            "ahead": ahead,
            "metric": own.site.task.metric,
            "task": self._loaded.group or own.site.task.metric,
            "examples": {split: len(own.split(split)) for split in ("train", "held_out", "test")},
            "held": list(own.store.rounds()),
            "data": data_fingerprint(self.config, repr([own.split(split).examples for split in ("train", "held_out")])),
        }
        self.audit.note(experiment, f"sent to the server: ready, with {reply['examples']} examples")
        return reply

    def _round(self, loaded: Loaded, round: int, frame: bytes) -> dict[str, Any]:
        end = End(loaded.own.store, loaded.recipe.wire)
        update, packed = site_round(loaded.recipe.method, loaded.own.site, end, round, frame)
        self.audit.frame(loaded.experiment, f"sent to the server: update of round {round + 1}", packed)
        return dict(sent(replace(update, metrics=self.config.policy.leaving(update.metrics)), packed))

    def _evaluate(self, loaded: Loaded, round: int, shared: Shared) -> dict[str, Any]:
        own, dataset = loaded.own, loaded.own.site.held_out
        if not len(dataset):
            raise UpdateError("it has no held_out examples")
        private = own_state(own.store.before(round + 1)[1])
        metrics = site_evaluate(loaded.recipe.method, own.site, private, shared, dataset)
        return self._figures(loaded, f"held-out metrics of round {round + 1}", len(dataset), metrics)

    def _personalise(self, loaded: Loaded, rounds: int, shared: Shared) -> dict[str, Any]:
        method, own = loaded.recipe.method, loaded.own
        private = own_state(own.store.before(rounds)[1])
        if epochs := loaded.recipe.training.finetune:
            private = method.personalise(own.site, shared, private, epochs)
            own.store.personalised(private)
        row = measured(method, own, shared, private, own.test)
        metrics = {own.site.task.metric: row["value"]} if row else {}
        metrics |= {name: row[name] for name in SURE if row.get(name) is not None}
        return self._figures(loaded, "test metrics", len(own.test), metrics)

    def _figures(self, loaded: Loaded, what: str, examples: int, metrics: dict[str, float]) -> dict[str, Any]:
        leaving = self.config.policy.leaving(metrics)
        said = ", ".join(f"{name} {value:.6g}" for name, value in leaving.items()) or "none may leave"
        self.audit.note(loaded.experiment, f"sent to the server: {what}: {said}")
        return {"examples": examples, "metrics": leaving}
