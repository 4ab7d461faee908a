"""What `fedloom check` looks at: this machine, and a recipe's sites."""

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fedloom import __version__
from fedloom.assembly import assemble, planned
from fedloom.data import Dataset, Example
from fedloom.labels import vocabulary
from fedloom.partition import shared_images
from fedloom.recipe import Recipe

EXTRAS = {"dicom": "pydicom", "nvflare": "nvflare"}  # extra -> what it brings
SHOWN = 5  # images that two sites share


def machine() -> Iterator[str]:
    """Versions, units, memory, disk and extras, a line each."""
    import torch

    yield f"fedloom {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield "  ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "safetensors", "datasets"))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield f"{os.cpu_count()} cores, {memory / 2**30:.0f} GiB memory, GPU: {', '.join(gpus) or 'none'}"
    yield f"bf16 units: {'yes' if _has_bf16() else 'no'}; free disk here: {shutil.disk_usage('.').free / 2**30:.0f} GiB"
    for extra, package in EXTRAS.items():
        try:
            yield f"extra {extra}: {package} {version(package)}"
        except PackageNotFoundError:
            yield f"extra {extra}: not installed (pip install 'fedloom[{extra}]')"


def sites(recipe: Recipe) -> Iterator[str]:
    """A recipe's sites: sizes, classes without examples, images that two sites or two splits share."""
    federation = assemble(planned(recipe))
    yield f"{len(federation.participants)} sites, {len(federation.newcomers)} newcomers"
    everyone = {**federation.participants, **federation.newcomers}
    for name, own in everyone.items():
        classes = vocabulary(example.label for example in own.site.train.examples)
        absent = len(set(own.site.task.labels).difference(classes))
        yield (
            f"  {name}: {len(own.site.train)} train, {len(own.site.held_out)} held out, {len(own.test)} test; "
            f"{len(classes)} classes ({absent} without a training example)"
        )
    yield from federation.skipped
    splits = {
        f"{name} ({split})": _located(own.split(split))
        for name, own in everyone.items()
        for split in ("train", "held_out", "test")
    }
    overlaps = shared_images(splits, Path())
    yield f"images in two sites or two splits: {len(overlaps)}" + (f"; {SHOWN} of them:" * (len(overlaps) > SHOWN))
    for overlap in sorted(overlaps, key=lambda overlap: overlap.how)[:SHOWN]:  # copies before what looks alike
        yield f"  {overlap.image} of {overlap.site} is {overlap.other_image} of {overlap.other_site} ({overlap.how})"


def _located(dataset: Dataset) -> list[Example]:
    """Its examples, each with the whole path of its image: two groups of sites may have two sources."""
    root = dataset.pixels.root if dataset.pixels else Path()
    return [replace(row, image=str(root / row.image) if row.image else None) for row in dataset.examples]


def _has_bf16() -> bool:
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text() if cpu.is_file() else ""
    return "amx_bf16" in flags or "avx512_bf16" in flags
