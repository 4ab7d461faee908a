"""What a site serves on one of its data sets, and how sure that figure is.

An interval is over what was tested, and over nothing else: another seed, another split or another site would differ by
more. Its unit is that of a split, so the questions of one image, and the images of one patient, are drawn together.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedloom.data import Dataset
from fedloom.engines.local import Participant
from fedloom.federation import predict
from fedloom.methods import Method
from fedloom.metrics import by_label, calibration_error, reliability
from fedloom.partition import unit_of
from fedloom.statistics import bootstrap
from fedloom.tasks import Detection, Task
from fedloom.tensors import Private, Shared

SURE = ("low", "high", "ece")  # what is told of a figure beside it: its interval, and how well probabilities came true


@dataclass(frozen=True)
class Answered:
    """What one predictor said of n examples."""

    task: Task
    dataset: Dataset
    logits: Tensor  # (n, labels)

    @property
    def targets(self) -> Tensor:
        return targets_of(self.task, self.dataset)

    def row(self) -> dict[str, Any]:
        """The metric, its 95 % bootstrap interval and the calibration error; nothing where the metric is undefined."""
        value = self.task.metrics(self.logits, self.targets).get(self.task.metric)
        if value is None:
            return {}
        low, high = bootstrap(self._parts().numpy())
        ece = calibration_error(*self.task.judged(self.logits, self.targets))
        return {"value": value, "low": low, "high": high, "examples": len(self.dataset), "ece": ece}

    def gain(self, over: "Answered") -> dict[str, float | None]:
        """The 95 % bootstrap interval of what this is better by than another on the same examples, drawn alike."""
        low, high = bootstrap(self._parts().numpy(), over._parts().numpy())
        return {"low": low, "high": high}

    def details(self) -> dict[str, Any]:
        """`reliability`: [how many, mean probability, how far they came true] of every bin that is not empty; of a
        detection also each label's figures (`metrics.by_label`)."""
        bins = reliability(*self.task.judged(self.logits, self.targets))
        found: dict[str, Any] = {"reliability": [[int(n), p / n, y / n] for n, p, y in bins.tolist() if n]}
        if isinstance(self.task, Detection):
            figures = by_label(self.task.scores(self.logits), self.targets)
            found["labels"] = dict(zip(self.task.labels, figures, strict=True))
        return found

    def _parts(self) -> Tensor:
        """(units, 2): `Task.parts`, added up over the examples of a unit."""
        parts = self.task.parts(self.logits, self.targets)
        numbers: dict[str, int] = {}
        index = torch.tensor([numbers.setdefault(unit_of(row), len(numbers)) for row in self.dataset.examples])
        return parts.new_zeros(len(numbers), 2).index_add_(0, index, parts)


def tested(method: Method, own: Participant, shared: Shared, private: Private, dataset: Dataset) -> Answered | None:
    """What a site serves on a data set; None where that is empty."""
    if not len(dataset):
        return None
    return Answered(own.site.task, dataset, predict(method, own.site, private, shared, dataset))


def targets_of(task: Task, dataset: Dataset) -> Tensor:
    """The labels of a data set, as the task takes them."""
    return task.targets([example.label for example in dataset.examples])
