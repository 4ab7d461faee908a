"""What the server does in a round: aligning and averaging updates; and frames of bytes."""

import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedloom.adapters import Bottleneck, LoRA
from fedloom.backbones import Adaptable
from fedloom.bench.lines import Line
from fedloom.bench.lora import BATCH, dtypes
from fedloom.bench.measuring import fresh, interleaved, milliseconds
from fedloom.bench.shapes import NAMES, VILT_NAMES, VILT_SIDE, Size, batch, clip, vilt
from fedloom.bench.vilt import own as vilt_own
from fedloom.federation import visible
from fedloom.lineage import peak
from fedloom.methods import FedPIA
from fedloom.site import Answer, Update
from fedloom.tensors import Shared, Tensors, from_bytes, generator, mean, to_bytes, without

SITES = 4
STEPS = 8  # of a site in a round: 64 examples
SHARE = 0.01
WIDTHS = (64, 192)
STARTS = ("from one start", "from starts of their own")  # where units stay, and where they are moved
FEW, MANY = 10, 100


def server(size: Size, repeats: int) -> Iterator[Line]:
    """Goal 8: matching and averaging, against the training of a round and against NumPy; memory against sites."""
    model = vilt(size, dtypes()[-1])
    given = batch(BATCH, VILT_SIDE, texts=True)
    step = vilt_own(model, given)
    cases = {f"{width} hidden units {where}": _fedpia(width, model, where) for width in WIDTHS for where in STARTS}
    took = interleaved({"step": step, **cases}, max(2, repeats // 2))
    for case in cases:
        yield Line(
            "server",
            f"FedPIA's server a site, {case}, {VILT_NAMES[size]}",
            1e3 * took[case].minimum / SITES,
            "ms",
            f"a site's round of {STEPS} steps, {dtypes()[-1]}, batch {BATCH}",
            STEPS * 1e3 * took["step"].minimum,
            SHARE,
            at_most=True,
            own_median=1e3 * took[case].median / SITES,
            peer_median=STEPS * 1e3 * took["step"].median,
        )
    shared = clip(size).init(LoRA(), 0)
    updates = [_moved(shared, i) for i in range(FEW)]
    means = interleaved(
        {"fedloom": lambda: mean((update, 1.0) for update in updates), "numpy": lambda: reduced(updates)}, 4 * repeats
    )
    yield Line(
        "server",
        f"mean of {FEW} updates in float64, LoRA of {NAMES[size]}",
        1e3 * means["fedloom"].minimum,
        "ms",
        "NumPy, list reduce in float32",
        1e3 * means["numpy"].minimum,
    )
    few, many = (fresh(folded, shared, sites) for sites in (FEW, MANY))
    frame = len(to_bytes(shared))
    yield Line(
        "server",
        f"memory of the server a further update, {FEW} to {MANY}, LoRA of {NAMES[size]}",
        max(0, many - few) / (MANY - FEW) / 1e6,
        "MB",
        "the bytes of an update",
        frame / 1e6,
        0.1,
        at_most=True,
    )


def frames(size: Size, repeats: int) -> Iterator[Line]:
    """An adapter to bytes and back, against torch.save and NumPy's npz."""
    shared = clip(size).init(LoRA(), 0)
    took = interleaved(
        {"own": lambda: from_bytes(to_bytes(shared)), "torch": lambda: _torch(shared), "npz": lambda: _npz(shared)},
        4 * repeats,
    )
    for peer, name in (("torch", "torch.save"), ("npz", "NumPy's npz")):
        yield Line(
            "frames",
            f"adapter to bytes and back, LoRA of {NAMES[size]}",
            against=name,
            **milliseconds(took["own"], took[peer]),
        )


def folded(shared: Tensors, sites: int) -> int:
    """The most bytes that a process has held which averages so many updates as they come."""
    torch.set_num_threads(1)
    mean((_moved(shared, i), 1.0) for i in range(sites))
    return peak()


def reduced(updates: list[dict[str, Tensor]]) -> dict[str, Any]:
    """The mean as federated learning libraries write it: all updates at once, a list for each tensor."""
    arrays = [{name: tensor.numpy() for name, tensor in update.items()} for update in updates]
    total = float(len(arrays))
    return {name: sum(array[name] * 1.0 for array in arrays) / total for name in arrays[0]}


def _fedpia(width: int, model: Adaptable, starts: str) -> Callable[[], object]:
    method = FedPIA(Bottleneck(width=width))
    shared = method.start(model, None, SITES, 0)
    seeds = [0 if starts == STARTS[0] else 1 + i for i in range(SITES)]
    sent = [without("given", visible(method.start(model, None, SITES, seed))) for seed in seeds]
    answers = [Answer(f"{i}", Update(Shared(_moved(own, i)), 1.0, 1)) for i, own in enumerate(sent)]
    return lambda: method.aggregate(shared, answers)


def _moved(shared: Tensors, seed: int) -> dict[str, Tensor]:
    rng = generator("moved", seed)
    return {name: t + 0.01 * torch.randn(t.shape, generator=rng) for name, t in shared.items()}


def _torch(tensors: Mapping[str, Tensor]) -> object:
    file = io.BytesIO()
    torch.save(dict(tensors), file)
    file.seek(0)
    return torch.load(file)


def _npz(tensors: Mapping[str, Tensor]) -> object:
    file = io.BytesIO()
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    np.savez(file, **arrays)
    file.seek(0)
    with np.load(file) as read:
        return {name: torch.from_numpy(read[name]) for name in read.files}
