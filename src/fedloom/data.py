"""Where examples come from, and how their images are decoded.

A source (a manifest, an imagefolder, a pack, a Hugging Face dataset) is read into a `Table` of `Example`s; a partition
and a split (`fedloom.partition`) make unlike sites of it; a `Dataset` is one split of one site, with its pixels.

    table = read("vqa/manifest.jsonl", Columns(text="question", label="answer", group="patient"))
    pixels = Pixels(table.root, backbone.decode)
    train = Dataset(table.examples[:100], pixels)
"""

import re
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fedloom import layouts
from fedloom.dicom import SUFFIX, open_dicom
from fedloom.errors import DataError, ImageError
from fedloom.sources import Rows, csv_rows, folder_rows, hub_rows, jsonl_rows, pack, suggestion

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")  # owner/name:configuration
MEMORY = 8 * 2**30  # bytes of decoded images that a source keeps
PIXELS = 64_000_000  # a larger image is refused: decoded, it would take 200 MB and more


@dataclass(frozen=True)
class Columns:
    """What a source calls its columns.

    A column left at its default may be absent, or empty in a row, the label excepted; one that is named must be there,
    and an image, text or group then in every row. None: not read (the images, for a federation of texts).
    """

    image: str | None = "image"
    text: str | None = "text"
    label: str = "label"
    site: str | None = "site"
    split: str | None = "split"
    group: str | None = None


STANDARD = Columns()


@dataclass(frozen=True)
class Example:
    """One row of a source."""

    label: str | tuple[str, ...]  # one class or answer; several of a multi-label set, () for none; one an annotator
    image: str | None = None  # relative to the table's root, or absolute
    text: str | None = None  # question, report, caption or sentence
    site: str | None = None
    split: str | None = None
    group: str | None = None  # what must stay on one side of a split: a patient
    columns: Mapping[str, str] = field(default_factory=dict, hash=False)  # the row's other cells: scanner, sex, site


@dataclass(frozen=True)
class Table:
    """A source, read."""

    root: Path
    examples: tuple[Example, ...]


def read(source: str, columns: Columns = STANDARD) -> Table:
    """The table that `source` names.

    A manifest (.jsonl or .csv, or a folder with a manifest.jsonl or manifest.csv); an imagefolder (CLASS/IMAGE, or
    train/CLASS/IMAGE beside test/CLASS/IMAGE); `pack:NAME`, a folder in the package's own packs, in $FEDLOOM_DATA or
    in a checkout's benchmarks/data, or `pack:NAME/FILE`, another manifest in it; `LAYOUT:FOLDER`, a published data set
    as its authors lay it out (`fedloom.layouts`), in which no group is torn; a folder of the `datasets` library; else
    a name on the Hugging Face hub, with its configuration as in `clinc_oos:plus`.

    Raises DataError where there is nothing of that name, and where a row, a column or a label is missing or broken.
    """
    if published := layouts.rows(source):
        root, rows = published
        return Table(root, _examples(source, rows, replace(columns, group=columns.group or "group")))
    root, rows = rows_of(source, columns.image)
    return Table(root, _examples(source, rows, columns))


def rows_of(source: str, image: str | None = STANDARD.image) -> tuple[Path, Rows]:
    """The rows of a source that is no published layout, as it has them, and what its images are relative to.

    image: the column of a Hugging Face dataset whose pictures are kept. Raises DataError as `read`.
    """
    path = pack(source.removeprefix("pack:")) if source.startswith("pack:") else Path(source).expanduser()
    readers = {".jsonl": jsonl_rows, ".csv": csv_rows}
    manifest = next((path / name for name in ("manifest.jsonl", "manifest.csv") if (path / name).is_file()), path)
    if manifest.is_file() and manifest.suffix not in readers:
        raise DataError(f"{manifest} is no manifest: expected a .jsonl file, a .csv file or a folder")
    if manifest.is_file():
        return manifest.parent, readers[manifest.suffix](manifest)
    if path.is_dir() and (rows := folder_rows(path)):
        return path, rows
    if path.is_dir() or (HUB_NAME.fullmatch(source) and path.suffix not in readers):
        return hub_rows(str(path) if path.is_dir() else source, image)
    raise DataError(f"there is no file or folder '{source}' (seen from {Path.cwd()}): check the path")


def _examples(source: str, rows: Rows, columns: Columns) -> tuple[Example, ...]:
    listed = list(rows)
    if not listed:
        raise DataError(f"'{source}' is empty: expected at least one example")
    present = list(dict.fromkeys(name for _, row in listed for name in row))
    names: dict[str, str] = {}
    for role in fields(Columns):
        name = getattr(columns, role.name)
        if name in present:
            names[role.name] = name
        elif name is not None and (role.name == "label" or name != role.default):
            raise DataError(
                f"'{source}' has no column '{name}' for the {role.name}{suggestion(name, present)}; "
                f"its columns are {', '.join(present)}; say which is which in [data.columns]"
            )
    examples = tuple(_example(where, row, names) for where, row in listed)
    for (where, _), example in zip(listed, examples, strict=True):
        if isinstance(example.label, str) != isinstance(examples[0].label, str):
            raise DataError(f"{where}: one label and lists of labels are mixed in the column '{names['label']}'")
    return examples


