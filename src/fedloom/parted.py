"""Several adapters in one pass, each at rows of its own: of two branches of one site, or of several sites."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from fedloom.places import Added, Place, Symmetry
from fedloom.tensors import Tensors, shapes, under


@dataclass(frozen=True)
class Parted:
    """The i-th of as many equal parts of the rows goes through the i-th adapter, whose tensors are named `i/...`.

    Where all parts are alike, they are one batched product; in float32 that differs from one after the other by
    rounding.
    """

    adapters: tuple[Added, ...]

    symmetry: ClassVar[Symmetry] = {}  # each part keeps its own hidden units

    def at(self, place: Place) -> bool:
        return any(adapter.at(place) for adapter in self.adapters)

    def init(self, place: Place, rng: Generator) -> Tensors:
        made = {i: part.init(place, rng) for i, part in enumerate(self.adapters) if part.at(place)}
        return {f"{i}/{leaf}": tensor for i, leaves in made.items() for leaf, tensor in leaves.items()}

    def pre(self, h: Tensor, tensors: Tensors) -> Tensor:
        parts = zip(h.chunk(len(self.adapters)), self.adapters, self._own(tensors), strict=True)
        return torch.cat([adapter.pre(rows, own) for rows, adapter, own in parts])

    def __call__(self, h: Tensor, tensors: Tensors) -> Tensor:
        n = len(self.adapters)
        if stacked := self.stacked(tensors):
            added: Tensor = torch.vmap(self.adapters[0])(h.view(n, -1, *h.shape[1:]), stacked)
            return added.flatten(0, 1)
        parts = zip(h.chunk(n), self.adapters, self._own(tensors), strict=True)
        return torch.cat([adapter(rows, leaves) for rows, adapter, leaves in parts])

    def stacked(self, tensors: Tensors) -> dict[str, Tensor] | None:
        """The tensors of all parts as one, (parts, ...) each, by leaf; None where the parts are not alike."""
        own = self._own(tensors)
        alike = len(set(self.adapters)) == 1 and all(shapes(leaves) == shapes(own[0]) for leaves in own)
        return {leaf: torch.stack([leaves[leaf] for leaves in own]) for leaf in own[0]} if alike else None

    def _own(self, tensors: Tensors) -> list[dict[str, Tensor]]:
        return [under(str(i), tensors) for i in range(len(self.adapters))]
