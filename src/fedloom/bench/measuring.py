"""How a benchmark measures: variants in turn, one thread, CPU time; memory in a process of its own."""

import multiprocessing
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedloom import __version__
from fedloom.backbones.devices import has_bf16

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """Of one variant, seconds."""

    minimum: float
    median: float


def milliseconds(own: Timing, peer: Timing) -> dict[str, Any]:
    """The figures of a `Line`."""
    figures = {"own": own.minimum, "peer": peer.minimum, "own_median": own.median, "peer_median": peer.median}
    return {"unit": "ms", **{name: 1e3 * seconds for name, seconds in figures.items()}}


def interleaved(
    variants: Mapping[Name, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.process_time
) -> dict[Name, Timing]:
    """Each variant once unmeasured, then all of them in turn, so that what else the machine does meets all alike.

    The minimum says what the work takes, the median what it took here.
    """
    for variant in variants.values():
        variant()
    spent: dict[Name, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, variant in variants.items():
            began = clock()
            variant()
            spent[name].append(clock() - began)
    return {name: Timing(min(each), statistics.median(each)) for name, each in spent.items()}


def products(module: nn.Module, run: Callable[[], object]) -> Callable[[], None]:
    """The floor of a training step: the products with frozen matrices that `run` makes, forward and backward, alone."""
    with torch.no_grad():
        run()  # what is kept from then on
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def note(layer: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        seen.append((args[0].detach().flatten(0, -2), layer.weight, torch.randn_like(out).flatten(0, -2)))  # type: ignore[arg-type]

    hooks = [layer.register_forward_hook(note) for layer in module.modules() if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()

    def floor() -> None:
        with torch.no_grad():
            for h, weight, slope in seen:
                F.linear(h, weight)
                slope @ weight

    return floor


def fresh(work: Callable[..., Any], *arguments: object) -> Any:
    """What `work` returns, in a process of its own, with one thread."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def lineage() -> dict[str, str]:
    """Which program was measured, and where."""
    found = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    cpu = Path("/proc/cpuinfo")
    models = [line for line in cpu.read_text().splitlines() if line.startswith("model name")] if cpu.is_file() else []
    model = models[0].partition(":")[2].strip() if models else platform.processor()
    return {
        "fedloom": __version__,
        "commit": found.stdout.strip() or "none: installed from a package",
        "machine": f"{model} ({platform.machine()}), {len(models)} cores, "
        f"bf16 units: {'yes' if has_bf16() else 'no'}, one thread",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
    }
