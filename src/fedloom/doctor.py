"""What `fedloom check` looks at: this machine, and a recipe's sites."""

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from fedloom import __version__, backbones
from fedloom.assembly import assemble, planned
from fedloom.data import Dataset, Example, read
from fedloom.errors import BackboneError, DataError
from fedloom.labels import vocabulary
from fedloom.partition import shared_images
from fedloom.recipe import Recipe

EXTRAS = {  # what each brings
    "bench": ("flwr", "psutil"),
    "dicom": ("pydicom",),
    "nvflare": ("nvflare",),
    "onnx": ("onnxruntime",),
    "peft": ("peft",),
    "track": ("accelerate", "tensorboard"),
}
SHOWN = 5  # images that two sites share


def machine() -> Iterator[str]:
    """Versions, devices, disk and extras, a line each."""
    from fedloom.backbones.devices import available, has_bf16

    yield f"fedloom {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield "  ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "safetensors", "datasets"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield f"device: CPU, {os.cpu_count()} cores, bf16 units: {_yes(has_bf16())}; {memory / 2**30:.0f} GiB memory"
    for name in available()[2:]:  # each by its number
        yield f"device: {name}, bf16 units: {_yes(has_bf16(name))} (--set backbone.device={name})"
    yield f"free disk here: {shutil.disk_usage('.').free / 2**30:.0f} GiB"
    for extra, packages in EXTRAS.items():
        have = {package: _version(package) for package in packages}
        if lacking := [package for package, found in have.items() if found is None]:
            yield f"extra {extra}: no {' and no '.join(lacking)} (pip install 'fedloom[{extra}]')"
        else:
            yield f"extra {extra}: {', '.join(f'{package} {found}' for package, found in have.items())}"


def present(recipe: Recipe) -> Iterator[str]:
    """Whether what a recipe names is there: its data, and its backbone."""
    for name, group in recipe.parts.items():
        what = f"data of {name}" if name else "data"
        try:
            yield f"{what}: {len(read(group.data.source, group.data.columns).examples)} examples"
        except DataError:
            yield f"{what}: cannot be used"
    name = recipe.backbone.name
    try:
        folder = Path(backbones.locate(name))
    except BackboneError:
        yield f"backbone {name}: not there"
        return
    if folder.is_dir():
        yield f"backbone {name}: there, {sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.0f} MB"
    elif try_to_load_from_cache(name, "config.json"):
        yield f"backbone {name}: fetched before"
    else:
        yield f"backbone {name}: not fetched yet; the first run takes it from the Hugging Face hub"


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


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _yes(there: bool) -> str:
    return "yes" if there else "no"
