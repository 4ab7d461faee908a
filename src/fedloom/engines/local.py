"""Every site in this process, one after the other or in groups, on one backbone."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from fedloom.data import Dataset
from fedloom.engines.grouped import in_one_pass
from fedloom.errors import FedloomError
from fedloom.federation import End, longest, own_state, site_evaluate, site_round, visible
from fedloom.methods import Method
from fedloom.site import Answer, Reply, Silence, Site, Update
from fedloom.store import Store
from fedloom.tensors import Shared
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
class LocalEngine:
    """Everything crosses as bytes, as it would between machines, so that what is measured is what would be sent."""

    method: Method
    participants: Mapping[str, Participant]
    wire: Wire = field(default_factory=Wire)
    group: int = 1  # sites that train in one pass; with more than one the bits are other ones

    def round(self, round: int, shared: Shared, sites: Sequence[str]) -> Iterator[Reply]:
        given, most = visible(shared), longest(shared, self.method)
        down = self.wire.give(given)

        def reply(name: str, model: Any = None) -> Reply:
            began, own = time.perf_counter(), self.participants[name]
            site = own.site if model is None else replace(own.site, model=model)
            try:
                update, up = site_round(self.method, site, End(own.store, self.wire), round, down)
                sent = replace(update, tensors=self.wire.receive(name, up, given, most))
            except FedloomError as e:
                return Silence(name, str(e))
            return Answer(name, sent, len(up), len(down), time.perf_counter() - began)

        for first in range(0, len(sites), self.group):
            yield from self._replies(reply, sites[first : first + self.group])

    def _replies(self, reply: Callable[..., Reply], sites: Sequence[str]) -> Iterator[Reply]:
        if len(sites) == 1:
            yield reply(sites[0])
            return
        made = in_one_pass(self.participants[sites[0]].site.model, {name: partial(reply, name) for name in sites})
        for name in sites:
            if isinstance(one := made[name], BaseException):
                raise one
            yield one

    def evaluate(self, round: int, shared: Shared, split: str, sites: Sequence[str]) -> Iterator[Reply]:
        for name in sites:
            own = self.participants[name]
            dataset = own.split(split)
            if not len(dataset):
                yield Silence(name, f"it has no {split} examples")
                continue
            private = own_state(own.store.before(round + 1)[1])
            metrics = site_evaluate(self.method, own.site, private, shared, dataset)
            yield Answer(name, Update(Shared({}), 0.0, len(dataset), metrics))
