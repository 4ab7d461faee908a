"""What goes into a backbone, and what comes out."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from fedloom.tensors import Tensors


@dataclass(frozen=True)
class Batch:
    """n examples, as a backbone takes them."""

    targets: Tensor  # (n) class numbers, or (n, classes) soft or several-hot scores
    images: Tensor | None = None  # (n, 3, height, width) uint8; where sizes differ a fourth channel, 0 in the padding
    texts: tuple[str, ...] | None = None  # n questions, reports or sentences
    candidates: tuple[str, ...] | None = None  # what each example is scored against: class prompts, captions, answers
    prefix: Tensors = field(default_factory=dict)  # what a frozen prefix made of the examples, (n, ...) each

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> "Batch":
        """What a backbone reads of it on its device; the targets, which it does not read, where they are."""
        if device.type == "cpu":
            return self
        images = None if self.images is None else self.images.to(device)
        return replace(self, images=images, prefix={name: tensor.to(device) for name, tensor in self.prefix.items()})


@dataclass(frozen=True)
class Features:
    """What a backbone makes of a batch."""

    pooled: Tensor  # (n, dim), for a head
    scores: Tensor | None = None  # (n, candidates) logits, where the batch has candidates

    def to(self, device: torch.device) -> "Features":
        """The same, on a device; gradients go back to where they came from."""
        return Features(self.pooled.to(device), None if self.scores is None else self.scores.to(device))


def form(batch: Batch) -> tuple[object, ...]:
    """What must be equal in batches that become one."""
    images = None if batch.images is None else batch.images.shape
    prefix = tuple((name, tensor.shape) for name, tensor in batch.prefix.items())
    return len(batch), images, batch.texts is None, batch.candidates, prefix


def joined(batches: Sequence[Batch]) -> Batch:
    """Batches of one form, one after the other; their targets, which no backbone reads, are left out."""
    first = batches[0]
    return Batch(
        torch.zeros(sum(map(len, batches))),
        None if first.images is None else torch.cat([cast(Tensor, batch.images) for batch in batches]),
        None if first.texts is None else tuple(text for batch in batches for text in batch.texts or ()),
        first.candidates,
        {name: torch.cat([batch.prefix[name] for batch in batches]) for name in first.prefix},
    )
