"""A round in which no site does anything: what the machinery costs, against a simulation on Ray."""

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from fedloom.adapters import LoRA
from fedloom.backbones import Adaptable, Batch
from fedloom.bench.lines import Line
from fedloom.bench.measuring import fresh
from fedloom.bench.shapes import NAMES, Size, clip
from fedloom.check.tiny import federation
from fedloom.data import Dataset
from fedloom.engines.local import LocalEngine, Participant
from fedloom.federation import Round, Schedule, federate
from fedloom.places import Adapter
from fedloom.site import Answer, Site, Update
from fedloom.store import Store
from fedloom.tasks import Task
from fedloom.tensors import Private, Shared, Tensors, mean

SITES = 20
ROUNDS = 8
MACHINERY = 1.5  # ms a client
START = 0.5  # s
OVER_RAY = 20.0


@dataclass(frozen=True)
class Idle:
    """A method whose sites send back what they were given."""

    adapter: Adapter = field(default_factory=LoRA)
    individual: ClassVar[bool] = False
    sends: ClassVar[frozenset[str]] = frozenset()
    heads: ClassVar[Literal["private", "shared"]] = "private"

    def start(self, model: Adaptable, task: Task | None, sites: int, seed: int) -> Shared:
        return Shared(model.init(self.adapter, seed))

    def local_round(self, round: int, site: Site, shared: Shared, private: Private) -> tuple[Update, Private]:
        return Update(shared, 1.0, 1), private

    def aggregate(self, shared: Shared, answers: Iterable[Answer]) -> tuple[Shared, Mapping[str, float]]:
        return Shared(mean((answer.update.tensors, answer.update.weight) for answer in answers)), {}

    def personalise(self, site: Site, shared: Shared, private: Private, epochs: int) -> Private:
        return private

    def serve(self, site: Site, shared: Shared, private: Private) -> Callable[[Batch], torch.Tensor]:
        return lambda batch: site.logits(self.adapter, shared, batch)


def null_round(size: Size, repeats: int) -> Iterator[Line]:
    """Goal 7: CPU time, of all processes that a simulation starts; each in a process of its own."""
    shared = clip(size).init(LoRA(), 0)
    own, start = fresh(fedloom_rounds, shared)
    what = f"null round, {SITES} clients, LoRA of {NAMES[size]}"
    yield Line("null-round", f"{what}: a client", own, "ms", goal=MACHINERY, at_most=True)
    yield Line("null-round", f"{what}: to the end of the first, model loaded", start, "s", goal=START, at_most=True)
    theirs, began = fresh(flower_rounds, shared)
    yield Line("null-round", f"{what}: a client", own, "ms", "Flower, simulation on Ray", theirs, OVER_RAY)
    yield Line("null-round", f"{what}: to the end of the first", start, "s", "Flower, simulation on Ray", began)


def fedloom_rounds(shared: Tensors) -> tuple[float, float]:
    """CPU milliseconds a client in the least of the rounds, and CPU seconds to the end of the first."""
    torch.set_num_threads(1)
    site = federation()[0]  # whose tiny model nobody calls
    with tempfile.TemporaryDirectory() as folder:
        ended = [time.process_time()]
        for _ in _federated(shared, Path(folder), site):
            ended.append(time.process_time())
    return _least(ended[1:]), ended[1] - ended[0]


def _least(ended: Sequence[float]) -> float:
    return 1e3 * min(after - before for before, after in pairwise(ended)) / SITES


def _federated(shared: Tensors, folder: Path, site: Site) -> Iterator[Round]:
    method, names = Idle(), tuple(f"site-{i}" for i in range(SITES))
    sites = {name: Participant(site, Store(folder / name), Dataset(())) for name in names}
    return federate(method, LocalEngine(method, sites), Shared(shared), Schedule(names, ROUNDS))


def flower_rounds(shared: Tensors) -> tuple[float, float]:
    """The same of Flower's simulation, of all its processes."""
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    import psutil
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    ended: list[float] = []

    def spent() -> float:
        own = psutil.Process()
        times = [one.cpu_times() for one in (own, *own.children(recursive=True))]
        return float(sum(one.user + one.system + one.children_user + one.children_system for one in times))

    client, server = ClientApp(), ServerApp()

    @client.train()  # type: ignore[untyped-decorator]
    def train(message: Message, context: Context) -> Message:
        reply = {"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(reply), reply_to=message)

    def noted(round: int, arrays: ArrayRecord) -> MetricRecord:
        ended.append(spent())
        return MetricRecord({"round": round})

    @server.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        given = ArrayRecord({name: tensor.detach() for name, tensor in shared.items()})
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=SITES, min_available_nodes=SITES)
        strategy.start(grid, given, num_rounds=ROUNDS, evaluate_fn=noted)

    began = spent()
    resources: dict[str, Any] = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client, SITES, backend_config=resources)
    return _least(ended[1:]), ended[1] - began  # noted before the first round, too
