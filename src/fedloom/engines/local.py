"""Every site on this machine and on one backbone: one after the other, in groups, or in several processes."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from typing import Any

from fedloom.data import Dataset
from fedloom.engines.grouped import in_one_pass
from fedloom.engines.workers import Workers
from fedloom.errors import FedloomError
from fedloom.federation import End, longest, own_state, site_evaluate, site_round, visible
from fedloom.methods import Method
from fedloom.site import Answer, Reply, Silence, Site, Update
from fedloom.store import Store
from fedloom.tensors import Shared, from_bytes, only, to_bytes
from fedloom.wire import Wire


@dataclass(frozen=True)
class Participant:
    """One site of a simulation: what its method may touch, and what it may not."""

    site: Site
    store: Store
    test: Dataset = field(repr=False)
    group: str = ""  # of sites that share a task

    @property
    def kind(self) -> str:
        """Figures are averaged over sites of one kind: of a group, or else of a metric."""
        return self.group or self.site.task.metric

    def split(self, name: str) -> Dataset:
        return {"train": self.site.train, "held_out": self.site.held_out, "test": self.test}[name]


@dataclass(frozen=True)
class Trained:
    """What a site's part of a round leaves, before the server has read it."""

    update: Update  # without its tensors
    frame: bytes  # with them
    seconds: float


@dataclass(frozen=True)
class LocalEngine:
    """Everything crosses as bytes, as it would between machines, so that what is measured is what would be sent."""

    method: Method
    participants: Mapping[str, Participant]
    wire: Wire = field(default_factory=Wire)
    group: int = 1  # sites that train in one pass; with more than one the bits are other ones
    workers: int = 1  # processes; the bits are the same

    def round(self, round: int, shared: Shared, sites: Sequence[str]) -> Iterator[Reply]:
        given, most = visible(shared), longest(shared, self.method)
        down = self.wire.give(given)
        groups = [sites[first : first + self.group] for first in range(0, len(sites), self.group)]
        trained = self._spread([(LocalEngine._train, round, down, group) for group in groups])
        for name, one in zip(sites, chain.from_iterable(trained), strict=True):
            if isinstance(one, Silence):
                yield one
                continue
            try:
                sent = replace(one.update, tensors=self.wire.receive(name, one.frame, given, most))
            except FedloomError as e:
                yield Silence(name, str(e))
                continue
            yield Answer(name, sent, len(one.frame), len(down), one.seconds)

    def evaluate(self, round: int, shared: Shared, split: str, sites: Sequence[str]) -> Iterator[Reply]:
        if self.workers == 1:
            yield from (self._measure(round, shared, split, name) for name in sites)
            return
        frame, names = to_bytes(shared), [*shared]
        yield from self._spread([(LocalEngine._measure_packed, round, frame, names, split, name) for name in sites])

    def _train(self, round: int, down: bytes, sites: Sequence[str]) -> list[Trained | Silence]:
        """What these sites make in one pass."""

        def train(name: str, model: Any = None) -> Trained | Silence:
            began, own = time.perf_counter(), self.participants[name]
            site = own.site if model is None else replace(own.site, model=model)
            try:
                update, frame = site_round(self.method, site, End(own.store, self.wire), round, down)
            except FedloomError as e:
                return Silence(name, str(e))
            except Exception as e:
                e.add_note(f"at site '{name}', round {round + 1}")
                raise
            return Trained(update, frame, time.perf_counter() - began)

        if len(sites) == 1:
            return [train(sites[0])]
        made = in_one_pass(self.participants[sites[0]].site.model, {name: partial(train, name) for name in sites})
        trained = []
        for name in sites:
            if isinstance(one := made[name], BaseException):
                raise one
            trained.append(one)
        return trained

    def _measure(self, round: int, shared: Shared, split: str, name: str) -> Reply:
        own = self.participants[name]
        dataset = own.split(split)
        if not len(dataset):
            return Silence(name, f"it has no {split} examples")
        private = own_state(own.store.before(round + 1)[1])
        metrics = site_evaluate(self.method, own.site, private, shared, dataset)
        return Answer(name, Update(Shared({}), 0.0, len(dataset), metrics))

    def _measure_packed(self, round: int, frame: bytes, names: Sequence[str], split: str, name: str) -> Reply:
        return self._measure(round, Shared(only(names, from_bytes(frame))), split, name)

    def _spread(self, calls: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        """What each of these calls gives, in their order, from here or from the workers."""
        return map(self._call, calls) if self.workers == 1 else self._pool.run(calls)

    def _call(self, call: tuple[Any, ...]) -> Any:
        function, *arguments = call
        return function(self, *arguments)

    @cached_property
    def _pool(self) -> Workers:
        return Workers(self._call, self.workers)
