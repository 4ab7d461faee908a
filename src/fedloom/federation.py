"""The rounds of a federation, over any engine."""

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from fedloom.data import Dataset
from fedloom.errors import QuorumError, UpdateError
from fedloom.methods import Method
from fedloom.places import Symmetry
from fedloom.site import Answer, Reply, Site, Update
from fedloom.store import Store
from fedloom.tensors import Private, Shared, Tensors, at, generator, not_finite, under, without
from fedloom.wire import Wire

log = logging.getLogger(__name__)

HEADER = 256  # bytes: what a frame says of a tensor, beside its name and its numbers


class Engine(Protocol):
    """Decides where values live. Methods never know which one runs them."""

    def round(self, round: int, shared: Shared, sites: Sequence[str]) -> Iterator[Reply]:
        """Send `shared` to these sites; their replies, in the order of `sites`."""

    def evaluate(self, round: int, shared: Shared, split: str, sites: Sequence[str]) -> Iterator[Reply]:
        """The metrics, in Answer.update, of what each site would serve after a round, on its own `split`."""


@dataclass(frozen=True)
class Schedule:
    """How many rounds, and who takes part."""

    roster: tuple[str, ...]  # every site, in the order in which answers are folded
    rounds: int
    seed: int = 0
    participation: float = 1.0  # share of the roster asked in a round
    quorum: float = 1.0  # share of the asked that must answer
    joins: Mapping[str, int] = field(default_factory=dict)  # the first round of sites that come late

    def asked(self, round: int) -> tuple[str, ...]:
        """Who is asked in a round: a function of (seed, round), in roster order."""
        present = [name for name in self.roster if self.joins.get(name, 0) <= round]
        n = max(1, math.ceil(self.participation * len(present) - 1e-9))
        drawn = torch.randperm(len(present), generator=generator(self.seed, "participants", round))[:n]
        return tuple(present[i] for i in sorted(drawn.tolist()))


@dataclass(frozen=True)
class Round:
    """What came of one round."""

    round: int
    shared: Shared
    asked: tuple[str, ...]
    answers: Mapping[str, Answer]  # by site, without their tensors, which are folded and dropped
    silent: Mapping[str, str]  # why, by site
    metrics: Mapping[str, float]  # the method's diagnostics
    seconds: float


@dataclass(frozen=True)
class End:
    """A site's end of the wire: what it packs by, and where it keeps its state."""

    store: Store
    wire: Wire = field(default_factory=Wire)


def visible(shared: Shared) -> Shared:
    """What of `shared` a site gets to see: all but the server's own state."""
    return Shared(without("server", shared))


def own_state(kept: Tensors) -> Private:
    """What of the state that a site keeps is its method's: all but what the wire left out."""
    return Private(without("wire", kept))


def site_round(method: Method, site: Site, end: End, round: int, frame: bytes) -> tuple[Update, bytes]:
    """One site's part of a round, which every engine runs: the server's frame in; an update without its tensors and the
    frame that holds them out. Asking twice gives the same update.

    raises UpdateError: the server's frame cannot be read, or the site's has no room in the budget
    """
    shared, (_, kept) = end.wire.given(frame), end.store.before(round)
    update, private = method.local_round(round, site, shared, own_state(kept))
    packed, left = end.wire.send(site.name, update.tensors, shared, under("wire", kept))
    end.store.after(round, {**private, **at("wire", left)})
    return replace(update, tensors=Shared({})), packed


def site_evaluate(method: Method, site: Site, private: Private, shared: Shared, dataset: Dataset) -> dict[str, float]:
    """The task's metrics of what the site serves, on one of its data sets."""
    logits = predict(method, site, private, shared, dataset)
    targets = site.task.targets([example.label for example in dataset.examples])
    return dict(site.task.metrics(logits, targets))


@torch.no_grad()
def predict(method: Method, site: Site, private: Private, shared: Shared, dataset: Dataset) -> Tensor:
    """Logits (n, labels) of what the site serves."""
    serve = method.serve(site, visible(shared), private)
    return torch.cat([serve(batch) for batch in site.passes(dataset)])


def federate(method: Method, engine: Engine, shared: Shared, schedule: Schedule, first: int = 0) -> Iterator[Round]:
    """Run the rounds `first` ... `schedule.rounds - 1`, yielding each as it ends.

    raises QuorumError: too few of the asked sites answered; the round is not counted, and `shared` stays what it was
    """
    for round in range(first, schedule.rounds):
        began = time.perf_counter()
        asked = schedule.asked(round)
        answers: dict[str, Answer] = {}
        silent: dict[str, str] = {}
        admitted = _admitted(engine.round(round, shared, asked), asked, shared, method, answers, silent)
        if (one := next(admitted, None)) is not None:  # a method is never asked to fold nothing
            following, metrics = method.aggregate(shared, chain([one], admitted))
        for _ in admitted:  # a method may have no use for them, and an engine waits until they are taken
            pass
        _require(schedule, round, asked, answers, silent)
        shared = following
        yield Round(round, shared, asked, answers, silent, metrics, time.perf_counter() - began)


