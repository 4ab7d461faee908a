r"""SCAFFOLD on adapters (Karimireddy et al., 2020, arXiv 1910.06378): control variates against drift.

The server keeps c, the direction in which all would go, every site k its own c_k. Each of a site's S steps takes the
gradient g of its loss, corrected:

.. math:: y_k \leftarrow y_k - \eta\,(g(y_k) - c_k + c), \qquad c_k^+ = \tfrac1S \sum_s g(y_k^s), \qquad
          W \leftarrow W + \tfrac{\eta_g}{|P|} \sum_{k \in P} (y_k - W), \qquad
          c \leftarrow c + \tfrac1N \sum_{k \in P} (c_k^+ - c_k)

over the |P| sites that answered, of N. The new control is the mean gradient along the path. Under plain SGD that is the
paper's option II, c_k - c + (W - y_k) / (S η), and it stays a gradient under any other optimiser and under clipping.

A LoRA is averaged factor by factor, and is as far from the mean of products as FedAvg's.

Every site counts alike, as in the paper. The change of a site's control is sent beside its adapter, which doubles what
goes up and what comes down. Deviations: the corrected gradient goes into [training]'s optimiser, which is AdamW unless
it says SGD (AdamW divides a correction by what it divides a gradient by: the paper's guarantee is for SGD); a private
head is trained along, without control.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Gt
from torch import Tensor

from fedloom import sharing
from fedloom.adapters import LoRA
from fedloom.backbones.adaptable import Adaptable
from fedloom.backbones.batches import Batch
from fedloom.places import Adapter
from fedloom.site import Answer, Site, Update
from fedloom.tasks import Task
from fedloom.tensors import Private, Shared, Tensors, at, mean, of_model, only, part, under
from fedloom.training import State, descend, gradient, head, leaves, placed


@dataclass(frozen=True)
class Scaffold:
    adapter: Adapter = field(default_factory=LoRA)
    eta: Annotated[float, Gt(0)] = 1.0  # η_g: the server's step

    individual: ClassVar[bool] = False
    sends: ClassVar[frozenset[str]] = frozenset({"control"})  # the change of a site's own
    heads: ClassVar[Literal["private", "shared"]] = "private"

    def start(self, model: Adaptable, task: Task | None, sites: int, seed: int) -> Shared:
        x = sharing.begun(self.adapter, self.heads, model, task, seed)
        return Shared({**x, **at("control", _zeros(x)), "server/sites": torch.tensor(float(sites))})

    def local_round(self, round: int, site: Site, shared: Shared, private: Private) -> tuple[Update, Private]:
        x, c = of_model(shared), under("control", shared)
        own = under("control", private) or _zeros(x)
        correction = {name: c[name] - own[name] for name in x}
        state, total, losses = State({**x, **head(site, private)}), _zeros(x), []
        for i, batch in enumerate(site.batches(round)):
            free = leaves(state.tensors)
            with placed(site, round, i):
                slope, value = gradient(site.loss(self.adapter, free, batch), free)
            losses.append(value)
            total = {name: g + slope[name] if name in slope else g for name, g in total.items()}
            corrected = {name: g + correction[name] if name in x else g for name, g in slope.items()}
            state = descend(state, corrected, site.training)
        after = {name: g / len(losses) for name, g in total.items()}
        change = {name: after[name] - own[name] for name in x}
        sent = Shared({**only(x, state.tensors), **at("control", change)})
        kept = {**part("head", state.tensors), **at("control", after)}
        return Update(sent, 1.0, len(site), {"loss": sum(losses) / len(losses)}), Private(kept)

    def aggregate(self, shared: Shared, answers: Iterable[Answer]) -> tuple[Shared, Mapping[str, float]]:
        answered = 0.0

        def updates() -> Iterable[tuple[Tensors, float]]:
            nonlocal answered
            for answer in answers:
                answered += answer.update.weight
                yield answer.update.tensors, answer.update.weight

        folded = mean(updates())
        share = answered / float(shared["server/sites"])
        x = {name: old + self.eta * (folded[name] - old) for name, old in of_model(shared).items()}
        c = {name: old + share * folded[f"control/{name}"] for name, old in under("control", shared).items()}
        return Shared({**x, **at("control", c), "server/sites": shared["server/sites"]}), {}

    def personalise(self, site: Site, shared: Shared, private: Private, epochs: int) -> Private:
        return Private({**private, **sharing.tuned(site, self.adapter, shared, private, epochs)})

    def serve(self, site: Site, shared: Shared, private: Private) -> Callable[[Batch], Tensor]:
        return sharing.predictor(site, self.adapter, shared, private)


def _zeros(tensors: Tensors) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
