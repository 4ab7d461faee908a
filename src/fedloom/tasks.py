"""Tasks: what a site is asked to learn.

A task turns features into logits, and knows its loss, its head and its metrics. Without `labels` it is not yet ready:
in a recipe, they are those of the data.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fedloom.backbones.adaptable import Features
from fedloom.errors import DataError
from fedloom.heads import apply_linear, apply_mlp, linear, mlp
from fedloom.labels import Label, several, soft_cross_entropy, soft_scores
from fedloom.metrics import answered, chosen, multi_label, one_sided
from fedloom.sources import suggestion
from fedloom.tensors import Tensors


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
        return tuple(self.template.format(label) for label in self.labels) if self.head == "prompts" else None

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
        return {"accuracy": float(right)} | _finite(self.loss(logits, targets))

    def parts(self, logits: Tensor, targets: Tensor) -> Tensor:
        return _of_one((logits.argmax(-1) == targets).double())

    def judged(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self.scores(logits).amax(-1), (logits.argmax(-1) == targets).double()

    def undefined(self, targets: Tensor) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class VQA:
    r"""Visual question answering as a choice among `labels`, the answers of this site or of all.

    Targets are soft scores, min(1, 3c/k) for an answer that c of an example's k annotators gave: the VQA accuracy of
    Antol et al. (2015, arXiv 1505.00468), averaged over the annotators left out one at a time, to the digit where
    k = 10; a single answer, and each of up to three accepted ones, scores 1.

    head = "mlp": d -> 2d -> layer norm -> GELU -> answers, that of ViLT and FedDAT (and of Hugging Face's
    ViltForQuestionAnswering), both matrices from N(0, 0.02);
    "linear": W f + b on the normalised features f, from zero.
    objective = "bce": binary cross-entropy, summed over the answers (FedDAT's mean times their number);
    "cross_entropy": between the softmax and the scores made to sum to one.

    Metrics: accuracy, the mean score of the answer chosen; unseen, the share of examples none of whose answers is among
    `labels`, each of them wrong; loss.
    """

    labels: tuple[str, ...] = ()
    head: Literal["mlp", "linear"] = "mlp"
    objective: Literal["bce", "cross_entropy"] = "bce"

    metric: ClassVar[str] = "accuracy"
    reads: ClassVar[Literal["question"]] = "question"

    def __post_init__(self) -> None:
        _check(self.labels, "answer")

    @property
    def candidates(self) -> tuple[str, ...] | None:
        return None

    def init(self, dim: int, seed: int) -> Tensors:
        return mlp(dim, len(self.labels), seed) if self.head == "mlp" else linear(dim, len(self.labels))

    def targets(self, labels: Sequence[Label]) -> Tensor:
        return soft_scores(labels, self.labels)

    def logits(self, features: Features, tensors: Tensors) -> Tensor:
        apply = apply_mlp if self.head == "mlp" else apply_linear
        return apply(features.pooled, tensors)

    def scores(self, logits: Tensor) -> Tensor:
        return logits.sigmoid() if self.objective == "bce" else logits.softmax(-1)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.objective == "cross_entropy":
            return soft_cross_entropy(logits, targets)
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1).mean()

    def metrics(self, logits: Tensor, targets: Tensor) -> Mapping[str, float]:
        return answered(logits, targets) | _finite(self.loss(logits, targets))

    def parts(self, logits: Tensor, targets: Tensor) -> Tensor:
        return _of_one(chosen(logits, targets))

    def judged(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self.scores(logits).amax(-1), chosen(logits, targets)

    def undefined(self, targets: Tensor) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class Ranking:
    """Visual question answering by ranking: the backbone scores every answer of `labels` as a text, there is no head.

    Targets and metrics are those of `VQA`; the loss is the cross-entropy of the softmax over the candidates.

    Deviation from ALBEF, which trains its decoder on the likelihood of the right answers alone and ranks only when it
    is asked: here training and asking are one computation, and the wrong candidates are pushed down too.
    """

    labels: tuple[str, ...] = ()

    metric: ClassVar[str] = "accuracy"
    reads: ClassVar[Literal["question"]] = "question"

    def __post_init__(self) -> None:
        _check(self.labels, "answer")

    @property
    def candidates(self) -> tuple[str, ...] | None:
        return self.labels

    def init(self, dim: int, seed: int) -> Tensors:
        return {}

    def targets(self, labels: Sequence[Label]) -> Tensor:
        return soft_scores(labels, self.labels)

    def logits(self, features: Features, tensors: Tensors) -> Tensor:
        if features.scores is None:
            raise DataError("this backbone ranks no candidate answers; set kind = 'vqa' in [task], or take an ALBEF.")
        return features.scores

    def scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return soft_cross_entropy(logits, targets)

    def metrics(self, logits: Tensor, targets: Tensor) -> Mapping[str, float]:
        return answered(logits, targets) | _finite(self.loss(logits, targets))

    def parts(self, logits: Tensor, targets: Tensor) -> Tensor:
        return _of_one(chosen(logits, targets))

    def judged(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self.scores(logits).amax(-1), chosen(logits, targets)

    def undefined(self, targets: Tensor) -> tuple[str, ...]:
        return ()


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
        _check(self.labels, "label")

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
        return multi_label(logits.sigmoid(), targets) | _finite(self.loss(logits, targets))

    def parts(self, logits: Tensor, targets: Tensor) -> Tensor:
        found, there = logits.sigmoid() > 0.5, targets.bool()
        return torch.stack([2 * (found & there).sum(1), found.sum(1) + there.sum(1)], 1).double()

    def judged(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return logits.sigmoid().flatten(), targets.double().flatten()

    def undefined(self, targets: Tensor) -> tuple[str, ...]:
        return tuple(label for label, silent in zip(self.labels, one_sided(targets).tolist(), strict=True) if silent)


def _check(labels: Sequence[str], what: str) -> None:
    if twice := [label for label, count in Counter(labels).items() if count > 1]:
        raise DataError(f"the task needs each {what} once; twice: {twice}.")


def _of_one(scores: Tensor) -> Tensor:
    return torch.stack([scores, torch.ones_like(scores)], 1)


def _finite(loss: Tensor) -> dict[str, float]:
    """No loss is told over labels that a site does not know."""
    return {"loss": float(loss)} if loss.isfinite() else {}


TASKS: Mapping[str, type[Task]] = {
    "classification": Classification,
    "detection": Detection,
    "ranking": Ranking,
    "vqa": VQA,
}
