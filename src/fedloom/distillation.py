"""What one branch of a model learns: from its batch, and from what another branch makes of it."""

import logging
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedloom.backbones.batches import Batch, Features
from fedloom.errors import MethodError
from fedloom.site import Site
from fedloom.tasks import Classification, Detection, Task
from fedloom.tensors import Tensors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lesson:
    """CE + γ KL, over the task's labels (`classes`) or over the pairs of a batch (`contrastive`).

    caption: what an image is told to be, `{}` its class; None: the task's template
    """

    loss: Literal["classes", "contrastive"]
    caption: str | None
    temperature: float  # T

    def fits(self, task: Task) -> None:
        """raises MethodError: the task has no captions, and they are asked for"""
        if (self.loss == "contrastive" or self.caption) and not (isinstance(task, Classification) and task.candidates):
            asked = "loss = 'contrastive'" if self.loss == "contrastive" else "caption"
            raise MethodError(
                f"{asked} compares images with the captions of their classes, and this task has none; in [method] set "
                "loss = 'classes' and no caption, or in [task] kind = 'classification' and head = 'prompts'."
            )

    def greet(self, site: Site) -> None:
        """What is said to a site in its first round.

        raises MethodError: as `fits`
        """
        self.fits(site.task)
        if self.loss == "contrastive" and len({example.label for example in site.train.examples}) == 1:
            log.warning(
                "site '%s' has examples of one class: in its batches every caption is the same, and the contrastive "
                "loss cannot say which is right; set loss = 'classes' in [method].",
                site.name,
            )

    def told(self, task: Task, batch: Batch) -> Batch:
        """The batch with its training captions."""
        if self.caption is None:
            return batch
        return replace(batch, candidates=tuple(self.caption.replace("{}", label) for label in task.labels))

    def logits(self, task: Task, features: Features, tensors: Tensors, batch: Batch) -> Tensor:
        """(n, labels); contrastive: (n, n)."""
        logits = task.logits(features, tensors)
        return logits if self.loss == "classes" else pairs(logits, batch.targets)

    def value(self, task: Task, student: Tensor, teacher: Tensor, gamma: float, batch: Batch) -> Tensor:
        """CE + γ KL, a scalar; 0 of a batch without a pair."""
        if not student.numel():
            return student.sum()
        if self.loss == "contrastive":
            ce = contrast(student)
            return ce + gamma * divergence_of_pairs(student, teacher, self.temperature) if gamma else ce
        ce, by_label = task.loss(student, batch.targets), isinstance(task, Detection)
        return ce + gamma * divergence(student, teacher, self.temperature, by_label) if gamma else ce


def divergence(student: Tensor, teacher: Tensor, temperature: float, independent: bool = False) -> Tensor:
    r"""Knowledge distillation (Hinton et al., 2015, arXiv 1503.02531), logits (n, classes) each:

    .. math:: T^2 \cdot \tfrac1n \sum_i \sum_c p_t \log \frac{p_t}{p_s}, \qquad p = \mathrm{softmax}(Z / T)

    The teacher is detached: the gradient goes into the student alone.

    independent: each class is a question by itself, p = sigmoid(Z / T); the mean is over classes too, of the
        divergences of (p_t, 1 - p_t) from (p_s, 1 - p_s)
    returns: a scalar >= 0 in nats, zero where the probabilities are equal
    """
    student, teacher = student / temperature, teacher.detach() / temperature
    if independent:  # of logits (z, 0): its softmax is (sigmoid z, 1 - sigmoid z)
        student, teacher = (F.pad(z[..., None], (0, 1)).flatten(0, -2) for z in (student, teacher))
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    each = (log_t.exp() * (log_t - log_s)).sum(-1)
    return each.mean() * temperature**2


def pairs(logits: Tensor, targets: Tensor) -> Tensor:
    """Every example's image against every example's caption, (n, n), of logits (n, classes) against one caption a
    class. An example without a class (a target of -1) is in no pair."""
    known = targets >= 0
    return logits[known][:, targets[known]]


def contrast(paired: Tensor) -> Tensor:
    """CLIP's loss (Radford et al., 2021, arXiv 2103.00020): each image's caption is its own, and each caption's image;
    (n, n) to a scalar, the mean of both directions."""
    own = torch.arange(len(paired))
    return (F.cross_entropy(paired, own) + F.cross_entropy(paired.T, own)) / 2


def divergence_of_pairs(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The divergence over an image's captions and over a caption's images, (n, n) each; the mean of both."""
    return (divergence(student, teacher, temperature) + divergence(student.T, teacher.T, temperature)) / 2
