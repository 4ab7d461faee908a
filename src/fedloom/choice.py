"""What a site chooses for itself, on its held-out examples: on training examples its own always wins."""

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fedloom.backbones.batches import Batch
from fedloom.places import Adapter
from fedloom.site import Site
from fedloom.tensors import Tensors

Predict: TypeAlias = Callable[[Batch], Tensor]

BLENDS = (1.0, 0.75, 0.5, 0.25, 0.0)  # weights that are tried; of two as good, the first


@torch.no_grad()
def best(site: Site, kind: Adapter, candidates: Sequence[tuple[Tensors, float]]) -> tuple[Tensors, float]:
    """The candidate of least loss: tensors of an adapter and a head, and what the candidate is called by."""

    def loss(candidate: tuple[Tensors, float]) -> float:
        passes = site.passes(site.held_out)
        return sum(float(site.loss(kind, candidate[0], batch)) * len(batch) for batch in passes)

    return min(candidates, key=loss)


@torch.no_grad()
def blend(site: Site, local: Predict, given: Predict) -> float:
    """The weight of the logits `local` beside `given` of least loss, of BLENDS."""
    passes = list(site.passes(site.held_out))
    own, other = (torch.cat([predict(batch) for batch in passes]) for predict in (local, given))
    targets = torch.cat([batch.targets for batch in passes])

    def loss(weight: float) -> float:
        value = float(site.task.loss(torch.lerp(other, own, weight), targets))
        return value if math.isfinite(value) else math.inf

    return min(BLENDS, key=loss)
