"""Several sites through one forward pass: each trains in a thread of its own, and meets the others at the model.

A method knows nothing of it. Its model is a `Lane`: a call waits until every site of the group has called, or has
ended; then calls that can share a pass go through `Adaptable.together`, and all go on. The gradient of what a lane was
given is asked for in the same way, so that there is one backward pass for all. One lane runs at a time, and who meets
whom depends on nothing but the sites: the same group gives the same bits each time, and differs from sites one after
the other by rounding (1e-6 in float32).
"""

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

from fedloom.backbones.adaptable import Adaptable, Call
from fedloom.backbones.batches import Batch, Features
from fedloom.places import Adapter
from fedloom.tensors import RESERVED, Tensors

Made = TypeVar("Made")


@dataclass
class _Asked:
    """What a lane waits for."""

    kind: Hashable  # those of one kind are answered together
    work: Callable[[Sequence["_Asked"]], Sequence[Any]]
    given: Any
    answer: Any = None
    error: BaseException | None = None
    done: bool = False


class Meeting:
    """Where lanes wait for each other."""

    def __init__(self, lanes: int):
        self._turn = threading.Condition()
        self._running = lanes
        self._waiting: dict[int, _Asked] = {}

    def run(self, work: Callable[[], Made]) -> Made:
        """A lane's whole work; the others wait while it runs, but for where it asks."""
        with self._turn:
            try:
                return work()
            finally:
                self._running -= 1
                self._answer_all()

    def ask(self, lane: int, asked: _Asked) -> Any:
        """The answer, once every other lane asks too, or has ended."""
        self._waiting[lane] = asked
        self._answer_all()
        self._turn.wait_for(lambda: asked.done)
        if asked.error is not None:
            raise asked.error
        return asked.answer

    def _answer_all(self) -> None:
        if not self._waiting or len(self._waiting) < self._running:
            return
        kinds: dict[Hashable, list[_Asked]] = {}
        for lane in sorted(self._waiting):
            kinds.setdefault(self._waiting[lane].kind, []).append(self._waiting[lane])
        self._waiting = {}
        for alike in kinds.values():
            try:
                answers = alike[0].work(alike)
                for asked, answer in zip(alike, answers, strict=True):
                    asked.answer = answer
            except BaseException as e:  # it is raised again in the lanes that asked
                for asked in alike:
                    asked.error = e
            for asked in alike:
                asked.done = True
        self._turn.notify_all()


@dataclass(frozen=True)
class Lane:
    """The model as one site of a group calls it; all but its calls is the model's own."""

    model: Adaptable
    meeting: Meeting
    number: int

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, batch: Batch, adapter: Adapter, tensors: Tensors) -> Features:
        return self.together([(batch, adapter, tensors)])[0]

    def together(self, asked: Sequence[Call]) -> list[Features]:
        """As `Adaptable.together`, with the calls of the other lanes beside."""
        kept = [(b, a, {n: t for n, t in own.items() if n.partition("/")[0] not in RESERVED}) for b, a, own in asked]
        names = tuple((call, name) for call, (_, _, own) in enumerate(kept) for name in own)
        tensors = [kept[call][2][name] for call, name in names]
        calls = _Calls(self, [(batch, adapter) for batch, adapter, _ in kept], names)
        found = iter(_Meet.apply(calls, torch.is_grad_enabled(), *tensors))  # type: ignore[no-untyped-call]
        return [Features(next(found), next(found) if scored else None) for scored in calls.scored]


@dataclass
class _Calls:
    """The calls of a lane, the names of their tensors, and afterwards the graph in which they were answered."""

    lane: Lane
    calls: Sequence[tuple[Batch, Adapter]]
    names: tuple[tuple[int, str], ...]
    scored: list[bool] = field(default_factory=list)
    graph: "_Graph | None" = None
    place: int = 0  # in the graph


