"""Which units of two adapters are alike: matchings by weights and by what units do on a probe."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom import alignment
from fedloom.adapters import Bottleneck
from fedloom.alignment import Matching
from fedloom.site import Site
from fedloom.tensors import Tensors, by_place, generator
from fedloom.transport import Plans, carried, shuffled, width

Reads = Mapping[str, Tensor]  # by place, what an adapter reads there: (tokens, dim)
Orders = Mapping[str, Tensor]  # by place, for each target unit the source unit


@dataclass(frozen=True)
class Cost:
    """What units are compared by."""

    of: alignment.Weights | None  # weights; None: activations
    near: bool = True  # squared distance of weights, correlation of activations; False: Euclidean distance


COSTS: Mapping[str, Cost] = {
    "weights in": Cost("in"),
    "weights in+bias": Cost("in+bias"),
    "weights in+out": Cost("in+out"),
    "weights in, Euclidean": Cost("in", near=False),
    "activations, correlation": Cost(None),
    "activations, Euclidean": Cost(None, near=False),
}


def read(site: Site, adapter: Bottleneck, own: Tensors, images: Sequence[int]) -> Reads:
    """What the adapter reads at each place on these training examples, without padding."""
    batch = site.batch(site.train, images)
    return {place.name: h[mask] for place, h, mask in site.model.inputs(batch, adapter, own)}


def matched(adapter: Bottleneck, source: Tensors, target: Tensors, cost: Cost, reads: Reads) -> Plans:
    """For each place, where the units of `source` go among those of `target`; every match is believed."""
    if cost.of is not None:
        distance = alignment.squared if cost.near else alignment.euclidean
        return alignment.matched(source, target, adapter.symmetry, cost.of, Matching(distance, accept="always"))
    distance = alignment.decorrelation if cost.near else alignment.euclidean
    both = ((place, h, h, torch.arange(len(h)) % 2 == 0) for place, h in reads.items())
    return alignment.matched_on(both, source, target, adapter, Matching(distance, accept="always"))


def permuted(adapter: Bottleneck, tensors: Tensors, *key: object) -> tuple[dict[str, Tensor], Orders]:
    """The adapter with its units in a random order, and the order that undoes it."""
    widths = {place: width(leaves, adapter.symmetry) for place, leaves in by_place(tensors).items()}
    plans = {place: (shuffled(n, *key, place), 0.0) for place, n in widths.items()}
    undone = {place: plan.units().argsort() for place, (plan, _) in plans.items()}
    return carried(tensors, plans, adapter.symmetry), undone


def noisy(tensors: Tensors, level: float, *key: object) -> dict[str, Tensor]:
    """Each tensor with normal noise of `level` times its root mean square."""
    return {
        name: t + level * t.square().mean().sqrt() * torch.randn(t.shape, generator=generator(*key, name))
        for name, t in tensors.items()
    }


def agreement(plans: Plans, orders: Orders) -> float:
    """The share of units, in percent, that go where `orders` has them; of all places."""
    right = [plans[place][0].units() == order for place, order in orders.items()]
    return 100 * float(torch.cat(right).double().mean())


def orders(plans: Plans) -> Orders:
    """Where a matching sends units, to compare others with."""
    return {place: plan.units() for place, (plan, _) in plans.items()}


def gained(plans: Plans) -> float:
    """The share of the identity's cost that a matching saves, in percent; the mean over places."""
    return 100 * sum(gain or 0.0 for _, gain in plans.values()) / len(plans)
