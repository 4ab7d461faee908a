"""Several sites at once, against one after the other: in one forward pass, or in worker processes."""

import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from fedloom.adapters import LoRA
from fedloom.backbones import Adaptable
from fedloom.bench.lines import Line
from fedloom.bench.lora import BATCH, CLASSES, Step, dtypes
from fedloom.bench.measuring import interleaved, milliseconds
from fedloom.bench.shapes import NAMES, SIDE, Size, clip, noise
from fedloom.data import Dataset, Example
from fedloom.engines.local import LocalEngine, Participant
from fedloom.methods import FedAvg
from fedloom.site import Site
from fedloom.store import Store
from fedloom.tasks import Classification
from fedloom.training import Training

SITES = 8
EPOCHS = 2  # steps of a client of one example
EXAMPLES: Mapping[Size, tuple[int, ...]] = {"small": (1, 4), "base": (1,)}  # of a client
GOALS = {"float32": 2.0, "bfloat16": 2.5}
WORKERS = 2
MANY = 32  # examples of a client whose training is worth a process


def grouped(size: Size, repeats: int) -> Iterator[Line]:
    """Goal 4: a round of FedAvg, machinery and all."""
    with tempfile.TemporaryDirectory() as folder:
        steps: dict[str, Step] = {}
        for dtype in dtypes():
            made = clip(size, dtype)
            for n in EXAMPLES[size]:
                for group in (1, SITES):
                    steps[f"{dtype} {n} {group}"] = _round(made, n, Path(folder), group=group)
        took = interleaved(steps, repeats)
    for dtype in dtypes():
        for n in EXAMPLES[size]:
            yield Line(
                "grouped",
                f"{SITES} clients of {n} in one pass, {NAMES[size]}, {dtype}",
                against="one after the other",
                goal=GOALS[dtype] if n == 1 else None,
                **milliseconds(took[f"{dtype} {n} {SITES}"], took[f"{dtype} {n} 1"]),
            )


def workers(size: Size, repeats: int) -> Iterator[Line]:
    """What two processes win on the clock, on a machine of two cores that does nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        for dtype in dtypes():
            made = clip(size, dtype)
            steps = {n: _round(made, MANY, Path(folder), workers=n) for n in (1, WORKERS)}
            took = interleaved(steps, repeats, time.perf_counter)
            yield Line(
                "workers",
                f"{SITES} clients of {MANY} in {WORKERS} processes, {NAMES[size]}, {dtype}, on the clock",
                against="in one",
                **milliseconds(took[WORKERS], took[1]),
            )


def _round(made: Adaptable, n: int, folder: Path, group: int = 1, workers: int = 1) -> Step:
    engine = replace(of_noise(made, SITES, n, folder / f"{group}-{workers}"), group=group, workers=workers)
    shared = engine.method.start(made, None, SITES, 0)
    return lambda: list(engine.round(0, shared, list(engine.participants)))


def of_noise(made: Adaptable, sites: int, n: int, folder: Path) -> LocalEngine:
    """FedAvg of a LoRA at sites with n images of noise each."""
    task = Classification(tuple(str(i) for i in range(CLASSES)))
    names = [f"{i}.png" for i in range(sites * n)]
    pixels = noise(made.network, names, SIDE)
    training, own = Training(batch=min(n, BATCH), epochs=EPOCHS), {}
    for i in range(sites):
        data = Dataset(tuple(Example(str(j % CLASSES), names[i * n + j]) for j in range(n)), pixels)
        site = Site(f"{i}", made, task, data, Dataset(()), training, 0)
        own[site.name] = Participant(site, Store(folder / site.name), Dataset(()))
    return LocalEngine(FedAvg(LoRA()), own)
