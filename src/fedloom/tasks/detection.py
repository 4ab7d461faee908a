"""Any number of labels an example."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedloom.backbones.batches import Features
from fedloom.errors import DataError
from fedloom.heads import apply_linear, linear
from fedloom.labels import Label, once, several
from fedloom.metrics import loss_of, multi_label, one_sided
from fedloom.sources import suggestion
from fedloom.tensors import Tensors


@dataclass(frozen=True)
class Detection:
    """Any number of labels an example (diseases in an image and its report), by binary cross-entropy, the mean over
    labels and examples; the head is W f + b on the normalised features f, from zero.

    Metrics: f1_micro, f1_macro, auroc, average_precision, ece, loss, as in `fedloom.metrics.multi_label`. A label is
    found where its probability is above one half. Labels without a positive or without a negative example are left out
    of f1_macro, auroc and average_precision, and named by `undefined`.
    """

    labels: tuple[str, ...] = ()

    metric: ClassVar[str] = "f1_micro"
    reads: ClassVar[Literal["text"]] = "text"

    def __post_init__(self) -> None:
        once(self.labels, "label")

    @property
    def candidates(self) -> tuple[str, ...] | None:
        return None

    def init(self, dim: int, seed: int) -> Tensors:
        return linear(dim, len(self.labels))

    def targets(self, labels: Sequence[Label]) -> Tensor:
        """(n, labels), 1 where the example has the label; raises DataError at one that is not among `labels`."""
        number = {label: i for i, label in enumerate(self.labels)}
        targets = torch.zeros(len(labels), len(self.labels))
        for row, own in zip(targets, labels, strict=True):
            for label in several(own):
                if label not in number:
                    raise DataError(
                        f"label '{label}' is none of the task's{suggestion(label, self.labels)}; "
                        f"these are {', '.join(self.labels)}."
                    )
                row[number[label]] = 1
        return targets

    def logits(self, features: Features, tensors: Tensors) -> Tensor:
        return apply_linear(features.pooled, tensors)

    def scores(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, targets)

    def metrics(self, logits: Tensor, targets: Tensor) -> Mapping[str, float]:
        return multi_label(logits.sigmoid(), targets) | loss_of(self.loss(logits, targets))

    def parts(self, logits: Tensor, targets: Tensor) -> Tensor:
        found, there = logits.sigmoid() > 0.5, targets.bool()
        return torch.stack([2 * (found & there).sum(1), found.sum(1) + there.sum(1)], 1).double()

    def judged(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return logits.sigmoid().flatten(), targets.double().flatten()

    def undefined(self, targets: Tensor) -> tuple[str, ...]:
        return tuple(label for label, silent in zip(self.labels, one_sided(targets).tolist(), strict=True) if silent)
