r"""The ensemble of all sites' adapters: the rival of every merge, and what it costs.

Every site k trains an adapter W_k of its own, as in local-only training, and sends it. No two are ever averaged: every
site gets all K of them, and answers by the mean of the probabilities under each, with its own head:

.. math:: p(y \mid x) = \frac1K \sum_k p_{W_k}(y \mid x)

p is the softmax, or the sigmoid where labels are judged one by one (`Task.scores`). A site that has trained since takes
its newest adapter in place of the one it sent. The price is K adapters on every downlink and K forwards an answer.

`distil` (ensemble distillation: FedDF, Lin et al., 2020, arXiv 2006.07242): the ensemble teaches one adapter W that all
share, and that alone is served, in one forward. Each round a site trains W into its W_k, then takes the divergence of
W's answers from the ensemble's, on its own examples, and sends both:

.. math:: W \leftarrow \sum_k n_k \arg\min_w KL(p \,\Vert\, p_w) \big/ \sum_k n_k

Where heads are private, each adapter answers under the asking site's head, which was trained above another one.
Students are averaged factor by factor, with FedAvg's error against the mean of products (0.74; attainable is 0.51).

Deviations from FedDF: it distils at the server, on data that the server has; here there are none, so that sites do,
each on its own, and the students are averaged. It averages logits, we average probabilities.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal
from urllib.parse import quote

import torch
from torch import Tensor

from fedloom import sharing
from fedloom.adapters import LoRA
from fedloom.backbones.adaptable import Adaptable
from fedloom.backbones.batches import Batch
from fedloom.distillation import divergence
from fedloom.places import Adapter
from fedloom.serving import Blend, Served
from fedloom.site import Answer, Site, Update
from fedloom.tasks import Task
from fedloom.tensors import Private, Shared, Tensors, at, mean, of_model, only, part, under, without
from fedloom.training import fit, head

LEAST = 1e-7  # a probability, so that its logarithm is finite


@dataclass(frozen=True)
class Ensemble:
    adapter: Adapter = field(default_factory=LoRA)
    distil: bool = False  # whether one adapter learns from the ensemble, and is served in its place

    individual: ClassVar[bool] = True
    sends: ClassVar[frozenset[str]] = frozenset({"local"})
    heads: ClassVar[Literal["private", "shared"]] = "private"

    @property
    def any_width(self) -> bool:
        """Adapters whose outputs are averaged may be of any width; one that learns from them has that of all."""
        return not self.distil

    def start(self, model: Adaptable, task: Task | None, sites: int, seed: int) -> Shared:
        fresh = sharing.begun(self.adapter, "private", model, task, seed)
        return Shared({**at("local", fresh), **(fresh if self.distil else {})})

    def local_round(self, round: int, site: Site, shared: Shared, private: Private) -> tuple[Update, Private]:
        adapter = of_model(shared) if self.distil else self._own(site, shared, private)
        start = {**adapter, **head(site, private)}
        trained, value = fit(site, start, lambda t, b: site.loss(self.adapter, t, b), round)
        kept, own = part("head", trained), without("head", trained)
        metrics, sent = {"loss": value}, at("local", own)
        if self.distil:
            student, metrics["divergence"] = self._distilled(round, site, shared, own, kept)
            sent |= student
        else:
            kept |= sent
        return Update(Shared(sent), len(site), len(site), metrics), Private(kept)

    def aggregate(self, shared: Shared, answers: Iterable[Answer]) -> tuple[Shared, Mapping[str, float]]:
        given = at("given", under("given", shared))

        def students() -> Iterator[tuple[Tensors, float]]:
            for answer in answers:
                given.update(at(f"given/{_key(answer.site)}", under("local", answer.update.tensors)))
                yield without("local", answer.update.tensors), answer.update.weight

        student = mean(students())
        return Shared({**at("local", under("local", shared)), **student, **given}), {}

    def personalise(self, site: Site, shared: Shared, private: Private, epochs: int) -> Private:
        start = of_model(shared) if self.distil else self._own(site, shared, private)
        return sharing.tuned(site, self.adapter, start, private, epochs)

    def serve(self, site: Site, shared: Shared, private: Private) -> Callable[[Batch], Tensor]:
        if self.distil:
            return sharing.predictor(site, self.adapter, shared, private)
        head = {**site.task.init(site.model.dim, site.seed), **part("head", private)}
        own = under("local", private)
        every = self._members(site, shared, own) or {_key(site.name): self._own(site, shared, private)}
        return self._blend(site, every, head)

    def _own(self, site: Site, shared: Shared, private: Private) -> Tensors:
        return under("local", private) or site.initial or under("local", shared)

    def _members(self, site: Site, shared: Shared, own: Tensors) -> dict[str, Tensors]:
        """Everyone's adapter, the site's own in its newest form."""
        given = under("given", shared)
        members = {name: under(name, given) for name in sorted({name.partition("/")[0] for name in given})}
        return {**members, **({_key(site.name): own} if own else {})}

    def _blend(self, site: Site, adapters: Mapping[str, Tensors], head: Tensors) -> Blend:
        independent = separate(site.task)

        def mean_score(logits: Mapping[str, Tensor]) -> Tensor:
            return logits_of(torch.stack([site.task.scores(own) for own in logits.values()]).mean(0), independent)

        parts = {name: Served(site, self.adapter, {**own, **head}) for name, own in adapters.items()}
        return Blend(parts, mean_score, "the mean of the probabilities", alone="distil = true")

    def _distilled(
        self, round: int, site: Site, shared: Shared, own: Tensors, head: Tensors
    ) -> tuple[dict[str, Tensor], float]:
        """The shared adapter after an epoch of learning from the ensemble, under the site's head, which stays."""
        ensemble = self._blend(site, self._members(site, shared, own), head)

        def loss(student: Tensors, batch: Batch) -> Tensor:
            with torch.no_grad():
                teacher = ensemble(batch)
            answer = site.logits(self.adapter, {**student, **head}, batch)
            return divergence(answer, teacher, 1.0, independent=separate(site.task))

        start = of_model(shared)
        student, value = fit(site, start, loss, round)
        return only(start, student), value


def _key(site: str) -> str:
    """A site's name as a part of a tensor's."""
    return quote(site, safe="")


def logits_of(scores: Tensor, independent: bool) -> Tensor:
    """Logits that have these scores, of labels that are judged one by one, or of which one is chosen."""
    scores = scores.clamp(LEAST, 1 - LEAST)
    return scores.logit() if independent else scores.log()


def separate(task: Task) -> bool:
    """Whether a task judges each label by itself, rather than one among all."""
    return bool(task.scores(torch.zeros(1, 3)).sum() > 1.25)  # three halves, or three thirds
