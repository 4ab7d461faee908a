r"""FLoRA: stacking (Wang et al., 2024, arXiv 2409.05976). The mean of products is exact, at any mix of ranks.

In each round every site trains a fresh LoRA (B_k, A_k) of its own rank on top of what all rounds before have left. The
server puts the factors beside each other, which is the mean of the products, and adds them to what is left:

.. math:: \Delta \leftarrow \Delta + [p_1 B_1, \dots, p_K B_K] \, [A_1; \dots; A_K] = \Delta + \sum_k p_k B_k A_k,
          \qquad W' = W + \tfrac{\alpha}{r} \Delta

Δ is shared, as factors; α/r is one constant for all sites, whatever ranks they have.

Deviations: the paper's sites merge the stack into their copy of W; here the backbone is one for all and stays frozen,
so that Δ stands beside it, which is the same function. Once Δ has more ranks than the layer it is brought to as many,
exactly: a downlink is at most twice a dense layer. A site that sat out gets all of Δ and misses nothing. What a site
brings ([sites.NAME]) tells its rank alone. Fine-tuning trains one more LoRA on top of Δ, which stays at the site.
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
from fedloom.tensors import Private, Shared, at, part, under, without
from fedloom.training import fit, head


@dataclass(frozen=True)
class FLoRA:
    adapter: LoRA = field(default_factory=LoRA)

    individual: ClassVar[bool] = True
    any_width: ClassVar[bool] = True
    sends: ClassVar[frozenset[str]] = frozenset()
    heads: ClassVar[Literal["private", "shared"]] = "private"

    def start(self, model: Adaptable, task: Task | None, sites: int, seed: int) -> Shared:
        return Shared(model.init(replace(self.adapter, gated=False), seed))

    def local_round(self, round: int, site: Site, shared: Shared, private: Private) -> tuple[Update, Private]:
        trained, value = self._on_top(round, site, shared, private, None)
        update = Update(Shared(without("head", trained)), len(site), len(site), {"loss": value})
        return update, Private(part("head", trained))

    def aggregate(self, shared: Shared, answers: Iterable[Answer]) -> tuple[Shared, Mapping[str, float]]:
        stack = lowrank.weighed({a.site: (a.update.tensors, a.update.weight) for a in answers})
        before = lowrank.products(shared)
        after = {place: lowrank.bounded(lowrank.joined([(before[place], 1.0), (stack[place], 1.0)])) for place in stack}
        following = lowrank.adapter(after)
        return Shared(following), {"rank": float(lowrank.rank(following))}

    def personalise(self, site: Site, shared: Shared, private: Private, epochs: int) -> Private:
        if not epochs:
            return private
        trained, _ = self._on_top("fine-tuning", site, shared, private, epochs)
        return Private({**part("head", trained), **at("local", without("head", trained))})

    def serve(self, site: Site, shared: Shared, private: Private) -> Callable[[Batch], Tensor]:
        whole = lowrank.beside(shared, under("local", private))
        return sharing.predictor(site, self.adapter, whole, part("head", private))

    def _on_top(
        self, round: int | str, site: Site, shared: Shared, private: Private, epochs: int | None
    ) -> tuple[dict[str, Tensor], float]:
        """A LoRA of the site's rank, trained on top of Δ, and the head."""
        rank = lowrank.rank(site.initial) if site.initial else self.adapter.rank
        fresh = site.model.init(replace(self.adapter, rank=rank, gated=False), site.seed, site.name, round)
        start = {**(under("local", private) or fresh), **head(site, private)}
        return fit(site, start, lambda t, b: site.loss(self.adapter, lowrank.beside(t, shared), b), round, epochs)
