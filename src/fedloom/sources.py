"""What a source holds, row by row: the formats that `fedloom.data.read` knows.

A row is a mapping of cells, as the source has them, and where it stands, for messages.
"""

import csv
import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

from fedloom.errors import DataError

Rows: TypeAlias = Iterable[tuple[str, Mapping[str, object]]]
IMAGES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".dcm"})
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "held_out"), "held_out"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def pack(place: str) -> Path:
    """The folder of the pack NAME, or the manifest NAME/FILE in it. Raises DataError.

    The package's own packs come first, then those in FEDLOOM_DATA, then a checkout's.
    """
    name, _, file = place.partition("/")
    package = Path(__file__).resolve().parent
    folders = [package / "assets" / "packs"]
    if os.environ.get("FEDLOOM_DATA"):
        folders.append(Path(os.environ["FEDLOOM_DATA"]).expanduser())
    folders += [above / "benchmarks" / "data" for above in package.parents[:2]]
    packs = {path.name: path for folder in reversed(folders) for path in folder.glob("*/")}
    if name in packs:
        return packs[name] / file
    looked = ", ".join(str(folder) for folder in folders)
    raise DataError(
        f"there is no pack '{name}'{suggestion(name, packs)} in {looked}; found: {', '.join(sorted(packs)) or 'none'}. "
        "Set FEDLOOM_DATA to the folder that holds it"
    )


def jsonl_rows(path: Path) -> Rows:
    """A JSON object a line."""
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is not JSON: {error.msg} at character {error.pos + 1}") from None
        if not isinstance(row, dict):
            raise DataError(f'{where} holds a {type(row).__name__}, expected an object: {{"image": ..., ...}}')
        yield where, row


def csv_rows(path: Path) -> Rows:
    """A header, then a row a line; a cell of several labels holds a JSON list."""
    reader = csv.DictReader(_lines(path))
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row:
                raise DataError(f"{where} has more cells than the header's {len(row) - 1}: quote a cell with a comma")
            yield where, {name: _cell(value or "") for name, value in row.items()}
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num} is not CSV: {error}") from None


def _cell(value: str) -> object:
    try:
        return json.loads(value) if value.startswith("[") else value
    except json.JSONDecodeError:  # a text that begins with a bracket
        return value


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from file
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from None


def folder_rows(root: Path) -> Rows:
    """The images of CLASS/ or SPLIT/CLASS/; none where `root` holds no such folder."""

    def folders(path: Path) -> list[Path]:
        return sorted(below for below in path.iterdir() if below.is_dir() and not below.name.startswith("."))

    tops = folders(root)
    by_split = all(top.name.lower() in SPLITS for top in tops)
    classes = [label for top in tops for label in folders(top)] if by_split else tops
    rows: list[tuple[str, Mapping[str, object]]] = []
    empty = []
    for label in classes:
        split = {"split": label.parent.name} if by_split else {}
        images = sorted(file for file in label.iterdir() if file.suffix.lower() in IMAGES)
        rows += [
            (str(file), {"image": file.relative_to(root).as_posix(), "label": label.name} | split) for file in images
        ]
        empty += [] if images else [label]
    if rows and empty:
        raise DataError(f"class folder {empty[0]} holds no image ({', '.join(sorted(IMAGES))}): fill it or remove it")
    return rows


def hub_rows(source: str, image: str | None) -> tuple[Path, Rows]:
    """The rows of every split of a dataset on the Hugging Face hub, or in a folder that `datasets` reads.

    Encoded images of the column `image` are written once, as they are and named by their hash, into the first path
    returned, beside the library's own cache.
    """
    import datasets

    folder = Path(source).expanduser()
    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "dataset_info.json", "state.json"))
    name, _, configuration = (str(folder), "", "") if folder.is_dir() else source.partition(":")
    try:
        loaded = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, configuration or None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"'{source}' is no manifest and no folder of CLASS/IMAGE, and `datasets` cannot load it: "
            f"{str(error).rstrip('.')}. Check the path; of a dataset on the hub the name, the configuration "
            "(NAME:CONFIGURATION) and the network"
        ) from None
    splits = loaded if isinstance(loaded, datasets.DatasetDict) else {str(loaded.split or "train"): loaded}
    root = Path(datasets.config.HF_DATASETS_CACHE) / "fedloom-images"

    def plain(feature: object, value: object) -> object:
        if isinstance(value, list):
            return [plain(getattr(feature, "feature", None), one) for one in value]
        if isinstance(feature, datasets.ClassLabel) and isinstance(value, int):
            return feature.int2str(value) if value >= 0 else None  # -1: a test set whose labels are withheld
        if isinstance(feature, datasets.Image) and isinstance(value, dict):
            return _keep(value["bytes"] or Path(value["path"]).read_bytes(), root)
        return value

    def rows() -> Rows:
        for split, data in splits.items():
            images = [column for column, feature in data.features.items() if isinstance(feature, datasets.Image)]
            data = data.remove_columns([column for column in images if column != image])
            for column in set(images) & {image}:
                data = data.cast_column(column, datasets.Image(decode=False))
            for number, row in enumerate(data):
                cells = {column: plain(data.features[column], value) for column, value in row.items()}
                yield f"'{source}', {split} row {number}", {"split": split} | cells

    return root, rows()


def _keep(image: bytes, root: Path) -> str:
    name = hashlib.sha256(image).hexdigest()
    try:
        if not (root / name).exists():
            root.mkdir(parents=True, exist_ok=True)
            unfinished = root / f"{name}.{os.getpid()}"
            unfinished.write_bytes(image)
            unfinished.replace(root / name)
    except OSError as error:
        raise DataError(f"the images cannot be kept in {root}: {error}. Set HF_HOME to a folder with room") from None
    return name


def suggestion(name: str, known: Iterable[str]) -> str:
    """What the user may have meant, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
