r"""Optimal transport between the hidden units of two adapters.

Which unit of one is like which of the other, by their weights or by what they do; how a plan is found, what it is
worth, and when it is believed. All of it is generic over an adapter's symmetry (`fedloom.transport`). OTFusion (Singh &
Jaggi, 2020, arXiv 1910.05653), from which the matching descends, would match the output side of `up` too, which changes
what the adapter computes.

All problems are solved in float64. Convention: T[i, j] is the share of source unit i in target unit j.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedloom.adapters import Bottleneck, LoRA
from fedloom.errors import AdapterError
from fedloom.places import Symmetry
from fedloom.tensors import Tensors, by_place
from fedloom.transport import Coupling, Order, Plan, Plans, hidden, identity, shuffled, width

Weights: TypeAlias = Literal["in", "in+bias", "in+out"]
Distance: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # (m, n), (k, n) -> costs (m, k)

# A place, what the units of source and target read there, (tokens, in_dim) each, and which tokens are the first half.
Read: TypeAlias = tuple[str, Tensor, Tensor, Tensor]

FLOOR = 1e-12  # the least mass of a unit, and the least norm that counts as one
SINKHORN = 0.1  # regularisation, in median costs: near exact; at 1 the plan says nothing


# What units are compared by.


def weights(leaves: Tensors, symmetry: Symmetry, of: Weights) -> Tensor:
    """One row a unit, (width, n) float64: its incoming weights, with its bias, with its outgoing weights.

    `in+out` under squared distances is the exact weight matching of one hidden layer (Ainsworth et al., 2023,
    arXiv 2209.04836).
    """
    kept = {"in": ("in",), "in+bias": ("in", "bias"), "in+out": ("in", "bias", "out")}[of]
    axes = hidden(leaves, symmetry)
    rows = [_rows(leaves[leaf], axis) for leaf, axis in axes.items() if _side(symmetry[leaf]) in kept]
    return torch.cat(rows, 1)


def mass(leaves: Tensors, symmetry: Symmetry) -> Tensor:
    """What each unit carries, (width) float64, summing to one: the norm of all that comes in times that of all that
    goes out; uniform where all are zero."""
    sides: dict[str, list[Tensor]] = {"in": [], "out": []}
    for leaf, axis in hidden(leaves, symmetry).items():
        sides["out" if _side(symmetry[leaf]) == "out" else "in"].append(_rows(leaves[leaf], axis))
    carried = torch.ones(width(leaves, symmetry), dtype=torch.float64)
    for side in filter(None, sides.values()):
        carried = carried * torch.cat(side, 1).norm(dim=1)
    if not carried.sum() > 0:
        carried = torch.ones_like(carried)
    carried = (carried / carried.sum()).clamp_min(FLOOR)
    return carried / carried.sum()


def squared(source: Tensor, target: Tensor) -> Tensor:
    """Squared Euclidean distances between rows, so that transport is exact W2 and the mean its barycenter."""
    norms = source.square().sum(1)[:, None] + target.square().sum(1)
    return (norms - 2 * source @ target.T).clamp_min(0)


def euclidean(source: Tensor, target: Tensor) -> Tensor:
    """Euclidean distances between rows (W1), which can choose another matching than the squared ones."""
    return squared(source, target).sqrt()


def decorrelation(source: Tensor, target: Tensor) -> Tensor:
    """One minus Pearson's correlation between rows; a constant row has correlation 0 with any."""
    unit = [rows - rows.mean(1, keepdim=True) for rows in (source, target)]
    norms = [rows.norm(dim=1, keepdim=True) for rows in unit]
    # A constant row leaves rounding behind, of the size of its values.
    least = [FLOOR * (1 + rows.abs().amax(1, keepdim=True)) for rows in (source, target)]
    a, b = (
        torch.where(norm > low, rows / norm, torch.zeros_like(rows))
        for rows, norm, low in zip(unit, norms, least, strict=True)
    )
    return 1 - a @ b.T


# How a plan is found.


def assigned(cost: Tensor) -> Order:
    """The exact optimum between equal widths under uniform marginals, a permutation (Birkhoff); as `ot.emd` finds."""
    rows, columns = linear_sum_assignment(cost.numpy())
    index = torch.empty(len(rows), dtype=torch.int64)
    index[torch.from_numpy(columns)] = torch.from_numpy(rows)
    return Order(index)


def moved_earth(cost: Tensor, source: Tensor, target: Tensor) -> Coupling:
    """The exact optimum between any widths under these masses; raises AdapterError where none is found."""
    import ot

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what it warns of is an error here
        plan, log = ot.emd(source.numpy(), target.numpy(), cost.numpy(), log=True)
    if log["warning"] is not None:
        raise AdapterError(f"no transport of {len(source)} to {len(target)} units was found: {log['warning']}.")
    return Coupling(torch.as_tensor(plan))


def sinkhorn(cost: Tensor, source: Tensor, target: Tensor) -> Coupling:
    """Entropy-regularised transport (Cuturi, 2013, arXiv 1306.0895)."""
    import ot

    regularisation = SINKHORN * max(float(cost.median()), FLOOR)
    plan = ot.bregman.sinkhorn_log(
        source.numpy(), target.numpy(), cost.numpy(), regularisation, numItermax=10_000, stopThr=1e-9, warn=False
    )
    return Coupling(torch.as_tensor(plan))


