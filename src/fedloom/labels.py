"""Labels as numbers: what a source calls its classes and answers, and the scores that a task is trained on."""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fedloom.errors import DataError

Label = str | tuple[str, ...]


def vocabulary(labels: Iterable[Label], minimum: int = 1) -> tuple[str, ...]:
    """The labels or answers of at least `minimum` examples, in alphabetical order."""
    counts = Counter(label for one in labels for label in set(several(one)))
    return tuple(sorted(label for label, count in counts.items() if count >= minimum))


def widen(logits: Tensor, labels: Sequence[str], union: Sequence[str]) -> Tensor:
    """Logits (n, labels) over a larger label set, (n, union): -∞, never chosen, where `labels` has no such label."""
    wide = logits.new_full((len(logits), len(union)), -torch.inf)
    wide[:, [union.index(label) for label in labels]] = logits
    return wide


def soft_scores(labels: Sequence[Label], answers: Sequence[str]) -> Tensor:
    """(n, answers): min(1, 3c/k) where c of an example's k given answers are this one."""
    number = {answer: i for i, answer in enumerate(answers)}
    scores = torch.zeros(len(labels), len(answers))
    for row, own in zip(scores, labels, strict=True):
        for answer, count in Counter(given := several(own)).items():
            if answer in number:
                row[number[answer]] = min(1.0, 3 * count / len(given))
    return scores


def soft_cross_entropy(logits: Tensor, scores: Tensor) -> Tensor:
    """Mean over the examples of -Σ_a p_a log softmax(logits)_a, p the scores made to sum to one; 0 where all are 0."""
    share = scores / scores.sum(1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    return -(share * logits.log_softmax(1)).sum(1).mean()


def several(label: Label) -> tuple[str, ...]:
    """The labels of one example."""
    return (label,) if isinstance(label, str) else label


def once(labels: Sequence[str], what: str) -> None:
    """Raises DataError where one of a task's labels stands twice; `what` they are: answers, labels."""
    if twice := [label for label, count in Counter(labels).items() if count > 1]:
        raise DataError(f"the task needs each {what} once; twice: {twice}.")