def _admitted(
    replies: Iterable[Reply],
    asked: Sequence[str],
    shared: Shared,
    method: Method,
    answers: dict[str, Answer],
    silent: dict[str, str],
) -> Iterator[Answer]:
    """The answers among the replies that may be folded; what is known of each site is noted on the way."""
    for reply in replies:
        if reply.site not in asked or reply.site in answers:
            log.warning("A reply of site '%s' was dropped: it was not asked, or has answered.", reply.site)
            continue
        try:
            if isinstance(reply, Answer):
                admit(reply, shared, method)
                bare = Update(Shared({}), reply.update.weight, reply.update.examples, reply.update.metrics)
                answers[reply.site] = Answer(reply.site, bare, reply.bytes_up, reply.bytes_down, reply.seconds)
                yield reply
            else:
                silent[reply.site] = reply.reason
        except UpdateError as e:
            silent[reply.site] = f"refused: {e}"


def admit(answer: Answer, shared: Shared, method: Method) -> None:
    """Nothing that a site sends is trusted: names, shapes, dtypes and finiteness are those of `shared`, or it is
    refused. What is given/ in `shared` does not come back.

    A method whose `any_width` is true may be sent adapters of another width: the axes that its adapter's symmetry names
    may differ, alike in all tensors of a place, and up to the width of the layer.

    raises UpdateError: naming the site
    """
    expected = without("given", visible(shared))
    tensors = answer.update.tensors
    if wrong := tensors.keys() ^ expected.keys():
        state = "sent" if min(wrong) in tensors else "did not send"
        raise UpdateError(f"site '{answer.site}' {state} '{min(wrong)}', which does not fit what it was given.")
    symmetry = getattr(method.adapter, "symmetry", {}) if getattr(method, "any_width", False) else {}
    widths: dict[str, int] = {}
    for name, tensor in tensors.items():
        shape = expected_shape(name, tensor, expected[name], symmetry, widths)
        if (tensor.shape, tensor.dtype) != (shape, expected[name].dtype):
            raise UpdateError(
                f"site '{answer.site}' sent '{name}' as {tuple(tensor.shape)} {tensor.dtype}, expected "
                f"{tuple(shape)} {expected[name].dtype}: its backbone or its adapter is another one."
            )
    if (bad := not_finite(tensors)) is not None:
        raise UpdateError(f"site '{answer.site}' sent '{bad}' with values that are not finite.")
    if not (math.isfinite(answer.update.weight) and answer.update.weight >= 0):
        raise UpdateError(f"site '{answer.site}' sent the weight {answer.update.weight}, expected a finite one >= 0.")


def longest(shared: Shared, method: Method) -> int:
    """Bytes to which the frame of an update can unpack that may be admitted: hidden axes as wide as their layer."""
    expected = without("given", visible(shared))
    symmetry = getattr(method.adapter, "symmetry", {}) if getattr(method, "any_width", False) else {}
    layer: dict[str, int] = {}  # by place, its longest axis
    for name, tensor in expected.items():
        place = name.rpartition("/")[0]
        layer[place] = max((layer.get(place, 1), *tensor.shape))
    total = HEADER
    for name, tensor in expected.items():
        place, _, leaf = name.rpartition("/")
        axes = dict(enumerate(symmetry.get(leaf, ())))
        sizes = [layer[place] if axes.get(i) == "hidden" else size for i, size in enumerate(tensor.shape)]
        total += HEADER + len(name) + math.prod(sizes) * tensor.itemsize
    return total


def expected_shape(
    name: str, given: Tensor, expected: Tensor, symmetry: Symmetry, widths: dict[str, int]
) -> torch.Size:
    """The shape that a tensor must have, where hidden axes may be of any width up to the layer's.

    widths: by place, the width that its first tensor came with; added to
    """
    place, _, leaf = name.rpartition("/")
    axes = symmetry.get(leaf)
    if axes is None or given.dim() != expected.dim():
        return expected.shape
    axis = axes.index("hidden")
    width = widths.setdefault(place, given.shape[axis])
    if not 1 <= width <= max((size for i, size in enumerate(expected.shape) if i != axis), default=width):
        return expected.shape
    return torch.Size(width if i == axis else size for i, size in enumerate(expected.shape))


def _require(
    schedule: Schedule, round: int, asked: Sequence[str], answers: Mapping[str, Answer], silent: Mapping[str, str]
) -> None:
    needed = max(1, math.ceil(schedule.quorum * len(asked) - 1e-9))
    if len(answers) < needed:
        why: dict[str, list[str]] = {}  # what all sites say is said once
        for site in asked:
            if site not in answers:
                why.setdefault(silent.get(site, "no reply").rstrip("."), []).append(site)
        reasons = "; ".join(f"{', '.join(sites)}: {reason}" for reason, sites in why.items())
        raise QuorumError(
            f"round {round + 1}: {len(answers)} of {len(asked)} sites answered, the quorum is {needed}. {reasons}."
        )