@dataclass
class _Graph:
    """A shared forward pass: what each lane put in and got out."""

    inputs: list[list[Tensor]]
    outputs: list[list[Tensor]]
    backward: int = 0  # lanes that have asked for their gradient


class _Meet(Function):
    """Features of a lane's calls as a function of its tensors: forward and backward are asked for, and waited for."""

    @staticmethod
    def forward(ctx: Any, calls: _Calls, grad: bool, *tensors: Tensor) -> Any:
        asked = _Asked(("forward", grad, _form(calls)), _forward, (calls, tensors, grad))
        found, calls.scored = calls.lane.meeting.ask(calls.lane.number, asked)
        ctx.calls = calls
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        calls: _Calls = ctx.calls
        asked = _Asked(("backward", id(calls.graph)), _backward, (calls, slopes))
        return None, None, *calls.lane.meeting.ask(calls.lane.number, asked)


def _form(calls: _Calls) -> Hashable:
    """Lanes with calls of one form go through one pass."""
    return tuple((len(batch), batch.candidates, adapter) for batch, adapter in calls.calls)


def _forward(asked: Sequence[_Asked]) -> list[Any]:
    """All calls of these lanes in one pass; each gets its features outside of the graph."""
    grad = asked[0].given[2]
    inputs = [[t.detach().requires_grad_(grad) for t in one.given[1]] for one in asked]
    together: list[Call] = []
    for one, tensors in zip(asked, inputs, strict=True):
        calls: _Calls = one.given[0]
        own: list[dict[str, Tensor]] = [{} for _ in calls.calls]
        for (call, name), tensor in zip(calls.names, tensors, strict=True):
            own[call][name] = tensor
        together += [(*call, mine) for call, mine in zip(calls.calls, own, strict=True)]
    with torch.set_grad_enabled(grad):
        found = iter(asked[0].given[0].lane.model.together(together))
    graph, answers = _Graph(inputs, []), []
    for place, one in enumerate(asked):
        calls = one.given[0]
        features = [next(found) for _ in calls.calls]
        outputs = [x for one in features for x in (one.pooled, one.scores) if x is not None]
        graph.outputs.append(outputs)
        calls.graph, calls.place = graph, place
        answers.append(([x.detach() for x in outputs], [one.scores is not None for one in features]))
    return answers


def _backward(asked: Sequence[_Asked]) -> list[Any]:
    """The gradients by each lane's tensors, in one pass back; the graph is freed with the last lane that asks."""
    graph: _Graph = asked[0].given[0].graph
    places = [one.given[0].place for one in asked]
    graph.backward += len(asked)
    outputs = [x for place in places for x in graph.outputs[place]]
    slopes = [slope for one in asked for slope in one.given[1]]
    used = [(x, slope) for x, slope in zip(outputs, slopes, strict=True) if x.requires_grad]
    inputs = [x for place in places for x in graph.inputs[place]]
    found = iter(
        torch.autograd.grad(
            [x for x, _ in used],
            inputs,
            [slope for _, slope in used],
            retain_graph=graph.backward < len(graph.inputs),
            allow_unused=True,
        )
    )
    return [[next(found) for _ in graph.inputs[place]] for place in places]


def in_one_pass(model: Adaptable, work: Mapping[str, Callable[[Lane], Made]]) -> dict[str, Made | BaseException]:
    """What each of these makes with its lane of the model, or what it raised."""
    meeting = Meeting(len(work))
    made: dict[str, Made | BaseException] = {}

    def run(name: str, lane: Lane) -> None:
        try:
            made[name] = meeting.run(lambda: work[name](lane))
        except BaseException as e:  # it is raised, or told, where the group was asked for
            made[name] = e

    lanes = [threading.Thread(target=run, args=(name, Lane(model, meeting, i))) for i, name in enumerate(work)]
    for lane in lanes:
        lane.start()
    for lane in lanes:
        lane.join()
    return made
