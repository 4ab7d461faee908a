"""Benchmarks: what fedloom takes, against what its peers take for the same work, in one call on one machine.

Variants run in turn on one thread, and CPU time is counted: absolute times say little, ratios much. Models have the
shapes of published ones and random weights. `fedloom bench` prints the lines; none of them is a test.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from fedloom.bench.attention import attention
from fedloom.bench.client import client
from fedloom.bench.compiled import compiled
from fedloom.bench.feddlp import feddlp_step
from fedloom.bench.lines import Line, Measured, table
from fedloom.bench.lora import lora_step, many_classes, prefix
from fedloom.bench.measuring import lineage
from fedloom.bench.memory import memory
from fedloom.bench.null_round import null_round
from fedloom.bench.server import frames, server
from fedloom.bench.shapes import Size
from fedloom.bench.sites import grouped, workers
from fedloom.bench.vilt import vilt_step
from fedloom.bench.wire import wire
from fedloom.errors import RunError
from fedloom.events import Note, Watch
from fedloom.tables import guess

__all__ = ["WORKLOADS", "Line", "Measured", "Options", "bench", "table"]

PEERS = {"peft": "PEFT", "flwr": "Flower", "psutil": "psutil", "ray": "Ray"}
Workload = Callable[[Size, int], Iterator[Line]]

WORKLOADS: Mapping[str, Workload] = {
    "attention": attention,
    "lora-step": lora_step,
    "clip-classes": many_classes,
    "feddlp-step": feddlp_step,
    "grouped": grouped,
    "workers": workers,
    "prefix": prefix,
    "vilt-step": vilt_step,
    "compiled": compiled,
    "memory": memory,
    "null-round": null_round,
    "server": server,
    "client": client,
    "frames": frames,
    "wire": wire,
}


@dataclass(frozen=True)
class Options:
    """Which workloads, how large, how often."""

    names: tuple[str, ...] = tuple(WORKLOADS)
    sizes: tuple[Size, ...] = ("small", "base")
    repeats: int = 5  # of each variant of a step; of what is quicker more, of what is slower fewer

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in WORKLOADS:
                raise RunError(f"there is no workload '{name}'{guess(name, WORKLOADS)}")

    @property
    def command(self) -> str:
        """The command line that measures the same again."""
        names = () if self.names == tuple(WORKLOADS) else self.names
        sizes = "" if len(self.sizes) > 1 else f"--size {self.sizes[0]}"
        return " ".join(["fedloom", "bench", *names, *filter(None, [sizes]), f"--repeats {self.repeats}"])


def bench(options: Options, watch: Watch) -> Measured:
    """Measure; `watch` hears of each workload as it begins. One whose peer is not installed is left out, and named."""
    torch.set_num_threads(1)
    lines: list[Line] = []
    left_out: list[str] = []
    for name in options.names:
        for size in options.sizes:
            watch(Note(f"{name}, {size}"))
            try:
                lines.extend(WORKLOADS[name](size, options.repeats))
            except ModuleNotFoundError as e:
                peer = str(e.name).partition(".")[0]
                if peer not in PEERS:
                    raise
                left_out.append(f"{name} needs {PEERS[peer]}, which is not installed: pip install 'fedloom[bench]'.")
                break
    return Measured(tuple(lines), tuple(left_out), options.command, lineage())
