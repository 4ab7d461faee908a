"""One answer a question: chosen among labels by a head, or ranked as texts by the backbone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from fedloom.backbones.batches import Features
from fedloom.errors import DataError
from fedloom.heads import apply_linear, apply_mlp, linear, mlp
from fedloom.labels import Label, once, soft_cross_entropy, soft_scores
from fedloom.metrics import answered, chosen, loss_of, of_one
from fedloom.tensors import Tensors


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
        once(self.labels, "answer")

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
        return answered(logits, targets) | loss_of(self.loss(logits, targets))

    def parts(self, logits: Tensor, targets: Tensor) -> Tensor:
        return of_one(chosen(logits, targets))

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
        once(self.labels, "answer")

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
        return answered(logits, targets) | loss_of(self.loss(logits, targets))

    def parts(self, logits: Tensor, targets: Tensor) -> Tensor:
        return of_one(chosen(logits, targets))

    def judged(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self.scores(logits).amax(-1), chosen(logits, targets)

    def undefined(self, targets: Tensor) -> tuple[str, ...]:
        return ()
