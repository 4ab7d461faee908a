"""How many FLOPs one of a method's functions takes at a site, counted on a few of its steps.

Matrix products, convolutions and attention are counted, forward and backward. A loop over batches runs two of them, one
of half the size, which tells what a step costs by itself and what each example adds; that is the whole loop, whatever
its epochs and the site's number of examples. What is done outside of loops is counted as it is, with some held-out
examples and without any.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, TypeVar

from fedloom.backbones.batches import Batch
from fedloom.data import Dataset
from fedloom.places import Adapter
from fedloom.site import CHUNK, Site

Made = TypeVar("Made")


class Loop(NamedTuple):
    """Epochs over a site's training examples."""

    round: int | str
    epochs: int
    step: float  # FLOPs of a step, whatever its size
    example: float  # that each example adds


@dataclass(frozen=True)
class Count:
    """FLOPs of a call, at a site of any number of examples."""

    fixed: float = 0.0
    train: float = 0.0  # of a training example, once
    held_out: float = 0.0  # of a held-out example
    loops: tuple[Loop, ...] = ()

    def of(self, site: Site) -> float:
        """At this site."""
        n, steps = len(site), -(-len(site) // site.training.batch)
        looped = sum(loop.epochs * (loop.step * steps + loop.example * n) for loop in self.loops)
        return self.fixed + self.train * n + self.held_out * len(site.held_out) + looped

    def __add__(self, other: "Count") -> "Count":
        loops = self.loops + other.loops
        return Count(self.fixed + other.fixed, self.train + other.train, self.held_out + other.held_out, loops)

    def step(self, site: Site) -> float:
        """Of one step of a round, of as many examples as a batch of this site has."""
        n = min(len(site), site.training.batch)
        return sum(loop.step + loop.example * n for loop in self.loops if isinstance(loop.round, int))


def counted(call: Callable[[Site], Made], site: Site) -> tuple[Count, Made]:
    """What a call at a site takes, and what it makes after so few steps.

    What the model has kept of an earlier call, the features of candidate texts, is not counted.
    """
    some = site.held_out[:CHUNK]
    tally, made = _tallied(call, replace(site, held_out=some))
    fixed = tally.outside
    if len(some) and fixed:
        fixed = _tallied(call, replace(site, held_out=some[:0]))[0].outside
    return Count(fixed, tally.train, (tally.outside - fixed) / max(len(some), 1), tuple(tally.loops)), made


def of_cache(site: Site, adapter: Adapter) -> Count:
    """What keeping the frozen prefix of a site's examples takes, once."""
    count, _ = counted(lambda own: own.kept(own.train, adapter), site)
    return replace(count, held_out=count.train)


@dataclass
class _Tally:
    counter: Any
    loops: list[Loop] = field(default_factory=list)
    train: float = 0.0
    inside: float = 0.0  # what was counted in loops, and of training examples

    @property
    def total(self) -> float:
        return float(self.counter.get_total_flops())

    @property
    def outside(self) -> float:
        return self.total - self.inside


def _tallied(call: Callable[[Site], Made], site: Site) -> tuple[_Tally, Made]:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        tally = _Tally(counter)
        made = call(_Glimpsed(**{part.name: getattr(site, part.name) for part in fields(site)}, tally=tally))
    return tally, made


@dataclass(frozen=True)
class _Glimpsed(Site):
    """A site whose loops are cut short."""

    tally: _Tally = field(kw_only=True)

    def batches(self, round: int | str, epochs: int | None = None) -> Iterator[Batch]:
        epochs = self.training.epochs if epochs is None else epochs
        n = min(len(self), self.training.batch)
        if not epochs or not n:
            return
        costs = {}
        for size in dict.fromkeys((n, max(1, n // 2))):
            before = self.tally.total
            yield self.batch(self.train, range(size))
            costs[size] = self.tally.total - before
        self.tally.inside += sum(costs.values())
        example = (costs[n] - costs[n // 2]) / (n - n // 2) if n > 1 else costs[n]
        self.tally.loops.append(Loop(round, epochs, costs[n] - n * example, example))

    def kept(self, dataset: Dataset, adapter: Adapter) -> Dataset:
        if dataset is not self.train:
            return super().kept(dataset, adapter)
        before, few = self.tally.total, dataset[: self.training.batch]
        found = super().kept(few, adapter)
        self.tally.inside += (cost := self.tally.total - before)
        self.tally.train += cost / max(len(few), 1)
        return found
