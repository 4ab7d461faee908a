r"""FedDLP: dual adapters and selective pruning (Nguyen et al., 2025, arXiv 2503.07552).

Every site has two low-rank adapters on one frozen backbone: a large private one (local, l) behind SoRA's gates, and a
small one that all sites share (global, g). They never act in one training forward. Each is the other's teacher:

.. math:: L_l = CE(Z_l) + \gamma_l\, KL(Z_l \leftarrow Z_g), \qquad L_g = CE(Z_g) + \gamma_g\, KL(Z_g \leftarrow Z_l),
          \qquad KL(Z_s \leftarrow Z_t) = T^2 \sum_c p_t \log (p_t / p_s), \quad p = \mathrm{softmax}(Z / T)

For each batch, in this order (`schedule = "alternating"`):

1. the local adapter: gradient of L_l, Z_g a constant; Adam on the gates, the proximal step of λ; AdamW on A and B
2. the global adapter: gradient of L_g, Z_l a constant, of the local adapter as step 1 left it; AdamW

Z_g does not move in step 1, so that one forward can give it as teacher and as student (`reuse`): three forwards a batch
in place of four, with the same bits, and more memory. `"joint"` takes both gradients at one point, from one pass.

The site sends its global adapter; the server takes the mean of A and that of B, weighted by examples. Ranks whose gate
is zero leave the local adapter at the round's end (`fedloom.pruning`). The moments of both adapters stay at the site
and go on, with smaller steps than fresh ones: with few steps a round, the greater of the learning rates that training
alone is content with is right. A site predicts with a mean of both branches' logits; its weight is chosen on the site's
held-out examples, with the global adapter that it was given. Where nothing is held out, the local branch predicts.

Deviations, each undone by `FedDLP.official()`, which is the authors' program:

- Cross-entropy over all classes; theirs is contrastive within a batch, where two images of one class are negatives of
  each other, absent classes are no negatives, and a site of one class learns nothing.
- Gates start at one, theirs from N(0, 1); the proximal step is SoRA's formula, theirs its program; over the first ten
  rounds λ rises, and the weaker half of the ranks goes; dead ranks leave, theirs stay in every tensor.
- The global adapter hears less of the local one, whose sites have few classes: γ_g is 0.1, theirs 1; γ_l is 0.01.
- Theirs predicts with the local branch alone, in which little of what others know arrives; all linear layers have
  adapters, whose A starts normal; one caption trains them for all data.

Also ours: a task's head is private and is trained in step 1; a site without a local adapter (a newcomer, or one that
comes late) starts from the global one, and in the first round, where that is zero, from a fresh start like all others.
The mean of A times that of B is not the mean of products (`residual`; 0.74 in `verify-aggregation`), and has no unlike
ranks. `aggregation = "procrustes"` turns every site's balanced factors towards the global ones before the mean;
`"product"` sends on the best factors of the mean of products.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedloom import choice, lowrank, rotation
from fedloom.adapters import LoRA, Width
from fedloom.backbones.adaptable import Adaptable
from fedloom.backbones.batches import Batch, Features
from fedloom.distillation import Lesson
from fedloom.errors import MethodError
from fedloom.pruning import Pruning, Rate, Strength, descending, penalty, ranks
from fedloom.serving import Served, blended
from fedloom.site import Answer, Site, Update
from fedloom.tasks import Task
from fedloom.tensors import Private, Shared, Tensors, at, part, under, without
from fedloom.training import Count, State, descend, gradient, head, leaves, placed

log = logging.getLogger(__name__)

LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "projection")  # all linear ones of CLIP


@dataclass(frozen=True)
class FedDLP:
    adapter: LoRA = field(default_factory=lambda: LoRA(rank=4))  # the local one; pruning puts gates on it
    rank: Width = 2  # r of the global adapter, which is like the local one else
    # distillation
    gamma: Strength = 0.01  # γ_l: how much the local adapter learns from the global one
    gamma_shared: Strength = 0.1  # γ_g: how much the global adapter learns from the local one
    ramp: Count = 0  # rounds over which both rise from zero
    temperature: Rate = 3.0  # T
    # training
    loss: Literal["classes", "contrastive"] = "classes"
    caption: str | None = None  # what an image is told to be in training; None: the task's template
    schedule: Literal["alternating", "joint"] = "alternating"
    reuse: bool = False  # Z_g's forward as teacher and as student: a forward less, for one more branch in memory
    lr: Rate | None = None  # of the global adapter; None: that of [training]
    moments: Literal["kept", "fresh"] = "kept"  # Adam's, from round to round; fresh ones take greater steps
    pruning: Pruning | None = field(default_factory=Pruning)  # None: the local adapter is a plain LoRA
    # server and inference
    share: Literal["global", "both"] = "global"  # both: the local adapters too, pruned, for sites that have none yet
    aggregation: rotation.Rule = "factors"
    # both: the sum of the adapters; blend: a mean of the branches' logits, its weight chosen on held-out examples
    predict_with: Literal["local", "both", "global", "blend"] = "blend"

    heads: ClassVar[Literal["private", "shared"]] = "private"

    def __post_init__(self) -> None:
        if self.caption is not None and "{}" not in self.caption:
            raise MethodError(f"the caption {self.caption!r} has no '{{}}' for the class name.")

    @classmethod
    def official(cls) -> "FedDLP":
        """The authors' program, as it runs on CLIP ViT-B/32 with one tower adapted.

        The order of operations is that above. Training names images by one caption for all data sets, evaluation by the
        task's template. γ_l is for the image tower, where theirs is 0.001 to 0.1; for the text tower it is 1 to 10.
        What a recipe says beside it: lr 5e-5 (theirs is 1e-5 to 5e-5; the gates' too, so that it is not above λ, of
        which a warning speaks), epochs 1, batch 32, clip 1.0, no weight decay, 101 rounds, all sites in each.

        To follow it step by step: a `local_round` of a site whose training data are one batch is one step of each
        adapter, from A and B in `shared` and local/PLACE/A, B and gate in `private`, and returns all of them.
        """
        return cls(
            adapter=LoRA(rank=4, alpha=16.0, targets=LAYERS, start="normal", start_gate="normal"),
            gamma=0.01,
            gamma_shared=1.0,
            predict_with="local",
            loss="contrastive",
            caption="a photo of a {}",
            pruning=Pruning(sparsity=5e-5, lr=5e-5, operator="sora", rank=None, schedule="constant", compact=False),
        )

    @property
    def local(self) -> LoRA:
        return replace(self.adapter, gated=self.pruning is not None or self.adapter.gated)

    @property
    def shared(self) -> LoRA:
        return replace(self.adapter, rank=self.rank, gated=False)

    @property
    def lesson(self) -> Lesson:
        return Lesson(self.loss, self.caption, self.temperature)

    @property
    def individual(self) -> bool:
        return self.aggregation != "factors" or self.share == "both"

    any_width = individual

    @property
    def sends(self) -> frozenset[str]:
        return frozenset({"local"} if self.share == "both" else ())

    def start(self, model: Adaptable, task: Task | None, sites: int, seed: int) -> Shared:
        if task is not None:
            self.lesson.fits(task)
        if self.rank > self.adapter.rank:
            log.warning("The shared rank %d is above the local rank %d.", self.rank, self.adapter.rank)
        if self.pruning is not None:
            self.pruning.greet()
        shared = model.init(self.shared, seed, "shared")
        second = at("local", model.init(replace(self.local, gated=False), seed)) if self.share == "both" else {}
        return Shared({**shared, **second})

    # At a site

    def local_round(self, round: int, site: Site, shared: Shared, private: Private) -> tuple[Update, Private]:
        if not private:
            self.lesson.greet(site)
            if self.predict_with == "blend" and not len(site.held_out):
                log.warning("site '%s' holds nothing out to choose a blend on: its local branch predicts.", site.name)
        mine = began = self._state(site, shared, private)
        ours = State(without("local", shared), under("opt/shared", private))
        losses = []
        for i, batch in enumerate(site.batches(round)):
            with placed(site, round, i):
                told = site.model.begun(self.lesson.told(site.task, batch), (self.local, self.shared))
                mine, ours, values = self._steps(round, site, told, mine, ours)
            losses.append(values)
        mine = self._pruned(round, site, began, mine)
        # Adam's moments are of one basis; factors of a product, or turned ones, come in another.
        going_on = self.aggregation == "factors" and self.moments == "kept"
        moments = at("opt/shared", ours.moments) if going_on else {}
        loss, loss_shared = torch.tensor(losses or [(math.nan, math.nan)]).double().mean(0).tolist()
        left = ranks(mine.tensors)
        metrics = {"loss": loss, "loss_shared": loss_shared, "rank": sum(left.values()) / len(left)}
        metrics |= {f"rank/{place}": float(n) for place, n in left.items()}
        sent = Shared({**ours.tensors, **self._published(mine)})
        return Update(sent, len(site), len(site), metrics), Private({**self._kept(site, shared, mine), **moments})

    def _steps(
        self, round: int, site: Site, batch: Batch, mine: State, ours: State
    ) -> tuple[State, State, tuple[float, float]]:
        """Both steps of a batch: both states, and their losses before them."""
        if self.schedule == "joint":
            return self._at_once(round, site, batch, mine, ours)
        free, branch = leaves(ours.tensors), None
        if self.reuse or self._risen(self.gamma, round):
            with torch.set_grad_enabled(self.reuse):
                branch = site.model(batch, self.shared, free)
        mine, value, teacher = self._step(round, site, batch, mine, branch)
        gamma = self._risen(self.gamma_shared, round)
        if gamma:
            with torch.no_grad():
                features = site.model(batch, self.local, mine.tensors)
            teacher = self.lesson.logits(site.task, features, mine.tensors, batch)
        if branch is None or not self.reuse:
            branch = site.model(batch, self.shared, free)
        student = self.lesson.logits(site.task, branch, part("head", mine.tensors), batch)
        slope, value_shared = gradient(self.lesson.value(site.task, student, teacher, gamma, batch), free)
        return mine, self._descended(site, ours, slope), (value, value_shared)

    def _at_once(
        self, round: int, site: Site, batch: Batch, mine: State, ours: State
    ) -> tuple[State, State, tuple[float, float]]:
        """Both steps from one point: both branches in one pass, each the other's teacher. Neither loss reaches the
        other's adapter, so that the gradient of their sum is that of both."""
        own, free = leaves(mine.tensors), leaves(ours.tensors)
        local, branch = site.model.together([(batch, self.local, own), (batch, self.shared, free)])
        Z_l = self.lesson.logits(site.task, local, own, batch)
        Z_g = self.lesson.logits(site.task, branch, part("head", mine.tensors), batch)
        gamma, gamma_shared = self._risen(self.gamma, round), self._risen(self.gamma_shared, round)
        loss = self.lesson.value(site.task, Z_l, Z_g, gamma, batch) + penalty(self.pruning, own)
        loss_shared = self.lesson.value(site.task, Z_g, Z_l, gamma_shared, batch)
        slope, _ = gradient(loss + loss_shared, {**at("local", own), **at("shared", free)})
        mine = descending(self.pruning, round)(mine, under("local", slope), site.training)
        ours = self._descended(site, ours, under("shared", slope))
        return mine, ours, (float(loss.detach()), float(loss_shared.detach()))

    def _step(
        self, round: int | str, site: Site, batch: Batch, mine: State, branch: Features | None
    ) -> tuple[State, float, Tensor]:
        """The local adapter's step: its state, and its loss and logits before it.

        branch: of the global adapter, which teaches; None where γ_l is 0
        """
        free = leaves(mine.tensors)
        student = self.lesson.logits(site.task, site.model(batch, self.local, free), free, batch)
        teacher = student if branch is None else self.lesson.logits(site.task, branch, mine.tensors, batch)
        loss = self.lesson.value(site.task, student, teacher, self._risen(self.gamma, round), batch)
        slope, value = gradient(loss + penalty(self.pruning, free), free)
        return descending(self.pruning, round)(mine, slope, site.training), value, student.detach()

    def _descended(self, site: Site, ours: State, slope: Tensors) -> State:
        return descend(ours, slope, replace(site.training, lr=self.lr or site.training.lr))

    def personalise(self, site: Site, shared: Shared, private: Private, epochs: int) -> Private:
        """Step 1 alone, the global adapter a fixed teacher."""
        if not epochs:
            return private
        mine = began = self._state(site, shared, private)
        for i, batch in enumerate(site.batches("fine-tuning", epochs)):
            with placed(site, "fine-tuning", i):
                told = self.lesson.told(site.task, batch)
                with torch.no_grad():
                    branch = site.model(told, self.shared, without("local", shared)) if self.gamma else None
                mine, _, _ = self._step("fine-tuning", site, told, mine, branch)
        mine = self._pruned("fine-tuning", site, began, mine)
        return Private({**self._kept(site, shared, mine), **at("opt/shared", under("opt/shared", private))})

    def serve(self, site: Site, shared: Shared, private: Private) -> Callable[[Batch], Tensor]:
        fresh = site.task.init(site.model.dim, site.seed)
        own = {**fresh, **self._local(site, shared, private), **part("head", private)}
        return self._predictor(site, shared, own, float(private.get("choice/blend", torch.tensor(1.0))))

    def _state(self, site: Site, shared: Shared, private: Private) -> State:
        return State({**self._local(site, shared, private), **head(site, private)}, under("opt/local", private))

    def _local(self, site: Site, shared: Shared, private: Private) -> dict[str, Tensor]:
        """The site's local adapter; where it has none that does anything, one that does what the shared one does."""
        if own := under("local", private):
            return own
        fresh = site.initial or site.model.init(self.local, site.seed)
        fresh = lowrank.opened(fresh) if self.local.gated else dict(fresh)
        if lowrank.adds(fresh) or (self.predict_with == "both" and self.share == "global"):
            return fresh  # it was brought; or the two together would do it twice
        return lowrank.filled(fresh, lowrank.products(under("local", shared)) or lowrank.products(shared, self._ratio))

    def _predictor(self, site: Site, shared: Shared, own: Tensors, blend: float) -> Callable[[Batch], Tensor]:
        """`blend`: the local branch's part of the logits."""
        if self.predict_with == "both":
            together = lowrank.summed(without("head", own), without("local", shared), self._ratio)
            return Served(site, self.local, {**together, **part("head", own)})
        weight = {"local": 1.0, "global": 0.0}.get(self.predict_with, blend)
        ours = {**without("local", shared), **part("head", own)}
        parts = {"local": Served(site, self.local, own), "global": Served(site, self.shared, ours)}
        return blended(parts, weight, alone="predict_with = 'local'")

    def _kept(self, site: Site, shared: Shared, mine: State) -> dict[str, Tensor]:
        own = {**at("local", without("head", mine.tensors)), **part("head", mine.tensors)}
        if self.moments == "kept":
            own |= at("opt/local", mine.moments)
        if self.predict_with == "blend" and len(site.held_out):
            local, given = (self._predictor(site, shared, mine.tensors, weight) for weight in (1.0, 0.0))
            own["choice/blend"] = torch.tensor(choice.blend(site, local, given))
        return own

    def _pruned(self, round: int | str, site: Site, began: State, mine: State) -> State:
        if self.pruning is None:
            return mine
        whole = ranks(site.initial) or dict.fromkeys(ranks(mine.tensors), self.adapter.rank)
        return self.pruning.ended(round, site.name, began.tensors, mine, whole)

    def _published(self, mine: State) -> dict[str, Tensor]:
        """The local adapter with its gates inside, if it is shared; a layer without a rank as one of zeros."""
        if self.share == "global":
            return {}
        return at("local", lowrank.adapter(lowrank.products(without("head", mine.tensors)), least=1))

    @property
    def _ratio(self) -> float:
        """What makes factors of the global adapter factors of the local one."""
        return self.shared.scale / self.local.scale

    def _risen(self, gamma: float, round: int | str) -> float:
        return gamma if isinstance(round, str) or not self.ramp else gamma * min(1.0, (round + 1) / self.ramp)

    # At the server

    def aggregate(self, shared: Shared, answers: Iterable[Answer]) -> tuple[Shared, Mapping[str, float]]:
        second = under("local", shared)
        own = lowrank.Products() if second else None

        def updates() -> Iterator[tuple[Tensors, float]]:
            for answer in answers:
                update, weight = answer.update.tensors, answer.update.weight
                if own is not None:
                    own.add(under("local", update), weight)
                yield without("local", update), weight

        new, residual, relative = rotation.merged(without("local", shared), updates(), self.aggregation, self.shared)
        if own is not None:
            new |= at("local", lowrank.filled(second, own.mean()))
        return Shared(new), {"residual": residual, "residual_relative": relative}
