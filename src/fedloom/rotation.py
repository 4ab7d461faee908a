r"""The symmetry of a low-rank update beyond permutations: rotations of its balanced factors.

B A is the same for B G and G⁻¹ A of any invertible G. Balancing both factors leaves the orthogonal G, of which
permutations are a part.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fedloom import lowrank
from fedloom.adapters import LoRA
from fedloom.places import Symmetry
from fedloom.tensors import Tensors, at, by_place, mean
from fedloom.transport import Plans, along, carried

Rule: TypeAlias = Literal["factors", "procrustes", "product"]


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal map (r, r) of balanced factors; what it moves is balanced first, and brought to r ranks."""

    matrix: Tensor

    def moved(self, leaves: Tensors, symmetry: Symmetry) -> dict[str, Tensor]:
        return along(self._turned, balanced(leaves, len(self.matrix)), symmetry)

    def _turned(self, tensor: Tensor, axis: int) -> Tensor:
        if tensor.dim() == 1:  # gates, which balancing has folded in
            return tensor
        moved: Tensor = torch.tensordot(tensor.double(), self.matrix, dims=([axis], [1]))
        return moved.movedim(-1, axis).to(tensor.dtype).contiguous()

    def units(self) -> Tensor:
        return self.matrix.abs().argmax(1)


def rotated(source: Tensors, target: Tensors) -> Rotation:
    r"""The rotation that brings the balanced factors of `source` closest to those of `target` (orthogonal Procrustes).

    .. math:: A_G A_k^\top + B_G^\top B_k = U S V^\top, \qquad R = U V^\top, \qquad A_k \to R A_k, \; B_k \to B_k R^\top

    source, target: the leaves of one place; `target` as it is, and `source` at its rank
    """
    own = balanced(source, target["A"].shape[0])
    cross = target["A"].double() @ own["A"].double().T + target["B"].double().T @ own["B"].double()
    u, _, vh = torch.linalg.svd(cross)
    return Rotation(u @ vh)


def turned(source: Tensors, target: Tensors) -> Plans:
    """For each place, the rotation of the balanced factors of `source` to those of `target` as they are."""
    targets = by_place(target)
    return {place: (rotated(leaves, targets[place]), None) for place, leaves in by_place(source).items()}


def merged(
    given: Tensors, updates: Iterable[tuple[Tensors, float]], rule: Rule, adapter: LoRA
) -> tuple[dict[str, Tensor], float, float]:
    """The mean of LoRAs, folded one by one.

    factors      the mean of A and that of B; another rank is first brought to that of `given`
    procrustes   the same, of factors that are balanced and turned towards those of `given`
    product      the best factors of the mean of products that `given` has ranks for

    returns: the tensors; how far their products are from the mean of products, in effective weights, over all places
        (Frobenius), and what part that is of its norm
    """
    true = lowrank.Products()

    def folded() -> Iterator[tuple[Tensors, float]]:
        for own, weight in updates:
            true.add(own, weight)
            if rule == "procrustes":
                yield carried(own, turned(own, given), adapter.symmetry), weight
            elif rule == "product":
                yield {}, weight
            else:
                alike = all(own[name].shape == given[name].shape for name in given)
                yield own if alike else lowrank.filled(given, lowrank.products(own)), weight

    new = mean(folded())
    if rule != "factors":
        new = lowrank.filled(given, lowrank.products(new) or true.mean())
    common = lowrank.products(new)
    residual, relative = lowrank.apart(true.mean(), common)
    return new, residual * adapter.scale, relative


def evened(tensors: Tensors) -> dict[str, Tensor]:
    """A whole LoRA in balanced factors."""
    return {name: t for place, leaves in by_place(tensors).items() for name, t in at(place, balanced(leaves)).items()}


def balanced(leaves: Tensors, rank: int | None = None) -> dict[str, Tensor]:
    """The same update in balanced factors (`lowrank.balanced`), gates folded in; ranks that it does not need are zeros.

    rank: of another number of ranks, the best of them; None: of as many as it has
    """
    rank = leaves["A"].shape[0] if rank is None else rank
    B, A = lowrank.balanced(lowrank.folded(leaves), rank)
    free = rank - A.shape[0]
    even = {"A": torch.cat([A, A.new_zeros(free, A.shape[1])]), "B": torch.cat([B, B.new_zeros(B.shape[0], free)], 1)}
    if "gate" in leaves:
        even["gate"] = torch.ones(len(even["A"]))
    return {leaf: even[leaf].to(tensor.dtype) for leaf, tensor in leaves.items()}
