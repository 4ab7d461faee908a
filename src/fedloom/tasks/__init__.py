"""Tasks: what a site is asked to learn.

A task turns features into logits, and knows its loss, its head and its metrics. Without `labels` it is not yet ready:
in a recipe, they are those of the data.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from torch import Tensor

from fedloom.backbones.batches import Features
from fedloom.labels import Label
from fedloom.tasks.answering import VQA, Ranking
from fedloom.tasks.classification import Classification
from fedloom.tasks.detection import Detection
from fedloom.tensors import Tensors

__all__ = ["TASKS", "VQA", "Classification", "Detection", "Ranking", "Task"]


class Task(Protocol):
    """What a site is asked to learn; frozen, and the same at all sites that share a label space."""

    @property
    def metric(self) -> str:
        """The first of its metrics, the one by which sites are compared; higher is better."""

    @property
    def labels(self) -> tuple[str, ...]:
        """What it chooses from."""

    @property
    def candidates(self) -> tuple[str, ...] | None:
        """The texts that every example is scored against, where the task has no head."""

    @property
    def reads(self) -> Literal["question", "text"]:
        """What an example's text is to it."""

    def init(self, dim: int, seed: int) -> Tensors:
        """A fresh head for features of this width, names under head/; empty where the task has none."""

    def targets(self, labels: Sequence[Label]) -> Tensor:
        """The labels of n examples as numbers: (n) or (n, labels)."""

    def logits(self, features: Features, tensors: Tensors) -> Tensor:
        """(n, labels), by the head under head/ if there is one."""

    def scores(self, logits: Tensor) -> Tensor:
        """(n, labels): how probable each label is, among all where one is chosen, else by itself."""

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """A scalar, the mean over the examples."""

    def metrics(self, logits: Tensor, targets: Tensor) -> Mapping[str, float]:
        """`metric` first; fractions between 0 and 1. One that these targets leave undefined is not there."""

    def parts(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(n, 2): what each example adds to the numerator and to the denominator of `metric`."""

    def judged(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(m) and (m): probabilities that were given, and how far they came true, 0 to 1: of the label chosen, or of
        every label where each is judged by itself."""

    def undefined(self, targets: Tensor) -> tuple[str, ...]:
        """The labels that no class-wise metric speaks of on these targets, to be named beside it."""


TASKS: Mapping[str, type[Task]] = {
    "classification": Classification,
    "detection": Detection,
    "ranking": Ranking,
    "vqa": VQA,
}
