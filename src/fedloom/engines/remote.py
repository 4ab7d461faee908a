"""Sites on other machines, over any link that carries messages.

All sites of a round work at the same time, each on its own message. Their replies are taken in roster order, so that
the bits are those of one process. A site that is silent at the deadline is left out of the round; what it sends later
is counted, and not used.
"""

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Thread
from typing import Protocol, TypeVar

from fedloom.engines.messages import Message, digest, figures, moved, received
from fedloom.errors import LinkError, UpdateError
from fedloom.federation import longest, visible
from fedloom.methods import Method
from fedloom.site import Answer, Reply, Silence, Update
from fedloom.tensors import Shared, to_bytes
from fedloom.wire import Wire

T = TypeVar("T")
MISSED = 3  # pings in a row without an answer, after which a site counts as lost


class Link(Protocol):
    """Carries a message to a site, and its reply back."""

    def ask(self, site: str, message: Message, seconds: float) -> Message:
        """The reply; raises LinkError where none comes within so many seconds."""


@dataclass(frozen=True)
class Limits:
    """What a server takes, and how long it waits."""

    deadline: float = 3600.0  # seconds that a site has for its answer
    beat: float = 5.0  # seconds between two pings of a site that is at work, and that a ping may take
    patience: float = 60.0  # seconds until a site that does not answer at the start counts as not there
    bytes: int = 2**31  # of one update
    norm: float | None = None  # how far an update may be from what its site was given


