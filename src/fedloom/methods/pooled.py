"""Pooled training: what no federation may do, since it brings all training data to one place.

The batches of all sites in one stream, and one optimiser that steps through it: FedAvg, if sites sent every step. The
adapter, its start, heads, epochs and fine-tuning are those of FedAvg, so that all views can be compared. It is a
reference, and runs where all sites are in one process: a site that is asked for a round of it refuses.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NoReturn

import torch
from torch import Tensor

from fedloom import sharing
from fedloom.adapters import LoRA
from fedloom.backbones.adaptable import Adaptable
from fedloom.backbones.batches import Batch
from fedloom.errors import MethodError
from fedloom.places import Adapter
from fedloom.site import Answer, Site
from fedloom.tasks import Task
from fedloom.tensors import Private, Shared, Tensors, at, generator, only, under
from fedloom.training import State, placed, step


@dataclass(frozen=True)
class Pooled:
    adapter: Adapter = field(default_factory=LoRA)
    heads: Literal["private", "shared"] = "private"

    individual: ClassVar[bool] = False
    sends: ClassVar[frozenset[str]] = frozenset()

    def start(self, model: Adaptable, task: Task | None, sites: int, seed: int) -> Shared:
        return sharing.begun(self.adapter, self.heads, model, task, seed)

    def train(self, sites: Sequence[Site], shared: Shared, rounds: int, seed: int) -> tuple[Shared, list[Private]]:
        """As many epochs as that many rounds: `shared`, and the head of each site where it is private.

        raises TrainingError: a loss is not finite
        """
        heads = [sharing.own_head(site, shared, {}) for site in sites]
        state = State({**shared, **{name: t for i, own in enumerate(heads) for name, t in at(str(i), own).items()}})
        for round in range(rounds):
            for n, (i, batch) in enumerate(_stream(sites, round, seed)):

                def loss(tensors: Tensors, i: int = i, batch: Batch = batch) -> Tensor:
                    return sites[i].loss(self.adapter, {**only(shared, tensors), **under(str(i), tensors)}, batch)

                with placed(sites[i], round, n):
                    state, _ = step(state, loss, sites[i].training)
        return Shared(only(shared, state.tensors)), [Private(under(str(i), state.tensors)) for i in range(len(sites))]

    def local_round(self, round: int, site: Site, shared: Shared, private: Private) -> NoReturn:
        raise MethodError(
            f"site '{site.name}' takes no part in pooled training: it brings the data of all sites to one place, which "
            "no federation may do. Run it as a reference, where all sites are in one process."
        )

    def aggregate(self, shared: Shared, answers: Iterable[Answer]) -> tuple[Shared, Mapping[str, float]]:
        return shared, {}

    def personalise(self, site: Site, shared: Shared, private: Private, epochs: int) -> Private:
        return sharing.tuned(site, self.adapter, shared, private, epochs)

    def serve(self, site: Site, shared: Shared, private: Private) -> Callable[[Batch], Tensor]:
        return sharing.predictor(site, self.adapter, shared, private)


def _stream(sites: Sequence[Site], round: int, seed: int) -> Iterator[tuple[int, Batch]]:
    """The batches of a round of all sites, each with its site's number, in an order drawn from (seed, round)."""
    turns = [
        i for i, site in enumerate(sites) for _ in range(-(-len(site) // site.training.batch) * site.training.epochs)
    ]
    batches = [site.batches(round) for site in sites]
    for turn in torch.randperm(len(turns), generator=generator(seed, "pooled", round)).tolist():
        yield turns[turn], next(batches[turns[turn]])
