r"""FlexLoRA: the mean of products, cut to each site's rank by singular values (Bai et al., 2024, arXiv 2402.11505).

Sites may have ranks of their own, r_k ([sites.NAME] width). The server takes the mean of what they add to the weights,
and every site starts the next round from the best approximation of it that has its rank:

.. math:: \sum_k p_k B_k A_k = U S V^\top, \qquad
          B_k \leftarrow U_{:, :r_k} \sqrt{S_{:r_k}}, \quad A_k \leftarrow \sqrt{S_{:r_k}}\, V_{:, :r_k}^\top

What is lost is the rest of the singular values, the least that any rank-r_k rule can lose (Eckart & Young, 1936);
`lost` tells its part of the norm, for the largest of the sites' ranks, which is what the server sends.
HLoRA (Liu et al., 2025, arXiv 2503.00813) is the same rule, with ranks that follow the sites' means.

Deviations: α/r is one constant for all sites, where the paper's is α/r_k; S is split evenly between the factors, so
that both train at one scale. Ranks that the mean does not fill start as in the first round, behind a B of zeros.
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
from fedloom.tensors import Private, Shared, part, without
from fedloom.training import fit, head


@dataclass(frozen=True)
class FlexLoRA:
    adapter: LoRA = field(default_factory=LoRA)

    individual: ClassVar[bool] = True
    any_width: ClassVar[bool] = True
    sends: ClassVar[frozenset[str]] = frozenset()
    heads: ClassVar[Literal["private", "shared"]] = "private"

    def start(self, model: Adaptable, task: Task | None, sites: int, seed: int) -> Shared:
        return Shared(model.init(replace(self.adapter, gated=False), seed))

    def local_round(self, round: int, site: Site, shared: Shared, private: Private) -> tuple[Update, Private]:
        start = {**self._cut(site, shared), **head(site, private)}
        trained, value = fit(site, start, lambda t, b: site.loss(self.adapter, t, b), round)
        update = Update(Shared(without("head", trained)), len(site), len(site), {"loss": value})
        return update, Private(part("head", trained))

    def aggregate(self, shared: Shared, answers: Iterable[Answer]) -> tuple[Shared, Mapping[str, float]]:
        parts = {answer.site: (answer.update.tensors, answer.update.weight) for answer in answers}
        true = lowrank.weighed(parts)
        rank = max(lowrank.rank(tensors) for tensors, _ in parts.values())
        cut = {place: lowrank.balanced(product, rank) for place, product in true.items()}
        return Shared(lowrank.adapter(cut)), {"lost": lowrank.apart(true, cut)[1], "rank": float(rank)}

    def personalise(self, site: Site, shared: Shared, private: Private, epochs: int) -> Private:
        return sharing.tuned(site, self.adapter, self._cut(site, shared), private, epochs)

    def serve(self, site: Site, shared: Shared, private: Private) -> Callable[[Batch], Tensor]:
        return sharing.predictor(site, self.adapter, self._cut(site, shared), private)

    def _cut(self, site: Site, shared: Shared) -> dict[str, Tensor]:
        """The best of what is shared that a LoRA of the site's rank can hold."""
        rank = lowrank.rank(site.initial) if site.initial else self.adapter.rank
        fresh = site.model.init(replace(self.adapter, rank=rank, gated=False), site.seed)
        return lowrank.filled(fresh, lowrank.products(shared))
