"""The backbone as it came: what any training must beat.

No adapter is trained. Where the task has a head, each site fits one to the frozen features: for `warmup_head` epochs,
or for HEAD_EPOCHS where that is 0, since a head that was never fitted would be no reference.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fedloom.adapters import Head
from fedloom.backbones.adaptable import Adaptable
from fedloom.backbones.batches import Batch
from fedloom.places import Adapter
from fedloom.serving import Served
from fedloom.site import Answer, Site, Update
from fedloom.tasks import Task
from fedloom.tensors import Private, Shared
from fedloom.training import head

HEAD_EPOCHS = 5


@dataclass(frozen=True)
class Frozen:
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
        return Private(head(site, private, site.training.warmup_head or HEAD_EPOCHS)) if epochs else private

    def serve(self, site: Site, shared: Shared, private: Private) -> Callable[[Batch], Tensor]:
        tensors = {**site.task.init(site.model.dim, site.seed), **private}
        return Served(site, self.adapter, tensors)
