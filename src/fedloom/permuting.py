"""Which units of one adapter are like which of another: by their weights, and by what they do on a site's probe."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fedloom import alignment, rotation, transport
from fedloom.adapters import Bottleneck, LoRA
from fedloom.alignment import Matching, Read
from fedloom.site import Site
from fedloom.tensors import Tensors
from fedloom.transport import Plans


@dataclass(frozen=True)
class Permuting:
    """What units are compared by, how they are matched, and when a match is believed.

    Under `solver = "procrustes"` none are: a LoRA's balanced factors are rotated (`fedloom.rotation`).
    """

    adapter: Bottleneck | LoRA
    cost: alignment.Weights  # what of a unit's weights is compared
    squared: bool
    similarity: Literal["correlation", "euclidean"]  # of pre-activations; of post-activations
    probe: int  # images
    probe_inputs: Literal["shared", "own"]  # whether both read the same on the probe, or each in its own network
    solver: Literal["exact", "emd", "sinkhorn", "random", "procrustes"]
    accept: Literal["always", "gain", "split-half"]
    least_gain: float

    def by_weights(self, source: Tensors, target: Tensors, site: str) -> Plans:
        """For each place, which unit of `source` is like which of `target` in its weights; `site` draws at random."""
        if self.solver == "procrustes":
            return rotation.turned(source, target)
        matching = Matching(self._metric, self.solver, self.accept, self.least_gain)
        return alignment.matched(source, target, self.adapter.symmetry, self.cost, matching, site)

    def by_activations(self, source: Tensors, target: Tensors, site: Site) -> Plans:
        """For each place, which unit of `source` fires like which of `target` on the site's probe."""
        if self.solver == "procrustes":
            return rotation.turned(source, target)
        alike = alignment.decorrelation if self.similarity == "correlation" else self._metric
        matching = Matching(alike, self.solver, self.accept, self.least_gain)
        return alignment.matched_on(
            self._reads(source, target, site), source, target, self.adapter, matching, site.name
        )

    def carried(self, tensors: Tensors, plans: Plans) -> dict[str, Tensor]:
        """An adapter, its units where the plans send them."""
        return transport.carried(tensors, plans, self.adapter.symmetry)

    def _reads(self, source: Tensors, target: Tensors, site: Site) -> Iterator[Read]:
        batch = site.probe(self.probe)
        own = self.probe_inputs == "own"
        theirs = site.model.inputs(batch, self.adapter, source) if own else None
        for place, h, mask in site.model.inputs(batch, self.adapter, target):
            read = h if theirs is None else next(theirs)[1]
            yield place.name, read[mask], h[mask], _first_half(mask)

    @property
    def _metric(self) -> alignment.Distance:
        return alignment.squared if self.squared else alignment.euclidean


def _first_half(mask: Tensor) -> Tensor:
    """Which of the unmasked positions belong to the first half of the probe: tokens of one image are alike."""
    row, position = mask.nonzero(as_tuple=True)
    return row < len(mask) / 2 if len(mask) > 1 else position % 2 == 0
