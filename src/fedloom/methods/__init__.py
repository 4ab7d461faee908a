"""Federated methods: one frozen dataclass in one file each, to be read beside its paper."""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, Protocol

from torch import Tensor

from fedloom.backbones.adaptable import Adaptable
from fedloom.backbones.batches import Batch
from fedloom.methods.ditto import Ditto
from fedloom.methods.ensemble import Ensemble
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.feddat import FedDAT
from fedloom.methods.feddlp import FedDLP
from fedloom.methods.fedexlora import FedExLoRA
from fedloom.methods.fedopt import FedOpt
from fedloom.methods.fedpia import FedPIA
from fedloom.methods.flexlora import FlexLoRA
from fedloom.methods.flora import FLoRA
from fedloom.methods.frozen import Frozen
from fedloom.methods.local import Local
from fedloom.methods.majority import Majority
from fedloom.methods.partial import Partial
from fedloom.methods.pooled import Pooled
from fedloom.methods.scaffold import Scaffold
from fedloom.places import Adapter
from fedloom.site import Answer, Site, Update
from fedloom.tasks import Task
from fedloom.tensors import Private, Shared

__all__ = [
    "METHODS",
    "Ditto",
    "Ensemble",
    "FLoRA",
    "FedAvg",
    "FedDAT",
    "FedDLP",
    "FedExLoRA",
    "FedOpt",
    "FedPIA",
    "FlexLoRA",
    "Frozen",
    "Local",
    "Majority",
    "Method",
    "Metrics",
    "Partial",
    "Pooled",
    "Predictor",
    "Scaffold",
]

Metrics = Mapping[str, float]
Predictor = Callable[[Batch], Tensor]


class Method(Protocol):
    """Five functions over three values: `shared`, `private` and `update`. Nothing is written into what is given.

    A method may say `any_width = True` beside: then sites may send adapters of another width than that of `shared`.
    """

    @property
    def adapter(self) -> Adapter:
        """What a site serves through: the local-only reference trains the same, and a prefix cache leaves it room."""

    @property
    def individual(self) -> bool:
        """Whether, with these options, the server must see each update by itself. Where not, `aggregate` of the updates
        equals `aggregate` of their weighted mean, so that secure aggregation may stand between."""

    @property
    def sends(self) -> frozenset[str]:
        """First parts of private names that it publishes on purpose."""

    @property
    def heads(self) -> Literal["private", "shared"]:
        """Where the task's head lives."""

    def start(self, model: Adaptable, task: Task | None, sites: int, seed: int) -> Shared:
        """What server and sites agree on before the first round. `task` is None where sites' tasks differ."""

    def local_round(self, round: int, site: Site, shared: Shared, private: Private) -> tuple[Update, Private]:
        """Train at one site: what is sent, and what stays. `private` is what the round before left; empty at first."""

    def aggregate(self, shared: Shared, answers: Iterable[Answer]) -> tuple[Shared, Metrics]:
        """The next `shared`, of the answers in roster order, and diagnostics of the round."""

    def personalise(self, site: Site, shared: Shared, private: Private, epochs: int) -> Private:
        """Train at one site and send nothing: fine-tuning after the last round, a newcomer. 0 epochs change nothing."""

    def serve(self, site: Site, shared: Shared, private: Private) -> Predictor:
        """The predictor that this site uses: a batch to logits. It works with an empty `private`. A `Served` or a
        `Blend` (`fedloom.serving`) can be exported."""


METHODS: Mapping[str, type[Method]] = {
    "ditto": Ditto,
    "ensemble": Ensemble,
    "fedavg": FedAvg,
    "feddat": FedDAT,
    "feddlp": FedDLP,
    "fedexlora": FedExLoRA,
    "fedopt": FedOpt,
    "fedpia": FedPIA,
    "flexlora": FlexLoRA,
    "flora": FLoRA,
    "frozen": Frozen,
    "local": Local,
    "majority": Majority,
    "partial": Partial,
    "pooled": Pooled,
    "scaffold": Scaffold,
}