# What a plan is worth.


def gain(cost: Tensor, plan: Plan) -> float:
    """The share of the identity's cost that a plan saves: 1 finds a permuted copy, 0 is the identity. Square costs."""
    stay = float(cost.diagonal().sum())
    index = plan.units()
    return 1 - float(cost[index, torch.arange(len(index))].sum()) / stay if stay > 0 else 0.0


def split_gain(source: Tensor, target: Tensor, distance: Distance, first: Tensor) -> float:
    """The gain on features that a matching was not made on: made on one half and measured on the other, both ways.

    What moves units in one half by chance gains nothing in the other, so noise comes out at or below zero, whatever the
    width.

    source, target: (width, n) float64; first: (n) bool, which features are in the first half
    """
    a, b = (distance(source[:, half], target[:, half]) for half in (first, ~first))
    return (gain(b, assigned(a)) + gain(a, assigned(b))) / 2


@dataclass(frozen=True, eq=False)
class Side:
    """The units of one adapter at one place: what they are compared by, (width, n), and what each carries, (width)."""

    features: Tensor
    mass: Callable[[], Tensor]  # asked for only between unlike widths


def by_weights(leaves: Tensors, symmetry: Symmetry, of: Weights) -> Side:
    """Units by their weights."""
    return Side(weights(leaves, symmetry, of), partial(mass, leaves, symmetry))


def by_activations(adapter: Bottleneck | LoRA, leaves: Tensors, read: Tensor, passed_on: bool) -> Side:
    """Units by what they make of `read` (tokens, in_dim): before the non-linearity, or what they pass on."""
    units = adapter.pre(read, leaves)
    seen = adapter.post(units) if passed_on else units
    return Side(seen.T.double(), partial(mass, leaves, adapter.symmetry))


@dataclass(frozen=True)
class Matching:
    """How units are matched, and when the match is believed.

    A match is believed `always`, where its gain over the identity is above `least` (`gain`), or where the gain is above
    it on features that the match was not made on (`split-half`); else the units stay. Unlike widths have no identity,
    and are always transported.
    """

    distance: Distance
    solver: Literal["exact", "emd", "sinkhorn", "random"] = "exact"
    accept: Literal["always", "gain", "split-half"] = "split-half"
    least: float = 0.0

    def __call__(self, source: Side, target: Side, first: Tensor, *key: object) -> tuple[Plan, float]:
        """A plan for the units of one place, and its gain over the identity (0 where widths differ).

        first: (n) bool, the half of the features on which a split-half match is made; key: of a random order
        """
        a, b = source.features, target.features
        cost = self.distance(a, b)
        if len(a) != len(b):
            return moved_earth(cost, source.mass(), target.mass()), 0.0
        even = torch.full((len(a),), 1 / len(a), dtype=torch.float64)
        plan: Plan
        match self.solver:
            case "exact":
                plan = assigned(cost)
            case "emd":
                plan = moved_earth(cost, even, even)
            case "sinkhorn":
                plan = sinkhorn(cost, even, even)
            case "random":
                plan = shuffled(len(a), *key)
        if isinstance(plan, Order) and torch.equal(plan.index, torch.arange(len(a))):
            return plan, 0.0  # all stay, whatever it were worth
        gained = gain(cost, plan)
        worth = split_gain(a, b, self.distance, first) if self.accept == "split-half" else gained
        if self.accept == "always" or worth > self.least:
            return plan, gained
        return identity(len(a)), 0.0


# Whole adapters.


def matched(
    source: Tensors, target: Tensors, symmetry: Symmetry, of: Weights, matching: Matching, *key: object
) -> Plans:
    """For each place, where the units of `source` go among those of `target`, by their weights."""
    targets, plans = by_place(target), {}
    for place, leaves in by_place(source).items():
        a, b = (by_weights(side, symmetry, of) for side in (leaves, targets[place]))
        plans[place] = matching(a, b, torch.arange(a.features.shape[1]) % 2 == 0, *key, place)
    return plans


def matched_on(
    reads: Iterable[Read],
    source: Tensors,
    target: Tensors,
    adapter: Bottleneck | LoRA,
    matching: Matching,
    *key: object,
) -> Plans:
    """For each place, where the units of `source` go among those of `target`, by what they make of what they read:
    before the non-linearity where correlations are compared, else what they pass on."""
    theirs, ours, plans = by_place(source), by_place(target), {}
    passed_on = matching.distance is not decorrelation
    for place, of_source, of_target, first in reads:
        a = by_activations(adapter, theirs[place], of_source, passed_on)
        b = by_activations(adapter, ours[place], of_target, passed_on)
        plans[place] = matching(a, b, first, *key, place)
    return plans


def _side(axes: tuple[str | None, ...]) -> str:
    if axes.index("hidden") > 0:
        return "out"
    return "bias" if len(axes) == 1 else "in"


def _rows(tensor: Tensor, axis: int) -> Tensor:
    """One row a unit, float64."""
    return tensor.double().movedim(axis, 0).reshape(tensor.shape[axis], -1)
