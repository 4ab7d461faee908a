"""One class an example."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedloom.backbones.batches import Features
from fedloom.errors import DataError
from fedloom.heads import apply_linear, linear
from fedloom.labels import Label
from fedloom.metrics import loss_of, of_one
from fedloom.tensors import Tensors


@dataclass(frozen=True)
class Classification:
    """One class an example, by cross-entropy.

    head = "prompts": logits are the similarities to one text a class, `template` filled with its name (CLIP);
           "linear":  W f + b on the normalised features f, W and b starting at zero.
    Metrics: accuracy; cross-entropy in nats. A target of -1 (a label outside `labels`) counts as wrong.
    """

    labels: tuple[str, ...] = ()
    template: str = "a photo of a {}."
    head: Literal["prompts", "linear"] = "prompts"

    metric: ClassVar[str] = "accuracy"
    reads: ClassVar[Literal["text"]] = "text"

    def __post_init__(self) -> None:
        if self.labels and len(set(self.labels)) < 2:
            raise DataError(f"a classification needs two classes or more, and there are {list(self.labels)}.")
        if self.head == "prompts" and "{}" not in self.template:
            raise DataError(f"the template {self.template!r} has no '{{}}' for the class name.")

    @property
    def candidates(self) -> tuple[str, ...] | None:
        return tuple(self.template.replace("{}", label) for label in self.labels) if self.head == "prompts" else None

    def init(self, dim: int, seed: int) -> Tensors:
        return linear(dim, len(self.labels)) if self.head == "linear" else {}

    def targets(self, labels: Sequence[Label]) -> Tensor:
        number = {label: i for i, label in enumerate(self.labels)}
        return torch.tensor([number.get(str(label), -1) for label in labels])

    def logits(self, features: Features, tensors: Tensors) -> Tensor:
        if self.head == "linear":
            return apply_linear(features.pooled, tensors)
        if features.scores is None:
            raise DataError(
                "head = 'prompts' compares images with class texts, which takes examples with an image and a CLIP or "
                "SigLIP; set head = 'linear' in [task]."
            )
        return features.scores

    def scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        if not targets.ne(-1).any():  # unknown labels alone teach nothing, and the library's mean of none is nan
            return logits.sum() * 0
        return F.cross_entropy(logits, targets, ignore_index=-1)

    def metrics(self, logits: Tensor, targets: Tensor) -> Mapping[str, float]:
        right = (logits.argmax(-1) == targets).double().mean()
        return {"accuracy": float(right)} | loss_of(self.loss(logits, targets))

    def parts(self, logits: Tensor, targets: Tensor) -> Tensor:
        return of_one((logits.argmax(-1) == targets).double())

    def judged(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self.scores(logits).amax(-1), (logits.argmax(-1) == targets).double()

    def undefined(self, targets: Tensor) -> tuple[str, ...]:
        return ()
