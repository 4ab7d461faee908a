"""Every site trains by itself: what federating must beat.

The same adapter, the same start, the same batches and as many epochs as a federated method; nothing is ever sent.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from fedloom.adapters import LoRA
from fedloom.backbones.adaptable import Adaptable
from fedloom.backbones.batches import Batch
from fedloom.places import Adapter
from fedloom.serving import Served
from fedloom.site import Answer, Site, Update
from fedloom.tasks import Task
from fedloom.tensors import Private, Shared, at, part, under, without
from fedloom.training import fit, head


@dataclass(frozen=True)
class Local:
    adapter: Adapter = field(default_factory=LoRA)

    individual: ClassVar[bool] = False
    sends: ClassVar[frozenset[str]] = frozenset()
    heads: ClassVar[Literal["private", "shared"]] = "private"

    def start(self, model: Adaptable, task: Task | None, sites: int, seed: int) -> Shared:
        return Shared({})

    def local_round(self, round: int, site: Site, shared: Shared, private: Private) -> tuple[Update, Private]:
        trained, value = self._fit(site, private, round, None)
        return Update(Shared({}), weight=len(site), examples=len(site), metrics={"loss": value}), trained

    def aggregate(self, shared: Shared, answers: Iterable[Answer]) -> tuple[Shared, Mapping[str, float]]:
        return shared, {}

    def personalise(self, site: Site, shared: Shared, private: Private, epochs: int) -> Private:
        return self._fit(site, private, "fine-tuning", epochs)[0] if epochs else private

    def serve(self, site: Site, shared: Shared, private: Private) -> Callable[[Batch], Tensor]:
        tensors = {**site.task.init(site.model.dim, site.seed), **without("local", private), **under("local", private)}
        return Served(site, self.adapter, tensors)

    def _fit(self, site: Site, private: Private, round: int | str, epochs: int | None) -> tuple[Private, float]:
        adapter = under("local", private) or site.initial or site.model.init(self.adapter, site.seed)
        start = {**adapter, **head(site, private)}
        trained, value = fit(site, start, lambda t, b: site.loss(self.adapter, t, b), round, epochs)
        return Private({**part("head", trained), **at("local", without("head", trained))}), value
