"""Moving the hidden units of an adapter: permutations, and couplings between unequal widths.

Two adapters that differ only in the order of their hidden units compute the same function. Which axis of which tensor
carries that order is a fact of the adapter, its `symmetry`:

    {"down": ("hidden", None), "down_bias": ("hidden",), "up": (None, "hidden")}

No other axis is touched: the model's width is the frozen residual stream on both sides.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from fedloom.places import Symmetry
from fedloom.tensors import Tensors, at, by_place, generator

TINY = 1e-24  # the least that a coupling is divided by


class Plan(Protocol):
    """Where source units go."""

    def moved(self, leaves: Tensors, symmetry: Symmetry) -> dict[str, Tensor]:
        """An adapter's tensors at one place, its units where they go; other axes and tensors stay."""

    def units(self) -> Tensor:
        """For each target unit, the source unit that has most of it, (n) int64."""


@dataclass(frozen=True, eq=False)
class Order:
    """A permutation: unit `index[j]` of the source becomes unit j. Applied by indexing, exact to the bit."""

    index: Tensor

    def moved(self, leaves: Tensors, symmetry: Symmetry) -> dict[str, Tensor]:
        return along(lambda tensor, axis: tensor.index_select(axis, self.index), leaves, symmetry)

    def units(self) -> Tensor:
        return self.index


@dataclass(frozen=True, eq=False)
class Coupling:
    r"""A plan (m, n) between unequal widths.

    What comes in is averaged, what goes out is divided, so that a unit that is split in two computes what it did:

    .. math:: \tilde W_{in}[j] = \sum_i \frac{T_{ij}}{T_{\cdot j}} W_{in}[i], \qquad
              \tilde W_{out}[:, j] = \sum_i \frac{T_{ij}}{T_{i \cdot}} W_{out}[:, i]
    """

    plan: Tensor

    def moved(self, leaves: Tensors, symmetry: Symmetry) -> dict[str, Tensor]:
        return along(self._carried, leaves, symmetry)

    def _carried(self, tensor: Tensor, axis: int) -> Tensor:
        shares = self.plan / self.plan.sum(axis, keepdim=True).clamp_min(TINY)
        moved: Tensor = torch.tensordot(tensor.double(), shares, dims=([axis], [0]))
        return moved.movedim(-1, axis).to(tensor.dtype).contiguous()

    def units(self) -> Tensor:
        return self.plan.argmax(0)


Plans: TypeAlias = Mapping[str, tuple[Plan, float | None]]  # place -> plan, its gain over the identity where measured


def along(move: Callable[[Tensor, int], Tensor], leaves: Tensors, symmetry: Symmetry) -> dict[str, Tensor]:
    """The tensors of one place, each that has a hidden axis moved along it: axis 0 is the incoming side."""
    return {**leaves, **{leaf: move(leaves[leaf], axis) for leaf, axis in hidden(leaves, symmetry).items()}}


def hidden(leaves: Tensors, symmetry: Symmetry) -> dict[str, int]:
    """The leaves of one place that have a hidden axis, and which it is."""
    return {leaf: axes.index("hidden") for leaf, axes in symmetry.items() if leaf in leaves}


def width(leaves: Tensors, symmetry: Symmetry) -> int:
    """Hidden units at one place."""
    leaf, axis = next(iter(hidden(leaves, symmetry).items()))
    return leaves[leaf].shape[axis]


def carried(tensors: Tensors, plans: Plans, symmetry: Symmetry) -> dict[str, Tensor]:
    """An adapter through plans; a place without one stays."""
    return {
        name: tensor
        for place, leaves in by_place(tensors).items()
        for name, tensor in at(place, plans[place][0].moved(leaves, symmetry) if place in plans else leaves).items()
    }


def shuffled(units: int, *key: object) -> Order:
    """A random permutation, a function of the key: what a matching has to beat."""
    return Order(torch.randperm(units, generator=generator(*key)))


def identity(units: int) -> Order:
    """Every unit where it is."""
    return Order(torch.arange(units))


def units(plans: Plans) -> dict[str, Tensor]:
    """By place, which source unit comes to each target unit, int16: what is kept to compare the next match with."""
    return {place: plan.units().to(torch.int16) for place, (plan, _) in plans.items()}


def told(level: str, plans: Plans, before: Tensors) -> dict[str, float]:
    """What a matching did at each place: the share of units that moved, the gain over the identity, and the share whose
    match is another than in `before`, the `units` of the round before."""
    figures = {}
    for place, order in units(plans).items():
        figures[f"{level}/moved/{place}"] = float((order != torch.arange(len(order))).float().mean())
        if (gain := plans[place][1]) is not None:
            figures[f"{level}/gain/{place}"] = gain
        if place in before and before[place].shape == order.shape:
            figures[f"{level}/rematched/{place}"] = float((order != before[place]).float().mean())
    return figures