@dataclass(frozen=True)
class RemoteEngine:
    """An engine over a link.

    seen: is told of everything that came of a message, for an audit log: the site, and a sentence
    """

    link: Link
    experiment: str
    method: Method
    wire: Wire = field(default_factory=Wire)
    limits: Limits = Limits()
    seen: Callable[[str, str], None] = lambda site, text: None
    lost: dict[str, str] = field(default_factory=dict)  # sites that no longer answer a ping, and since when
    refused: dict[str, str] = field(default_factory=dict)  # sites that take no part, and why
    absent: set[str] = field(default_factory=set)  # sites that were not there at the start, and were not greeted
    given_up: set[str] = field(default_factory=set)  # lost sites that a whole deadline was waited for
    late: dict[str, int] = field(default_factory=dict)  # by site: answers that came after the deadline

    def ready(self, sites: Sequence[str]) -> tuple[str, ...]:
        """The sites that answer a ping before patience ends; the others count as lost."""
        until, waiting = time.monotonic() + self.limits.patience, list(sites)
        while waiting and time.monotonic() < until:
            pings = {site: _started(partial(self._pinged, site)) for site in waiting}
            waiting = [site for site, ping in pings.items() if not ping.result()]
            time.sleep(min(1.0, self.limits.beat) if waiting else 0)
        self.absent.update(waiting)
        for site in waiting:
            self.lost[site] = f"it was not there within {self.limits.patience:g} s"
            self.seen(site, self.lost[site])
        return tuple(site for site in sites if site not in waiting)

    def round(self, round: int, shared: Shared, sites: Sequence[str]) -> Iterator[Reply]:
        given, most = visible(shared), longest(shared, self.method)
        frame = self.wire.give(given)
        for site, reply, seconds in self.ask("round", sites, {"round": round, "frame": frame}):
            if isinstance(reply, Silence):
                yield reply
                continue
            try:
                update, packed = received(site, reply, self.limits.bytes)
                update = replace(update, tensors=self.wire.receive(site, packed, given, most))
                self._near(site, update, shared)
            except UpdateError as e:
                self.seen(site, f"refused in round {round + 1}: {e}")
                yield Silence(site, f"refused: {e}")
                continue
            self.seen(site, f"came: update of round {round + 1}: {_size(packed)}")
            yield Answer(site, update, len(packed), len(frame), seconds)

    def evaluate(self, round: int, shared: Shared, split: str, sites: Sequence[str]) -> Iterator[Reply]:
        message = {"round": round, "split": split, "frame": to_bytes(visible(shared))}
        yield from self._measured("evaluate", sites, message)

    def personalise(self, rounds: int, shared: Shared, sites: Sequence[str]) -> Iterator[Reply]:
        """The metrics of what each site serves after the last round, on its test split; fine-tuned where the recipe
        says so."""
        yield from self._measured("personalise", sites, {"round": rounds, "frame": to_bytes(visible(shared))})

    def ask(self, kind: str, sites: Sequence[str], message: Message) -> Iterator[tuple[str, Message | Silence, float]]:
        """Send all of these sites a message of one kind; what came of it, in their order, and after how many seconds.

        A reply answers one question: it bears the number that its message bore.
        """
        self._look_again(sites)
        nonces = {site: secrets.token_hex(16) for site in sites}
        own = {site: {**message, "kind": kind, "experiment": self.experiment, "nonce": nonces[site]} for site in sites}
        began = time.monotonic()
        tasks = {
            site: _started(partial(self.link.ask, site, own[site], self._longest))
            for site in sites
            if site not in self.lost and site not in self.refused
        }
        if frame := message.get("frame"):
            size = _size(frame)
            for site in tasks:
                self.seen(site, f"sent '{kind}' of round {message['round'] + 1}: {size}")
        missed = dict.fromkeys(tasks, 0)
        for site in sites:
            reply = self._awaited(site, tasks, missed, began + self.limits.deadline)
            tasks.pop(site, None)  # a frame is not held longer than it takes to fold it
            if not isinstance(reply, Silence):
                reply = self._checked(site, reply, nonces[site])
            if isinstance(reply, Silence):
                self.seen(site, f"no answer to '{kind}': {reply.reason}")
            yield site, reply, time.monotonic() - began

    @property
    def _longest(self) -> float:
        """Seconds after which a late answer is no longer waited for to be counted."""
        return 2 * self.limits.deadline

    def _awaited(
        self, site: str, tasks: Mapping[str, "Future[Message]"], missed: dict[str, int], until: float
    ) -> Message | Silence:
        if site in self.refused:
            return Silence(site, self.refused[site])
        if site not in tasks:
            return self._gone(site, until)
        task = tasks[site]
        while (left := until - time.monotonic()) > 0:
            wait([task], min(left, self.limits.beat))
            if task.done():
                break
            self._ping([name for name, other in tasks.items() if not other.done()], missed)
        if not task.done():
            task.add_done_callback(lambda done: self._came_late(site, done))
            if site in self.lost:
                self.given_up.add(site)
            return Silence(site, self.lost.get(site, f"no answer within {self.limits.deadline:g} s"))
        if (error := task.exception()) is None:
            self.lost.pop(site, None)
            return task.result()
        if not isinstance(error, LinkError):
            raise error
        self.lost.setdefault(site, str(error))
        return self._gone(site, until)

    def _gone(self, site: str, until: float) -> Silence:
        """A lost site is waited for once: it may be started again, and what goes on here with it."""
        while site not in self.given_up and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, self.limits.beat))
        self.given_up.add(site)
        return Silence(site, self.lost[site])

    def _ping(self, sites: Sequence[str], missed: dict[str, int]) -> None:
        pings = {site: _started(partial(self._pinged, site)) for site in sites}
        for site, ping in pings.items():
            missed[site] = 0 if ping.result() else missed[site] + 1
            if not missed[site]:
                self.lost.pop(site, None)
            elif missed[site] == MISSED:
                self.lost[site] = f"it has not answered {MISSED} pings"
                self.seen(site, self.lost[site])

    def _pinged(self, site: str) -> bool:
        try:
            message = {"kind": "ping", "experiment": self.experiment, "nonce": secrets.token_hex(16)}
            return self.link.ask(site, message, self.limits.beat).get("nonce") == message["nonce"]
        except LinkError:
            return False

    def _look_again(self, sites: Sequence[str]) -> None:
        for site in sites:
            if site in self.lost and site not in self.absent and self._pinged(site):
                del self.lost[site]
                self.given_up.discard(site)

    def _checked(self, site: str, reply: Message, nonce: str) -> Message | Silence:
        if reply.get("nonce") != nonce:
            return Silence(site, "refused: its reply is to another message")
        return Silence(site, str(reply["error"])) if "error" in reply else reply

    def _came_late(self, site: str, done: "Future[Message]") -> None:
        if done.exception() is None:
            self.late[site] = self.late.get(site, 0) + 1
            self.seen(site, "its answer came after the deadline, and was not used")

    def _near(self, site: str, update: Update, shared: Shared) -> None:
        if self.limits.norm is not None and not (far := moved(update.tensors, shared)) <= self.limits.norm:
            raise UpdateError(
                f"site '{site}' sent an update {far:.3g} from what it was given, and {self.limits.norm:g} is allowed."
            )

    def _measured(self, kind: str, sites: Sequence[str], message: Message) -> Iterator[Reply]:
        for site, reply, seconds in self.ask(kind, sites, message):
            if isinstance(reply, Silence):
                yield reply
                continue
            try:
                examples, metrics = reply.get("examples"), figures(site, reply)
                if not isinstance(examples, int):
                    raise UpdateError(f"site '{site}' did not say how many examples its metrics are of.")
            except UpdateError as e:
                yield Silence(site, f"refused: {e}")
                continue
            yield Answer(site, Update(Shared({}), 0.0, examples, metrics), seconds=seconds)


def _size(frame: bytes) -> str:
    return f"{len(frame):,} bytes, sha256 {digest(frame)}"


def _started(work: Callable[[], T]) -> "Future[T]":
    """A thread that nobody has to wait for, as a pool's would have to be when the process ends."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as e:
            future.set_exception(e)

    Thread(target=run, daemon=True).start()
    return future
