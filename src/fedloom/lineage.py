"""What a result came from, so that who reads it can tell whether another came from the same; and what it took."""

import hashlib
import platform
import resource
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedloom.assembly import THREADS, Federation
from fedloom.data import Dataset

PACKAGES = ("torch", "transformers")


def lineage(federation: Federation) -> dict[str, Any]:
    """Hashes (SHA-256) of the frozen backbone, of the data, in all and by site, and of this package's source; versions;
    the numerical plan."""
    sites = {
        name: fingerprint(*(own.split(split) for split in ("train", "held_out", "test")))
        for name, own in {**federation.participants, **federation.newcomers}.items()
    }
    plan = federation.recipe.backbone
    return {
        "backbone": weights(federation.model.network.module),
        "data": hashlib.sha256(repr(sorted(sites.items())).encode()).hexdigest(),
        "sites": sites,
        "source": source(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "plan": f"{plan.dtype}, {plan.attention}, {THREADS} thread, {plan.device} of {platform.machine()}",
    }


@cache
def source() -> str:
    """Of every module of this package: its place and text."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def peak() -> int:
    """The most bytes of memory that this process has held since it began."""
    status = Path("/proc/self/status")
    if status.is_file():  # there `ru_maxrss` begins with what the parent held
        held = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(held.split()[1])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def weights(module: nn.Module) -> str:
    """Of every parameter and buffer: its name, type, shape and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(*splits: Dataset) -> str:
    """Of every split's examples, in their order: labels, text and group, and the bytes of the image; no path."""
    digest, images = hashlib.sha256(), dict[str, str]()
    for split in splits:
        for row in split.examples:
            if row.image and split.pixels and row.image not in images:
                images[row.image] = hashlib.sha256((split.pixels.root / row.image).read_bytes()).hexdigest()
            digest.update(repr((row.label, row.text, row.group, images.get(row.image or ""))).encode())
        digest.update(b"\n")  # the same examples, split otherwise, are other data
    return digest.hexdigest()
