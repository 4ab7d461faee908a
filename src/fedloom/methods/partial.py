r"""FedAvg of a part of an adapter: some leaves are frozen, some stay at their site.

FFA-LoRA (Sun et al., 2024, arXiv 2403.12313), `preset = "ffa_lora"`: A stays as it started, at all sites alike, and B
alone is trained and averaged. The mean is then exact, where the mean of both factors is not:

.. math:: \tfrac{\alpha}{r} \Big( \sum_k p_k B_k \Big) A_0 = \tfrac{\alpha}{r} \sum_k p_k B_k A_0

FedSA-LoRA (Guo et al., 2024, arXiv 2410.01463), `preset = "fedsa_lora"`: both are trained, A is averaged, and each
site's B never leaves it. What a site serves is B_k Ā: of the mean of products, Σ p_k B_k A_k, it makes no claim, and a
site that has no B yet (a newcomer) is served the frozen model.

Leaves go by their names (`A`, `B`; `down`, `up`, ... of a bottleneck). Deviations: frozen leaves are sent down in every
round, though they never change, and never up; AdamW with fresh moments each round unless [training] says otherwise;
heads are private.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from fedloom import sharing
from fedloom.adapters import LoRA
from fedloom.backbones.adaptable import Adaptable
from fedloom.backbones.batches import Batch
from fedloom.errors import MethodError
from fedloom.places import Added
from fedloom.site import Answer, Site, Update
from fedloom.tasks import Task
from fedloom.tensors import Private, Shared, Tensors, at, mean, of_model, only, part, under, without
from fedloom.training import fit, head


@dataclass(frozen=True)
class Partial:
    adapter: Added = field(default_factory=LoRA)
    frozen: tuple[str, ...] = ("A",)  # leaves that stay as they started
    kept: tuple[str, ...] = ()  # leaves that are trained and stay at their site

    individual: ClassVar[bool] = False
    sends: ClassVar[frozenset[str]] = frozenset()
    heads: ClassVar[Literal["private", "shared"]] = "private"

    def __post_init__(self) -> None:
        if both := set(self.frozen) & set(self.kept):
            raise MethodError(f"the leaf '{min(both)}' is frozen and kept; it can only be one of them.")

    @classmethod
    def ffa_lora(cls) -> "Partial":
        """A is frozen, B shared."""
        return cls()

    @classmethod
    def fedsa_lora(cls) -> "Partial":
        """A is shared, B stays at its site."""
        return cls(frozen=(), kept=("B",))

    def start(self, model: Adaptable, task: Task | None, sites: int, seed: int) -> Shared:
        fresh = model.init(self.adapter, seed)
        known = {_leaf(name) for name in fresh}
        if wrong := {*self.frozen, *self.kept} - known:
            raise MethodError(
                f"the adapter {self.adapter} has no leaf '{min(wrong)}', which [method] freezes or keeps; it has "
                f"{sorted(known)}."
            )
        shared = {name: t for name, t in fresh.items() if _leaf(name) not in {*self.frozen, *self.kept}}
        if not shared:
            raise MethodError("every leaf of the adapter is frozen or kept, and nothing is left to share.")
        return Shared({**shared, **at("given", {name: t for name, t in fresh.items() if _leaf(name) in self.frozen})})

    def local_round(self, round: int, site: Site, shared: Shared, private: Private) -> tuple[Update, Private]:
        start = {**of_model(shared), **self._own(site, private), **head(site, private)}
        trained, value = self._fit(site, shared, start, round, None)
        sent = only(of_model(shared), trained)
        own = {name: t for name, t in without("head", trained).items() if name not in sent}
        update = Update(Shared(sent), len(site), len(site), {"loss": value})
        return update, Private({**part("head", trained), **at("local", own)})

    def aggregate(self, shared: Shared, answers: Iterable[Answer]) -> tuple[Shared, Mapping[str, float]]:
        folded = mean((answer.update.tensors, answer.update.weight) for answer in answers)
        return Shared({**folded, **at("given", under("given", shared))}), {}

    def personalise(self, site: Site, shared: Shared, private: Private, epochs: int) -> Private:
        if not epochs:
            return private
        start = {
            **of_model(shared),
            **self._own(site, private),
            **head(site, private),
            **under("local", private),
        }
        trained, _ = self._fit(site, shared, start, "fine-tuning", epochs)
        return Private({**part("head", trained), **at("local", without("head", trained))})

    def serve(self, site: Site, shared: Shared, private: Private) -> Callable[[Batch], Tensor]:
        whole = {**of_model(shared), **under("given", shared), **self._own(site, private)}
        return sharing.predictor(site, self.adapter, whole, private)

    def _own(self, site: Site, private: Private) -> dict[str, Tensor]:
        """The leaves that stay at the site; where it has none yet, fresh ones."""
        if not self.kept:
            return {}
        every = under("local", private) or site.model.init(self.adapter, site.seed)
        return {name: t for name, t in every.items() if _leaf(name) in self.kept}

    def _fit(
        self, site: Site, shared: Shared, start: Tensors, round: int | str, epochs: int | None
    ) -> tuple[dict[str, Tensor], float]:
        frozen = under("given", shared)
        return fit(site, start, lambda t, b: site.loss(self.adapter, {**frozen, **t}, b), round, epochs)


def _leaf(name: str) -> str:
    return name.rpartition("/")[2]
