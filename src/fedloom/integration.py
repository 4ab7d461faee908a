r"""Dynamic integration: a mean of adapters in which distant ones count for less.

Adapters W_k, aligned to the current one W, with weights p_k and squared distances d_k = ‖W_k - W‖² over a scale s:

    normalized   Σ p_k e^{-γ d_k / s} W_k / Σ p_k e^{-γ d_k / s}         one mean-shift step with a Gaussian kernel
    literal      Σ p_k e^{-γ d_k / s} W_k / Σ p_k                        as FedPIA's equation stands: it shrinks
    delta        W + Σ p_k e^{-γ d_k / s} (W_k - W) / Σ p_k              farther counts less, and the whole moves less

All three are the mean at γ = 0. Sums are float64 and folded in the order given, holding one adapter; exponents are kept
relative to the largest so far, so that weights are right even where every e^{-γ d_k / s} underflows.
"""

import logging
import math
from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fedloom.errors import UpdateError
from fedloom.tensors import Tensors, by_place

log = logging.getLogger(__name__)

SHRUNK = 0.9  # S below which the literal form is said to shrink the global adapter
Mode: TypeAlias = Literal["normalized", "literal", "delta"]


def distances(a: Tensors, b: Tensors, by_layer: bool = False) -> Tensor:
    """Squared Euclidean distances, float64: of the whole adapter (1), or of each place by itself (places)."""
    parts = [
        torch.stack([(a[f"{place}/{leaf}"].double() - t.double()).square().sum() for leaf, t in leaves]).sum()
        for place, leaves in _sorted(b)
    ]
    each = torch.stack(parts)
    return each if by_layer else each.sum(0, keepdim=True)


def sizes(tensors: Tensors, by_layer: bool = False) -> Tensor:
    """Numbers of parameters, as `distances` counts."""
    each = torch.tensor([sum(t.numel() for _, t in leaves) for _, leaves in _sorted(tensors)]).double()
    return each if by_layer else each.sum(0, keepdim=True)


def exponents(gamma: float, squared: Tensor, scale: Tensor) -> Tensor:
    """-γ d / s; 0 where the scale is 0, so that a scale of 0 leaves the weights p_k."""
    if gamma == 0:
        return torch.zeros_like(squared)
    return torch.where(scale > 0, -gamma * squared / torch.where(scale > 0, scale, 1.0), 0.0)


def per_tensor(values: Tensor, tensors: Tensors) -> dict[str, float]:
    """One value a place, or one for all, by the name of every tensor."""
    places = _sorted(tensors)
    each = values.expand(len(places)).tolist()
    return {f"{place}/{leaf}": value for (place, leaves), value in zip(places, each, strict=True) for leaf, _ in leaves}


def combined(mode: Mode, current: Tensors, sums: Tensors, total: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """What the sums make, in the dtypes of `current`.

    sums: c Σ p_k e_k W_k; total: c Σ p_k e_k, one or one a place; kept: 1 / (c Σ p_k), alike. c is any constant
    """
    totals, shares = per_tensor(total, current), per_tensor(kept, current)
    new = {}
    for name, old in current.items():
        match mode:
            case "normalized":
                tensor = sums[name].double() / totals[name]
            case "literal":
                tensor = sums[name].double() * shares[name]
            case "delta":
                tensor = old + (sums[name].double() - totals[name] * old.double()) * shares[name]
        new[name] = tensor.to(old.dtype)
    return new


def norm(tensors: Tensors) -> float:
    """The Euclidean norm over all tensors, float64."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


class Fold:
    """The running sums of an integration: adapters are added one by one and not kept."""

    def __init__(self, current: Tensors):
        self._current = current
        self._sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in current.items()}
        self._top: Tensor | None = None
        self._said: dict[str, tuple[float, Tensor]] = {}

    def add(self, site: str, tensors: Tensors, weight: float, exponent: Tensor) -> None:
        """Add W_k with p_k and -γ d_k / s, one or one a place."""
        before = exponent if self._top is None else self._top
        self._top = torch.maximum(before, exponent)
        shrink, share = (per_tensor((x - self._top).exp(), tensors) for x in (before, exponent))
        for name, total in self._sums.items():
            if shrink[name] != 1:
                total.mul_(shrink[name])
            total.add_(tensors[name], alpha=weight * share[name])
        self._said[site] = (weight, exponent)

    def integrated(self, mode: Mode) -> dict[str, Tensor]:
        """The integrated adapter, in the dtypes of the current one; raises UpdateError without a positive weight."""
        p, total, top = self._weights()
        if not p > 0:
            raise UpdateError("there is nothing to integrate: no site answered with a weight above zero.")
        if mode == "literal" and self.kept() < SHRUNK:
            log.warning(
                "the literal integration keeps %.2f of the global adapter in this round, and shrinks it towards zero; "
                "integration = 'normalized' does not",
                self.kept(),
            )
        return combined(mode, self._current, self._sums, total, top.exp() / p)

    def shares(self) -> Mapping[str, float]:
        """w_k of each site, summing to one; the mean over places where each has its own."""
        _, total, top = self._weights()
        return {site: float((w * (x - top).exp() / total).mean()) for site, (w, x) in self._said.items()}

    def kept(self) -> float:
        """S = Σ p_k e^{-γ d_k / s} / Σ p_k, what the literal form keeps; the mean over places."""
        p, total, top = self._weights()
        return float((total * top.exp() / p).mean())

    def told(self) -> dict[str, float]:
        """w_k by site, the effective number of sites (Σ w_k)² / Σ w_k², and S."""
        shares = self.shares()
        effective = 1 / sum(share**2 for share in shares.values())
        by_site = {f"server/weight/{site}": share for site, share in shares.items()}
        return {**by_site, "effective": effective, "sum": self.kept()}

    def _weights(self) -> tuple[float, Tensor, Tensor]:
        top = torch.zeros(1, dtype=torch.float64) if self._top is None else self._top
        p = sum(weight for weight, _ in self._said.values())
        total = torch.stack([w * (x - top).exp() for w, x in self._said.values()]).sum(0) if self._said else top * 0
        return p, total, top


def _sorted(tensors: Tensors) -> list[tuple[str, list[tuple[str, Tensor]]]]:
    """Places and leaves in one order, whatever order the names come in: a sum has other last bits in each."""
    return [(place, sorted(leaves.items())) for place, leaves in sorted(by_place(tensors).items())]
