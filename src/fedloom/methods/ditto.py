r"""Ditto (Li et al., 2021, arXiv 2012.04221): a personal adapter that is held to the shared one.

The shared adapter W is FedAvg's. Beside it every site k trains an adapter v_k of its own, which it keeps and serves:

.. math:: W \leftarrow \sum_k n_k \arg\min_w L_k(w) \big/ \sum_k n_k, \qquad
          v_k = \arg\min_v L_k(v) + \tfrac{\lambda}{2} \lVert v - W \rVert^2

W in the second term is what the site was sent in this round. λ = 0 is local-only training, a large λ FedAvg.

A LoRA is averaged factor by factor, and W is as far from the mean of products as FedAvg's.

Deviations: [training]'s optimiser where the paper uses SGD; as many epochs for v_k as for W, over the same batches, so
that a round costs twice FedAvg's time. Each of the two has its own private head, on which λ does not pull.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge
from torch import Tensor

from fedloom import sharing
from fedloom.adapters import LoRA
from fedloom.backbones.adaptable import Adaptable
from fedloom.backbones.batches import Batch
from fedloom.places import Adapter
from fedloom.site import Answer, Site, Update
from fedloom.tasks import Task
from fedloom.tensors import Private, Shared, Tensors, at, mean, only, part, squared_distance, under
from fedloom.training import fit, head


@dataclass(frozen=True)
class Ditto:
    adapter: Adapter = field(default_factory=LoRA)
    lam: Annotated[float, Ge(0)] = 0.1  # λ: how strongly the personal adapter is held to the shared one

    individual: ClassVar[bool] = False
    sends: ClassVar[frozenset[str]] = frozenset()
    heads: ClassVar[Literal["private", "shared"]] = "private"

    def start(self, model: Adaptable, task: Task | None, sites: int, seed: int) -> Shared:
        return sharing.begun(self.adapter, self.heads, model, task, seed)

    def local_round(self, round: int, site: Site, shared: Shared, private: Private) -> tuple[Update, Private]:
        start = {**shared, **head(site, private)}
        trained, value = fit(site, start, lambda t, b: site.loss(self.adapter, t, b), round)
        own, own_value = self._held(round, site, shared, private, None)
        metrics = {"loss": value, "loss_own": own_value}
        update = Update(Shared(only(shared, trained)), len(site), len(site), metrics)
        return update, Private({**part("head", trained), **at("local", own)})

    def aggregate(self, shared: Shared, answers: Iterable[Answer]) -> tuple[Shared, Mapping[str, float]]:
        return Shared(mean((answer.update.tensors, answer.update.weight) for answer in answers)), {}

    def personalise(self, site: Site, shared: Shared, private: Private, epochs: int) -> Private:
        if not epochs:
            return private
        return Private({**private, **at("local", self._held("fine-tuning", site, shared, private, epochs)[0])})

    def serve(self, site: Site, shared: Shared, private: Private) -> Callable[[Batch], Tensor]:
        return sharing.predictor(site, self.adapter, shared, private)

    def _held(
        self, round: int | str, site: Site, shared: Shared, private: Private, epochs: int | None
    ) -> tuple[dict[str, Tensor], float]:
        """v_k after more epochs, with its head."""

        def loss(v: Tensors, batch: Batch) -> Tensor:
            return site.loss(self.adapter, v, batch) + self.lam / 2 * squared_distance(only(shared, v), shared)

        start = under("local", private) or {**shared, **head(site, private)}
        return fit(site, start, loss, round, epochs)
