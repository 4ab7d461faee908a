r"""FedEx-LoRA: the residual of a mean of factors (Singhal et al., 2024, arXiv 2410.09432). Exact, at equal ranks.

Sites train LoRA as in FedAvg and the server takes the mean of each factor. What that mean is off from the mean of
products is kept beside it, and added to the frozen weights:

.. math:: \bar A = \sum_k p_k A_k, \quad \bar B = \sum_k p_k B_k, \qquad
          R \leftarrow R + \sum_k p_k B_k A_k - \bar B \bar A, \qquad
          W' = W + \tfrac{\alpha}{r} \big( R + \bar B \bar A \big)

Sites go on training Ā and B̄; R is not trained.

Deviations: the paper adds the residual to W itself, at every site and in every round; here the backbone is one for all
and stays frozen, so that R stands beside it, as factors of no more ranks than the layer, which is the same function. A
site that sat out gets all of R and misses nothing. Unlike ranks are refused: their factors have no mean.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from torch import Tensor

from fedloom import lowrank, sharing
from fedloom.adapters import LoRA
from fedloom.backbones.adaptable import Adaptable
from fedloom.backbones.batches import Batch
from fedloom.site import Answer, Site, Update
from fedloom.tasks import Task
from fedloom.tensors import Private, Shared, Tensors, at, mean, of_model, part, under, without
from fedloom.training import fit, head


@dataclass(frozen=True)
class FedExLoRA:
    adapter: LoRA = field(default_factory=LoRA)

    individual: ClassVar[bool] = True
    sends: ClassVar[frozenset[str]] = frozenset()
    heads: ClassVar[Literal["private", "shared"]] = "private"

    def start(self, model: Adaptable, task: Task | None, sites: int, seed: int) -> Shared:
        return Shared(model.init(replace(self.adapter, gated=False), seed))

    def local_round(self, round: int, site: Site, shared: Shared, private: Private) -> tuple[Update, Private]:
        trained, value = self._fit(round, site, shared, {**of_model(shared), **head(site, private)}, None)
        update = Update(Shared(without("head", trained)), len(site), len(site), {"loss": value})
        return update, Private(part("head", trained))

    def aggregate(self, shared: Shared, answers: Iterable[Answer]) -> tuple[Shared, Mapping[str, float]]:
        parts = {answer.site: (answer.update.tensors, answer.update.weight) for answer in answers}
        factors = mean(parts[site] for site in sorted(parts))
        true, common = lowrank.weighed(parts), lowrank.products(factors)
        before = lowrank.products(under("given", shared))
        residual = {
            place: lowrank.bounded(
                lowrank.joined(
                    [
                        *([(before[place], 1.0)] if place in before else []),
                        (true[place], 1.0),
                        (common[place], -1.0),
                    ]
                )
            )
            for place in true
        }
        apart, relative = lowrank.apart(true, common)
        metrics = {"residual": apart * self.adapter.scale, "residual_relative": relative}
        return Shared({**factors, **at("given", lowrank.adapter(residual))}), metrics

    def personalise(self, site: Site, shared: Shared, private: Private, epochs: int) -> Private:
        if not epochs:
            return private
        start = {**of_model(shared), **head(site, private), **under("local", private)}
        trained, _ = self._fit("fine-tuning", site, shared, start, epochs)
        return Private({**part("head", trained), **at("local", without("head", trained))})

    def serve(self, site: Site, shared: Shared, private: Private) -> Callable[[Batch], Tensor]:
        own = under("local", private) or of_model(shared)
        whole = lowrank.beside(own, under("given", shared))
        return sharing.predictor(site, self.adapter, whole, part("head", private))

    def _fit(
        self, round: int | str, site: Site, shared: Shared, start: Tensors, epochs: int | None
    ) -> tuple[dict[str, Tensor], float]:
        residual = under("given", shared)
        return fit(site, start, lambda t, b: site.loss(self.adapter, lowrank.beside(t, residual), b), round, epochs)
