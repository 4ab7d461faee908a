r"""FedDAT: a dual adapter as teacher, and mutual distillation (Chen et al., 2024, arXiv 2308.12305).

Every site has two adapters after each block: one that all share, A_s, and one of its own, A_c. Its teacher is the mean
of A_c and a frozen copy Â_s of what it was sent, at each place (DAT). Shared adapter and teacher learn from each other:

.. math:: h_{DAT}(x) = x + \tfrac12 A_c(x) + \tfrac12 \hat A_s(x), \qquad
          L_s = \tfrac12 \big( CE(z_s) + KL(z_s \leftarrow z_{DAT}) \big), \qquad
          L_{DAT} = \tfrac12 \big( CE(z_{DAT}) + KL(z_{DAT} \leftarrow z_s) \big)

with KL(student ← teacher) at temperature T, times T². For each batch, in this order:

1. A_s takes a step of L_s, z_DAT a constant
2. A_c takes a step of L_DAT, z_s a constant: that of step 1, before its step

The site sends A_s; the server takes the mean, weighted by examples. A_c stays. The site serves its DAT, with the newest
A_s in place of Â_s. (In the authors' program the two weights of the mean are the constant 1/2 too, in place of the
paper's gating.) The mean of two adapters is one of their widths together, so that no place runs twice.

A LoRA is averaged factor by factor, and A_s is as far from the mean of products as FedAvg's.

`exchange = false` leaves A_s at its site as well, so that nothing is ever sent: two adapters that teach each other, at
sites that hear nothing of each other. What FedDAT is above that is what federating is worth in it.

Deviations: the head is private, as there, and is trained in both steps, but with moments of its own in each; [training]
says optimiser and rates, and its learning rate is not warmed up anew each round. A site without an A_c starts from what
it was sent, where the program draws one.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Gt
from torch import Tensor

from fedloom import sharing
from fedloom.adapters import Bottleneck, LoRA
from fedloom.backbones.adaptable import Adaptable
from fedloom.backbones.batches import Batch
from fedloom.distillation import divergence
from fedloom.serving import Served
from fedloom.site import Answer, Site, Update
from fedloom.tasks import Detection, Task
from fedloom.tensors import Private, Shared, Tensors, at, mean, only, part, under, without
from fedloom.training import State, head, placed, step


@dataclass(frozen=True)
class FedDAT:
    adapter: Bottleneck | LoRA = field(default_factory=Bottleneck)
    temperature: Annotated[float, Gt(0)] = 3.0  # T
    exchange: bool = True  # whether A_s is sent and averaged

    individual: ClassVar[bool] = False
    sends: ClassVar[frozenset[str]] = frozenset()
    heads: ClassVar[Literal["private", "shared"]] = "private"

    def start(self, model: Adaptable, task: Task | None, sites: int, seed: int) -> Shared:
        return sharing.begun(self.adapter, self.heads, model, task, seed) if self.exchange else Shared({})

    def local_round(self, round: int, site: Site, shared: Shared, private: Private) -> tuple[Update, Private]:
        shared, z, losses = self._sent(site, shared, private), head(site, private), []
        ours, own = State({**shared, **z}), State({**self._own(site, shared, private), **z})
        for i, batch in enumerate(site.batches(round)):
            with torch.no_grad():
                taught = site.logits(self.adapter, self._dual(own.tensors, shared), batch)
                given = site.logits(self.adapter, ours.tensors, batch)
            with placed(site, round, i):
                ours, value = step(ours, self._loss(site, batch, taught), site.training)
                own = State({**own.tensors, **part("head", ours.tensors)}, own.moments)
                own, own_value = step(own, self._loss(site, batch, given, shared), site.training)
                ours = State({**ours.tensors, **part("head", own.tensors)}, ours.moments)
            losses.append((value, own_value))
        loss, loss_own = torch.tensor(losses).double().mean(0).tolist()
        sent, kept = only(shared, ours.tensors), self._kept(own)
        if not self.exchange:
            sent, kept = {}, {**kept, **at("unsent", sent)}
        return Update(Shared(sent), len(site), len(site), {"loss": loss, "loss_own": loss_own}), Private(kept)

    def aggregate(self, shared: Shared, answers: Iterable[Answer]) -> tuple[Shared, Mapping[str, float]]:
        return Shared(mean((answer.update.tensors, answer.update.weight) for answer in answers)), {}

    def personalise(self, site: Site, shared: Shared, private: Private, epochs: int) -> Private:
        """Step 2 alone, without a teacher."""
        if not epochs:
            return private
        shared = self._sent(site, shared, private)
        own = State({**self._own(site, shared, private), **head(site, private)})
        for i, batch in enumerate(site.batches("fine-tuning", epochs)):
            with placed(site, "fine-tuning", i):
                own, _ = step(own, self._loss(site, batch, None, shared), site.training)
        return Private({**private, **self._kept(own)})

    def serve(self, site: Site, shared: Shared, private: Private) -> Callable[[Batch], Tensor]:
        shared = self._sent(site, shared, private)
        heads = {**site.task.init(site.model.dim, site.seed), **part("head", private)}
        tensors = self._dual({**self._own(site, shared, private), **heads}, shared)
        return Served(site, self.adapter, tensors)

    def _sent(self, site: Site, shared: Shared, private: Private) -> Shared:
        """What the site was sent; where nothing is, its own A_s."""
        if self.exchange:
            return shared
        return Shared(under("unsent", private) or site.initial or site.model.init(self.adapter, site.seed))

    def _kept(self, own: State) -> dict[str, Tensor]:
        return {**part("head", own.tensors), **at("local", without("head", own.tensors))}

    def _own(self, site: Site, shared: Shared, private: Private) -> Tensors:
        return under("local", private) or site.initial or shared

    def _loss(
        self, site: Site, batch: Batch, teacher: Tensor | None, frozen: Tensors | None = None
    ) -> Callable[[Tensors], Tensor]:
        """(CE + KL) / 2, or CE without a teacher; of the dual adapter where its frozen half is given."""

        def loss(tensors: Tensors) -> Tensor:
            whole = tensors if frozen is None else self._dual(tensors, frozen)
            student = site.logits(self.adapter, whole, batch)
            value = site.task.loss(student, batch.targets)
            if teacher is None:
                return value
            by_label = isinstance(site.task, Detection)
            return (value + divergence(student, teacher, self.temperature, by_label)) / 2

        return loss

    def _dual(self, own: Tensors, frozen: Tensors) -> dict[str, Tensor]:
        """The mean of what two adapters add, as one adapter, under the head of the first."""
        both = part("head", own)
        for name, theirs in frozen.items():
            axes = self.adapter.symmetry.get(name.rpartition("/")[2])
            if axes is None:  # a bias of what is added
                both[name] = (own[name] + theirs) / 2
            else:
                outgoing = len(axes) > 1 and axes[-1] == "hidden"
                both[name] = torch.cat([own[name], theirs], axes.index("hidden")) / (2 if outgoing else 1)
        return both
