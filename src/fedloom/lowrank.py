r"""The algebra of low-rank products B A that are never written out.

Factors are a pair (B, A): B (out, r), A (r, in). Any invertible G gives the same product, (B G)(G⁻¹ A), so that a mean
of factors is not the mean of products, and a rank has no identity beyond its product b_i a_iᵀ. What is computed here
depends on the product alone. All of it in float64.
"""

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fedloom.errors import UpdateError
from fedloom.tensors import Tensors, by_place

Factors: TypeAlias = tuple[Tensor, Tensor]  # (B, A)

NOISE = 1e-7  # a singular value below it, of the largest, is rounding of float32


def products(tensors: Tensors, scale: float = 1.0) -> dict[str, Factors]:
    """A LoRA's factors, place by place (`folded`)."""
    return {place: folded(leaves, scale) for place, leaves in by_place(tensors).items()}


def folded(leaves: Tensors, scale: float = 1.0) -> Factors:
    """The factors of one place, a gate inside: scale · B (g ∘ A)."""
    A = leaves["A"].double()
    return leaves["B"].double() * scale, A * leaves["gate"].double()[:, None] if "gate" in leaves else A


def adapter(factors: Mapping[str, Factors], least: int = 0) -> dict[str, Tensor]:
    """The tensors of a plain LoRA, float32, with these factors, and with zeros up to `least` ranks."""
    new = {}
    for place, (B, A) in factors.items():
        free = max(0, least - len(A))
        new[f"{place}/A"], new[f"{place}/B"] = F.pad(A, (0, 0, 0, free)).float(), F.pad(B, (0, free)).float()
    return new


def joined(parts: Iterable[tuple[Factors, float]]) -> Factors:
    """The weighted sum of products, of as many ranks as they have together: [w_1 B_1, w_2 B_2, ...] [A_1; A_2; ...]."""
    pairs = [(B * weight, A) for (B, A), weight in parts]
    return torch.cat([B for B, _ in pairs], 1), torch.cat([A for _, A in pairs])


def added(total: Factors | None, factors: Factors, weight: float) -> Factors:
    """A running sum of products. It never has more ranks than the layer: its memory does not grow with the summands."""
    return bounded(joined([(factors, weight)] if total is None else [(total, 1.0), (factors, weight)]))


class Products:
    """The running weighted mean of LoRAs' products, place by place."""

    def __init__(self) -> None:
        self._sums: dict[str, Factors] = {}
        self._total = 0.0

    def add(self, tensors: Tensors, weight: float) -> None:
        self._total += weight
        for place, own in products(tensors).items():
            self._sums[place] = added(self._sums.get(place), own, weight)

    def mean(self, scale: float = 1.0) -> dict[str, Factors]:
        """Times `scale`."""
        return {place: joined([(own, scale / self._total)]) for place, own in self._sums.items()}


def bounded(factors: Factors) -> Factors:
    """The same product, of no more ranks than the layer has."""
    B, A = factors
    return balanced(factors) if A.shape[0] > min(B.shape[0], A.shape[1]) else factors


def weighed(parts: Mapping[str, tuple[Tensors, float]]) -> dict[str, Factors]:
    """The weighted mean of plain LoRAs' products at each place, stacked in the order of the parts' names: B is
    [p_1 B_1, p_2 B_2, ...] and A is [A_1; A_2; ...], whatever ranks they have.

    raises UpdateError: weights that sum to zero
    """
    total = sum(weight for _, weight in parts.values())
    if not total > 0:
        raise UpdateError("there is nothing to average: no site answered with a weight above zero.")
    every = [(products(tensors), weight / total) for _, (tensors, weight) in sorted(parts.items())]
    return {place: joined([(own[place], share) for own, share in every]) for place in every[0][0]}


