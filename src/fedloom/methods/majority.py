"""The majority answer: what a site gets by always giving its most frequent training answer. The floor of any result.

The same logits for every example: of all constants, those of least loss on the site's training examples. They are the
log frequency of each label where one is chosen, and its log odds where each is judged by itself, so that a label of
several is found where more than half of the training examples have it. Nothing of the model is asked, nothing is sent.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedloom.adapters import Head
from fedloom.backbones.adaptable import Adaptable
from fedloom.backbones.batches import Batch
from fedloom.places import Adapter
from fedloom.site import Answer, Site, Update
from fedloom.tasks import Task
from fedloom.tensors import Private, Shared


@dataclass(frozen=True)
class Majority:
    adapter: ClassVar[Adapter] = Head()
    individual: ClassVar[bool] = False
    sends: ClassVar[frozenset[str]] = frozenset()
    heads: ClassVar[Literal["private", "shared"]] = "private"

    def start(self, model: Adaptable, task: Task | None, sites: int, seed: int) -> Shared:
        return Shared({})

    def local_round(self, round: int, site: Site, shared: Shared, private: Private) -> tuple[Update, Private]:
        return Update(Shared({}), weight=len(site), examples=len(site)), self.personalise(site, shared, private, 1)

    def aggregate(self, shared: Shared, answers: Iterable[Answer]) -> tuple[Shared, Mapping[str, float]]:
        return shared, {}

    def personalise(self, site: Site, shared: Shared, private: Private, epochs: int) -> Private:
        return Private({"local/logits": constant(site)}) if epochs else private

    def serve(self, site: Site, shared: Shared, private: Private) -> Callable[[Batch], Tensor]:
        logits = private.get("local/logits", torch.zeros(len(site.task.labels)))
        return lambda batch: logits.expand(len(batch), -1)


def constant(site: Site) -> Tensor:
    """(labels,): the logits of least loss that do not look at the example.

    A label that every training example has, or none, counts as if half an example more were otherwise.
    """
    task, labels = site.task, len(site.task.labels)
    targets = task.targets([example.label for example in site.train.examples])
    known = targets[targets >= 0] if targets.dim() == 1 else targets
    counts = torch.bincount(known, minlength=labels).float() if targets.dim() == 1 else known.sum(0)
    least = 0.5 / (len(known) + 1)
    share = (counts / max(len(known), 1)).clamp(least, 1 - least)
    return min((share.log(), share.logit()), key=lambda logits: float(task.loss(logits.expand(len(known), -1), known)))
