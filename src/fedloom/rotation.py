r"""The symmetry of a low-rank update beyond permutations: rotations of its balanced factors.

B A is the same for B G and G⁻¹ A of any invertible G. Balancing both factors leaves the orthogonal G, of which
permutations are a part.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom import lowrank
from fedloom.places import Symmetry
from fedloom.tensors import Tensors, by_place
from fedloom.transport import Plans, along


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal map (r, r) of balanced factors; what it moves is balanced first."""

    matrix: Tensor

    def moved(self, leaves: Tensors, symmetry: Symmetry) -> dict[str, Tensor]:
        return along(self._turned, balanced(leaves), symmetry)

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

    source, target: the leaves of one place, of one rank; `target` as it is
    """
    own = balanced(source)
    cross = target["A"].double() @ own["A"].double().T + target["B"].double().T @ own["B"].double()
    u, _, vh = torch.linalg.svd(cross)
    return Rotation(u @ vh)


def turned(source: Tensors, target: Tensors) -> Plans:
    """For each place, the rotation of the factors of `source` to the balanced ones of `target`."""
    targets = by_place(target)
    return {place: (rotated(leaves, balanced(targets[place])), 0.0) for place, leaves in by_place(source).items()}


def balanced(leaves: Tensors) -> dict[str, Tensor]:
    """The same update of the same rank in balanced factors (`lowrank.balanced`), gates folded in; ranks that it does
    not need are zeros."""
    B, A = lowrank.balanced(lowrank.folded(leaves))
    free = leaves["A"].shape[0] - A.shape[0]
    even = {"A": torch.cat([A, A.new_zeros(free, A.shape[1])]), "B": torch.cat([B, B.new_zeros(B.shape[0], free)], 1)}
    if "gate" in leaves:
        even["gate"] = torch.ones(len(even["A"]))
    return {leaf: even[leaf].to(tensor.dtype) for leaf, tensor in leaves.items()}
