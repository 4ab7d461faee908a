"""What a site serves: one adapter and one head, or several of them and a rule.

A method's `serve` may return any function of a batch. What it returns as a value of these two can be exported.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.backbones.batches import Batch
from fedloom.places import Adapter
from fedloom.site import Site
from fedloom.tensors import Tensors


@dataclass(frozen=True)
class Served:
    """The predictor of one adapter and one head."""

    site: Site
    adapter: Adapter
    tensors: Tensors  # the adapter's, and the head's under head/

    def __call__(self, batch: Batch) -> Tensor:
        """Logits, (n, labels)."""
        return self.site.logits(self.adapter, self.tensors, batch)


@dataclass(frozen=True)
class Blend:
    """A predictor that makes one answer of several."""

    parts: Mapping[str, Served]
    mix: Callable[[Mapping[str, Tensor]], Tensor]  # of the logits of each part
    rule: str  # what `mix` does, in words
    alone: str  # the option under which the method serves one adapter

    def __call__(self, batch: Batch) -> Tensor:
        """Logits, (n, labels)."""
        return self.mix({name: part(batch) for name, part in self.parts.items()})


def blended(parts: Mapping[str, Served], weight: float, alone: str) -> Served | Blend:
    """A mean of two parts' logits, `weight` of those of the first; where one has all of it, that one by itself."""
    first, second = parts
    if weight in (0.0, 1.0):
        return parts[first if weight else second]
    return Blend(
        parts,
        lambda logits: torch.lerp(logits[second], logits[first], weight),
        f"the mean of the logits, {weight:.6g} of those of '{first}' and the rest of '{second}'",
        alone,
    )
