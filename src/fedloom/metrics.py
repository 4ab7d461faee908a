"""Metrics; silence is left out, never averaged over."""

import torch
from torch import Tensor

BINS = 15


def answered(logits: Tensor, scores: Tensor) -> dict[str, float]:
    """Accuracy, the mean score of the answer chosen; and unseen, the share of examples with no score at all."""
    return {"accuracy": float(chosen(logits, scores).mean()), "unseen": float((scores.sum(1) == 0).double().mean())}


def chosen(logits: Tensor, scores: Tensor) -> Tensor:
    """(n): the score of the answer chosen, of scores (n, answers)."""
    return scores.gather(1, logits.argmax(1, keepdim=True)).squeeze(1).double()


def multi_label(probabilities: Tensor, targets: Tensor) -> dict[str, float]:
    """Of probabilities (n, labels) and targets (n, labels) of 0 and 1; one that is undefined on these is not there.

    f1_micro: 2TP / (2TP + FP + FN) over all pairs of example and label, found where the probability is above one half;
    f1_macro, auroc (area under the receiver operating characteristic), average_precision (the step-wise area under
    precision over recall): the mean over the labels that are not `one_sided`;
    ece: see `calibration_error`.
    """
    from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

    scores, truth = probabilities.double().numpy(), targets.bool().numpy()
    found = scores > 0.5
    metrics = {}
    if (found | truth).any():
        metrics["f1_micro"] = float(f1_score(truth.ravel(), found.ravel()))
    if (both := ~one_sided(targets).numpy()).any():
        scored = truth[:, both], scores[:, both]
        each = [f1_score(true, mine) for true, mine in zip(scored[0].T, found[:, both].T, strict=True)]
        metrics |= {
            "f1_macro": float(sum(each) / len(each)),
            "auroc": float(roc_auc_score(*scored)),
            "average_precision": float(average_precision_score(*scored)),
        }
    return metrics | {"ece": calibration_error(probabilities, targets)}


def one_sided(targets: Tensor) -> Tensor:
    """Which labels are positive in no example, or in all: (labels) bool."""
    positive = targets.bool()
    return ~positive.any(0) | positive.all(0)


def by_label(probabilities: Tensor, targets: Tensor) -> list[dict[str, float]]:
    """Of each label, as `multi_label` takes them: `positives`, how many examples have it, and what is defined of

    sensitivity: of the examples that have the label, the share in which it was found (probability above one half);
    specificity: of those that have it not, the share in which it was not found;
    auroc, auprc: the areas under the receiver operating characteristic and, step by step, under precision over recall.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    found = []
    for p, there in zip(probabilities.double().T.numpy(), targets.bool().T.numpy(), strict=True):
        own = {"positives": float(there.sum())}
        if there.any():
            own["sensitivity"] = float((p[there] > 0.5).mean())
        if not there.all():
            own["specificity"] = float((p[~there] <= 0.5).mean())
        if there.any() and not there.all():
            own |= {"auroc": float(roc_auc_score(there, p)), "auprc": float(average_precision_score(there, p))}
        found.append(own)
    return found


def calibration_error(probabilities: Tensor, targets: Tensor) -> float:
    r"""Expected calibration error (Naeini et al., 2015) of single probabilities, over all pairs of example and label.

    .. math:: \sum_b \frac{|b|}{N} \left| \bar p_b - \bar y_b \right|

    b: 15 bins of equal width over [0, 1], by the probability that the label is there; mean probability against the
    share of pairs in which it is. (The error of a multi-class model bins the largest probability instead.)
    """
    bins = reliability(probabilities, targets)
    return float((bins[:, 1] - bins[:, 2]).abs().sum() / bins[:, 0].sum())


def reliability(probabilities: Tensor, targets: Tensor) -> Tensor:
    """(15, 3): of each bin of `calibration_error` how many probabilities, their sum, and the sum of their targets."""
    p, y = probabilities.double().flatten(), targets.double().flatten()
    bins = (p * BINS).long().clamp(max=BINS - 1)
    return torch.zeros(BINS, 3, dtype=torch.float64).index_add_(0, bins, torch.stack([torch.ones_like(p), p, y], 1))


def of_one(scores: Tensor) -> Tensor:
    """(n, 2): the parts of a mean over examples, which each adds its score and one to."""
    return torch.stack([scores, torch.ones_like(scores)], 1)


def loss_of(value: Tensor) -> dict[str, float]:
    """A loss as a metric; none is told over labels that a site does not know."""
    return {"loss": float(value)} if value.isfinite() else {}
