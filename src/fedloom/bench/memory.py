"""Memory against sites: one backbone for all, private states on disk, each federation in a process of its own."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

from fedloom.adapters import LoRA
from fedloom.bench.lines import Line
from fedloom.bench.lora import dtypes
from fedloom.bench.measuring import fresh
from fedloom.bench.shapes import NAMES, Size, clip
from fedloom.data import Dataset, Example, Pixels
from fedloom.engines.local import LocalEngine, Participant
from fedloom.federation import Schedule, federate
from fedloom.lineage import peak
from fedloom.methods import Ditto
from fedloom.site import Site
from fedloom.store import Store
from fedloom.tasks import Classification
from fedloom.training import Training

FEW, MANY = 100, 1000
LIMIT = 3000.0  # MB
PER_SITE = 1.1  # of a site's private bytes


def memory(size: Size, repeats: int) -> Iterator[Line]:
    """Goal 6: a round of Ditto, whose sites keep an adapter of their own; one image a site."""
    (few, _), (many, private) = (fresh(held, size, dtypes()[-1], sites) for sites in (FEW, MANY))
    what = f"{MANY} sites, {NAMES[size]}, {dtypes()[-1]}, LoRA of rank 8"
    yield Line("memory", f"{what}: peak", many / 1e6, "MB", goal=LIMIT if size == "base" else None, at_most=True)
    yield Line(
        "memory",
        f"{what}: a further site",
        max(0.0, (many - few) / (MANY - FEW)) / 1e6,
        "MB",
        "its private bytes, on disk",
        private / MANY / 1e6,
        PER_SITE,
        at_most=True,
    )


def held(size: Size, dtype: str, sites: int) -> tuple[int, int]:
    """The most bytes that this process has held after a round of so many sites, and what those keep on disk."""
    torch.set_num_threads(1)
    model, task, method = clip(size, dtype), Classification(("cat", "dog")), Ditto(LoRA())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Image.new("RGB", (224, 224)).save(folder / "black.png")
        data = Dataset((Example("cat", "black.png"),), Pixels(folder, model.network.decode))
        roster = tuple(f"site-{i}" for i in range(sites))
        participants = {
            name: Participant(
                Site(name, model, task, data, Dataset(()), Training(), 0), Store(folder / name), Dataset(())
            )
            for name in roster
        }
        shared = method.start(model, task, sites, 0)
        for _ in federate(method, LocalEngine(method, participants), shared, Schedule(roster, 1)):
            pass
        return peak(), sum(own.store.size() for own in participants.values())
