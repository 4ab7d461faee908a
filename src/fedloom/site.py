"""What a method may touch at one site, and what a site sends."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedloom.backbones.adaptable import Adaptable
from fedloom.backbones.batches import Batch
from fedloom.data import Dataset
from fedloom.errors import DataError
from fedloom.places import Adapter
from fedloom.tasks import Task
from fedloom.tensors import Shared, Tensors, generator
from fedloom.training import Training

CHUNK = 64  # examples in a pass without gradients


@dataclass(frozen=True)
class Site:
    """One site: the frozen model, its task and its data. The test split is not here: no method may see it."""

    name: str
    model: Adaptable
    task: Task
    train: Dataset
    held_out: Dataset
    training: Training
    seed: int
    initial: Tensors = field(default_factory=dict)  # an adapter that it brings: of its own width, or trained elsewhere

    def __len__(self) -> int:
        return len(self.train)

    def batches(self, round: int | str, epochs: int | None = None) -> Iterator[Batch]:
        """The training examples, shuffled anew each epoch: a function of (seed, site, round) alone.

        The last batch of an epoch may be smaller.
        """
        for epoch in range(self.training.epochs if epochs is None else epochs):
            order = torch.randperm(len(self), generator=generator(self.seed, self.name, round, epoch))
            for first in range(0, len(order), self.training.batch):
                yield self.batch(self.train, order[first : first + self.training.batch].tolist())

    def passes(self, dataset: Dataset) -> Iterator[Batch]:
        """A data set in its own order, once."""
        for first in range(0, len(dataset), CHUNK):
            yield self.batch(dataset, range(first, min(first + CHUNK, len(dataset))))

    def probe(self, n: int) -> Batch:
        """n training examples of distinct images (texts, where there are no images): a function of (seed, site, n)."""
        if n < 1:
            raise DataError(f"site '{self.name}' was asked for a probe of {n} examples; it needs one at least.")
        seen: dict[str | None, int] = {}
        for row in torch.randperm(len(self), generator=generator(self.seed, self.name, "probe")).tolist():
            example = self.train.examples[row]
            seen.setdefault(example.image or example.text, row)
        if n > len(seen):
            raise DataError(
                f"site '{self.name}' was asked for a probe of {n} distinct examples and has {len(seen)}; lower `probe`."
            )
        return self.batch(self.train, list(seen.values())[:n])

    def batch(self, dataset: Dataset, rows: Sequence[int]) -> Batch:
        """These rows of a data set, as the model takes them."""
        index = torch.tensor(rows)
        return Batch(
            targets=self.task.targets([dataset.examples[row].label for row in rows]),
            images=None if dataset.prefix else dataset.images(rows),
            texts=dataset.texts(rows),
            candidates=self.task.candidates,
            prefix={name: tensor[index] for name, tensor in dataset.prefix.items()},
        )

    def logits(self, adapter: Adapter, tensors: Tensors, batch: Batch) -> Tensor:
        """(n, labels) under an adapter; `tensors` holds the task's head too, where it has one."""
        return self.task.logits(self.model(batch, adapter, tensors), tensors)

    def loss(self, adapter: Adapter, tensors: Tensors, batch: Batch) -> Tensor:
        """The task's loss on a batch, a scalar."""
        return self.task.loss(self.logits(adapter, tensors, batch), batch.targets)

    def cached(self, adapter: Adapter) -> "Site":
        """The same site, with what the blocks below an adapter make of each example computed once and kept."""
        return replace(self, train=self.kept(self.train, adapter), held_out=self.kept(self.held_out, adapter))

    def kept(self, dataset: Dataset, adapter: Adapter) -> Dataset:
        """A data set with its frozen prefix, computed in its own order, so that its bits depend on nothing else."""
        blocks = self.model.frozen_blocks(adapter)
        if blocks is None or not len(dataset):
            return dataset
        images = replace(dataset, prefix={})
        return replace(dataset, prefix=self.model.prefix(list(self.passes(images)), blocks))


@dataclass(frozen=True)
class Update:
    """All that a site sends."""

    tensors: Shared
    weight: float  # its share in a weighted mean, before normalising
    examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What the server got from a site that answered; bytes are those of the serialised frames."""

    site: str
    update: Update
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Silence:
    """A site that did not answer, and why."""

    site: str
    reason: str


Reply = Answer | Silence