def _example(where: str, row: Mapping[str, object], names: Mapping[str, str]) -> Example:
    def text(name: str, value: object) -> str:
        if isinstance(value, str | int | float) and value == value and str(value).strip():  # NaN is an empty cell
            return str(value).strip()
        if value is None or isinstance(value, str | float):
            raise DataError(f"{where}: empty {name}")
        raise DataError(f"{where}: {name} holds a {type(value).__name__}, expected a text")

    def cell(role: str) -> str | None:
        name = names.get(role)
        value = row.get(name) if name else None
        named = role in ("image", "text", "group") and name != getattr(STANDARD, role)
        return text(name, value) if name and (named or value not in (None, "")) else None

    label = row.get(names["label"])
    labels = [text(names["label"], one) for one in (label if isinstance(label, list) else [label])]
    used = {names.get(role) for role in ("image", "text", "label")}
    others = {name: value for name, value in row.items() if name not in used and isinstance(value, str | int | float)}
    image, sentence = cell("image"), cell("text")
    if image is None and sentence is None:
        raise DataError(f"{where} has neither an image nor a text; its columns are {', '.join(row)}")
    return Example(
        label=tuple(labels) if isinstance(label, list) else labels[0],
        image=image,
        text=sentence,
        site=cell("site"),
        split=cell("split"),
        group=cell("group"),
        columns={name: str(value) for name, value in others.items() if value != ""},
    )


def open_image(path: Path) -> Image.Image:
    """The image as a person sees it: upright, RGB, whatever is transparent on white.

    Grey of more than 8 bits is scaled linearly from its own least and greatest value to 0..255, since medical images
    keep 10 or 12 bits in a container of 16. DICOM (.dcm): see `open_dicom`. Raises ImageError.
    """
    if path.suffix.lower() == SUFFIX:
        return open_dicom(path, PIXELS).convert("RGB")
    try:
        with Image.open(path) as image:
            if image.width * image.height > PIXELS:
                raise ImageError(f"image {path} has {image.width} x {image.height} pixels: shrink it below {PIXELS:,}")
            image.load()
            upright = ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise ImageError(f"image {path} is missing") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"image {path} is too large to decode: {error}") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise ImageError(f"image {path} is truncated or no image: {error}") from None
    if upright.mode.startswith(("I", "F")):
        grey = np.nan_to_num(np.asarray(upright, dtype=np.float64))
        grey = (grey - grey.min()) * (255 / max(np.ptp(grey), 1e-12))
        upright = Image.fromarray(grey.round().astype(np.uint8))
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        white = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(white, upright)
    return upright.convert("RGB")


class Pixels:
    """Decoded images, shared by all sites: each is decoded once and kept as uint8, (3, height, width).

    When they fill `MEMORY`, the others are decoded anew at every use. `decode` is the backbone's own resizing and
    cropping, without its normalisation.
    """

    def __init__(self, root: Path, decode: Callable[[Image.Image], Tensor], on_bad: Literal["error", "skip"] = "error"):
        self.root, self.decode, self.on_bad = root, decode, on_bad
        self._decoded: dict[str, Tensor] = {}
        self._room = MEMORY

    def __getitem__(self, image: str) -> Tensor:
        """Raises ImageError, naming the file."""
        if image in self._decoded:
            return self._decoded[image]
        decoded = self.decode(open_image(self.root / image))
        if decoded.nbytes <= self._room:
            self._decoded[image] = decoded
            self._room -= decoded.nbytes
        return decoded

    def usable(self, examples: Iterable[Example]) -> tuple[tuple[Example, ...], tuple[str, ...]]:
        """Those whose image can be read, and what is wrong with each other image; `on_bad="error"` raises the first."""
        kept: list[Example] = []
        skipped: dict[str, str] = {}
        for example in examples:
            try:
                if example.image is not None and example.image not in skipped:
                    self[example.image]
            except ImageError as error:
                if self.on_bad == "error":
                    raise ImageError(f"{error}. To go on without it, set on_bad_image = 'skip' in [data].") from None
                skipped[example.image or ""] = str(error)
            if example.image not in skipped:
                kept.append(example)
        return tuple(kept), tuple(skipped.values())


@dataclass(frozen=True, eq=False)
class Dataset:
    """One split of one site."""

    examples: tuple[Example, ...]
    pixels: Pixels | None = None
    prefix: Mapping[str, Tensor] = field(default_factory=dict)  # a frozen prefix's activations, (examples, ...) each

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, rows: slice | Sequence[int]) -> "Dataset":
        indices = range(len(self))[rows] if isinstance(rows, slice) else rows
        chosen = {name: values[torch.tensor(indices, dtype=torch.long)] for name, values in self.prefix.items()}
        return Dataset(tuple(self.examples[row] for row in indices), self.pixels, chosen)

    def images(self, rows: Sequence[int]) -> Tensor | None:
        """(rows, 3, height, width) uint8; None for a dataset of texts alone.

        Images of unlike sizes are filled up with zeros at the bottom and on the right; a fourth channel is 0 there, and
        255 on the image.
        """
        if self.pixels is None:
            return None
        return _stacked([self.pixels[self._cell(row, "image")] for row in rows])

    def texts(self, rows: Sequence[int]) -> tuple[str, ...] | None:
        """None for a dataset of images alone."""
        if all(self.examples[row].text is None for row in rows):
            return None
        return tuple(self._cell(row, "text") for row in rows)

    def _cell(self, row: int, role: Literal["image", "text"]) -> str:
        value: str | None = getattr(self.examples[row], role)
        if value is None:
            other = self.examples[row].image or self.examples[row].text
            raise DataError(f"the example '{other}' of label {self.examples[row].label!r} has no {role}: give it one")
        return value


def _stacked(images: Sequence[Tensor]) -> Tensor:
    if len({image.shape for image in images}) == 1:
        return torch.stack(list(images))
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    canvas = torch.zeros(len(images), 4, height, width, dtype=torch.uint8)
    for row, image in zip(canvas, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = torch.cat([image, torch.full_like(image[:1], 255)])
    return canvas