def beside(own: Tensors, given: Tensors) -> dict[str, Tensor]:
    """Two plain LoRAs as one that adds what both add, of the ranks of both; `given` may lack a place."""
    both = {}
    for name, tensor in own.items():
        axis = 0 if name.endswith("/A") else 1
        both[name] = torch.cat([tensor, given[name]], axis) if name in given else tensor
    return both


def summed(own: Tensors, given: Tensors, ratio: float) -> dict[str, Tensor]:
    """Two LoRAs as a plain one that adds what both add; `ratio`: of the scale of `given` to that of `own`."""
    mine, theirs = products(own), products(given, ratio)
    return adapter({place: joined([(mine[place], 1.0), (theirs[place], 1.0)]) for place in theirs})


def opened(tensors: Tensors) -> dict[str, Tensor]:
    """A LoRA with gates that let all through, where it has none yet."""
    own = by_place(tensors).items()
    return {**tensors, **{f"{place}/gate": torch.ones(len(ls["A"])) for place, ls in own if "gate" not in ls}}


def adds(tensors: Tensors) -> bool:
    """Whether a LoRA changes anything: at its start, where B is zero, it does not."""
    return any(bool(leaves["B"].any()) for leaves in by_place(tensors).values())


def rank(tensors: Tensors) -> int:
    """The largest rank of a LoRA."""
    return max(leaves["A"].shape[0] for leaves in by_place(tensors).values())


def balanced(factors: Factors, rank: int | None = None) -> Factors:
    r"""The product in balanced factors, B A = U S Vᵀ: B' = U √S, A' = √S Vᵀ.

    rank: of the best approximation of at most so many ranks (Eckart & Young, 1936); None: the product itself
    returns: factors of the ranks that are not zero, the largest first, unique where singular values differ: the
        largest entry of each column of U is positive
    """
    B, A = factors
    left, a = torch.linalg.qr(B)
    right, b = torch.linalg.qr(A.T)
    U, S, Vt = torch.linalg.svd(a @ b.T, full_matrices=False)  # of r x r, in place of out x in
    kept = int(S.gt(NOISE * S.max()).sum()) if len(S) else 0
    kept = kept if rank is None else min(kept, rank)
    U, S, V = left @ U[:, :kept], S[:kept].sqrt(), right @ Vt[:kept].T
    sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign() if kept else S[None]
    return U * sign * S, (V * sign * S).T


def norm(factors: Factors) -> float:
    """The Frobenius norm of the product."""
    B, A = factors
    return float(torch.linalg.matrix_norm(torch.linalg.qr(B).R @ torch.linalg.qr(A.T).R.T))


def filled(fresh: Tensors, given: Mapping[str, Factors]) -> dict[str, Tensor]:
    """A LoRA whose products are the best of those given that it has ranks for.

    fresh: a LoRA at the same places; the ranks of A that are not needed stay as they are, behind a B of zeros
    """
    return {
        f"{place}/{leaf}": tensor
        for place, leaves in by_place(fresh).items()
        for leaf, tensor in _filled(leaves, given[place]).items()
    }


def apart(one: Mapping[str, Factors], other: Mapping[str, Factors]) -> tuple[float, float]:
    """The Frobenius distance between two products over all places, and what part it is of the norm of the first."""
    between = sum(norm(joined([(one[place], 1.0), (other[place], -1.0)])) ** 2 for place in one) ** 0.5
    size = sum(norm(factors) ** 2 for factors in one.values()) ** 0.5
    return between, between / size if size else 0.0


def _filled(fresh: Tensors, factors: Factors) -> dict[str, Tensor]:
    B, A = balanced(factors, fresh["A"].shape[0])
    n = A.shape[0]
    free = torch.zeros_like(fresh["B"][:, n:])
    new = {"A": torch.cat([A.float(), fresh["A"][n:]]), "B": torch.cat([B.float(), free], 1)}
    return new | {"gate": torch.cat([torch.ones(n), fresh["gate"][n:]])} if "gate" in fresh else new
