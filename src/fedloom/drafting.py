"""A first recipe for data of one's own: what a folder or a manifest seems to hold, and why it seems so.

A guess goes by the names of columns and by what stands in them; whoever asks may say otherwise. Nothing is opened but
the table itself: images are looked at by `fedloom check`.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from fedloom import partition
from fedloom.backbones import locate
from fedloom.data import Columns, Example, read, rows_of
from fedloom.errors import DataError, RecipeError
from fedloom.labels import several
from fedloom.report.figures import one_line
from fedloom.sources import IMAGES, SPLITS, suggestion
from fedloom.tables import NONE

SEEN = 2000  # rows that a guess looks at
SMALL = 8  # units below which a site is too small to be split into three
SITES = 10  # that are made where the data name none
ALPHA = 0.5
NAMES: Mapping[str, tuple[str, ...]] = {  # of columns, the likeliest first
    "image": ("image", "img", "image_path", "path", "file", "filename", "file_name", "filepath"),
    "text": ("text", "question", "report", "findings", "caption", "sentence", "description", "prompt"),
    "label": (
        "label",
        "labels",
        "answer",
        "answers",
        "class",
        "category",
        "diagnosis",
        "diagnoses",
        "target",
        "finding",
    ),
    "site": ("site", "hospital", "center", "centre", "institution", "clinic", "client", "device", "organisation"),
    "group": ("group", "patient", "patient_id", "subject", "subject_id", "study", "study_id", "case", "case_id"),
    "split": ("split", "fold", "subset", "partition"),
}
HINTS = {
    "clip-small": "comes with fedloom; for real use 'openai/clip-vit-base-patch32', or a folder",
    "vilt-small": "comes with fedloom; for real use 'dandelin/vilt-b32-mlm', or a folder",
    "text-small": "comes with fedloom; for real use a Hugging Face BERT or RoBERTa, or a folder",
}
TASKS = ("classification", "detection", "vqa")
Wanted = Mapping[str, str | int | None]  # what the user said: columns, task, backbone, method, sites


@dataclass(frozen=True)
class Said:
    """One guess, and why; `key` is what would change it."""

    key: str
    value: str
    why: str


@dataclass(frozen=True)
class Draft:
    """A recipe that was not written yet."""

    source: str
    columns: Columns
    task: Literal["classification", "detection", "vqa"]
    head: Literal["prompts", "linear"] | None
    backbone: str
    method: str
    partition: Mapping[str, Any]
    split: bool  # whether a column says which rows are the test
    guesses: tuple[Said, ...]

    def text(self, folder: Path) -> str:
        """The recipe as TOML with comments, for a file in this folder."""
        why = {guess.key: guess.why for guess in self.guesses}
        defaults = Columns()
        columns = {
            role.name: NONE if value is None else value
            for role in fields(Columns)
            if (value := getattr(self.columns, role.name)) != getattr(defaults, role.name)
        }
        lines = [
            "# Written by fedloom init, from what the data look like: read it, and change what is wrong.",
            "#",
            "#     fedloom check THIS_FILE            its sites, sizes and images",
            "#     fedloom run THIS_FILE --dry-run    what it would cost",
            "#     fedloom run THIS_FILE",
            "",
            "[data]",
            f"source = {_quoted(_placed(self.source, folder))}",
            *([f"columns = {_inline(columns)}"] if columns else []),
            _line('test = "column"', "the split column says which")
            if self.split
            else _line("test = 0.25", "of each site; no choice is made on it"),
            _line("held_out = 0.15", "of each site, for choices and for the curves"),
            "",
            _line("[data.partition]", why["sites"]),
            *(f"{key} = {_quoted(value)}" for key, value in self.partition.items()),
            "",
            "[backbone]",
            _line(f"name = {_quoted(self.backbone)}", HINTS.get(self.backbone, "a folder, or a name on the hub")),
            _line("cache = true", "what lies below the first adapter is computed once"),
            "",
            "[task]",
            _line(f'kind = "{self.task}"', why["task"]),
            *([f'head = "{self.head}"'] if self.head else []),
            "",
            "[method]",
            _line(f"name = {_quoted(self.method)}", "fedloom compare puts several beside each other"),
            "",
            "[method.adapter]",
            _line('kind = "lora"', "what is trained; the backbone stays frozen"),
            "rank = 8",
            "",
            "[training]",
            _line("lr = 3e-3", "a start: fedloom compare --tune chooses on held-out examples"),
            _line("epochs = 1", "at each site, each round"),
            "batch = 16",
            *([] if self.head == "prompts" else [_line("warmup_head = 5", "epochs for a site's own head, before all")]),
            "",
            "[federation]",
            "rounds = 10",
            "seed = 0",
        ]
        return "\n".join(lines) + "\n"


def draft(source: str, wanted: Wanted) -> Draft:
    """What the data seem to be. wanted: what the user said, by the keys of `Said`; it is not guessed then.

    raises DataError: the source cannot be read, or holds no label; RecipeError: what was wanted is not there
    """
    _, rows = rows_of(source)
    seen = [row for _, row in islice(rows, SEEN)]
    if not seen:
        raise DataError(f"'{source}' is empty: expected at least one example.")
    columns, guesses = _columns(source, seen, wanted)
    examples = read(source, columns).examples
    columns, guesses = _told(columns, examples, wanted, guesses)
    examples = read(source, columns).examples
    task, head, backbone, more = _task(columns, examples, wanted)
    kinds, sites = _partition(columns, examples, wanted)
    split = columns.split is not None and _has_test(examples)
    guesses = [*guesses, *more, sites, Said("method", str(wanted.get("method") or "fedavg"), "the simplest first")]
    return Draft(source, columns, task, head, backbone, guesses[-1].value, kinds, split, tuple(guesses))


def _columns(source: str, rows: list[Mapping[str, object]], wanted: Wanted) -> tuple[Columns, list[Said]]:
    present = list(dict.fromkeys(name for row in rows for name in row))
    lower = {name.lower(): name for name in reversed(present)}
    found: dict[str, str | None] = {}
    guesses = []
    for role in ("label", "image", "text", "site", "group", "split"):
        asked = wanted.get(role)
        if asked is not None:
            name: str | None = None if asked == NONE else str(asked)
            if name is not None and name not in present:
                raise RecipeError(
                    f"'{source}' has no column '{name}' for the {role}{suggestion(name, present)}; "
                    f"its columns are {', '.join(present)}."
                )
            why = "as you said"
        else:
            free = {known: own for known, own in lower.items() if own not in found.values()}
            name = next((free[known] for known in NAMES[role] if known in free and _is_full(rows, free[known])), None)
            why = "by its name"
            if name is None and role == "image":
                name = next((own for own in free.values() if _are_images(rows, own)), None)
                why = "its cells end like images"
            if name is None and role == "label":
                known = {one for names in NAMES.values() for one in names}  # and so something else
                unknown = [own for own in present if own.lower() not in known and not _are_images(rows, own)]
                name = _that_repeats(rows, unknown)
                why = "its values recur"
        if name is None and role == "label":
            raise RecipeError(
                f"no column of '{source}' looks like a label; its columns are {', '.join(present)}. "
                "Name one with --label."
            )
        found[role] = name
        if name is not None:
            guesses.append(Said(role, name, why))
    defaults = {key.name: None if wanted.get(key.name) == NONE else key.default for key in fields(Columns)}
    return Columns(**{role: defaults[role] if name is None else name for role, name in found.items()}), guesses  # type: ignore[arg-type]


def _told(
    columns: Columns, examples: tuple[Example, ...], wanted: Wanted, guesses: list[Said]
) -> tuple[Columns, list[Said]]:
    """Without a text that says the label, which would be no task."""
    told = [example for example in examples if example.text is not None and example.image is not None]
    alike = sum(str(example.text).lower() in [label.lower() for label in several(example.label)] for example in told)
    if wanted.get("text") is not None or not told or alike < len(told) / 2:
        return columns, guesses
    kept = [guess for guess in guesses if guess.key != "text"]
    return replace(columns, text=None), [*kept, Said("text", NONE, f"'{columns.text}' says the label")]


def _task(columns: Columns, examples: tuple[Example, ...], wanted: Wanted) -> tuple[Any, Any, str, list[Said]]:
    images, texts = (any(getattr(row, part) for row in examples) for part in ("image", "text"))
    labels = Counter(label for row in examples for label in several(row.label))
    count = f"{len(labels)} labels, from {_some(labels)}"
    questions = sum((row.text or "").rstrip().endswith("?") for row in examples)
    if wanted.get("task"):
        task, why = str(wanted["task"]), "as you said"
        if task not in TASKS:
            raise RecipeError(f"there is no task '{task}'{suggestion(task, TASKS)}; init knows {', '.join(TASKS)}.")
    elif not isinstance(examples[0].label, str):
        task, why = "detection", "a list of labels an example"
    elif images and (columns.text == "question" or questions > len(examples) / 2):
        task, why = "vqa", "an image and a question"
    else:
        task, why = "classification", "one label an example"
    if len(labels) < 2:
        raise DataError(
            f"the column '{columns.label}' holds {len(labels)} label; a task needs two, name another with --label."
        )
    if wanted.get("backbone"):
        locate(str(wanted["backbone"]))  # which knows what is no backbone
    backbone = str(
        wanted.get("backbone") or ("vilt-small" if images and texts else "clip-small" if images else "text-small")
    )
    reads = "images and texts" if images and texts else "images" if images else "texts"
    words = all(any(c.isalpha() for c in label) for label in labels)
    prompts = task == "classification" and images and not texts and words and "clip" in backbone.lower()
    head = "prompts" if prompts else "linear" if task != "detection" else None
    return (
        *(task, head, backbone),
        [
            Said("task", task, f"{why}; {count}"),
            Said("backbone", backbone, "as you said" if wanted.get("backbone") else f"the data are {reads}"),
        ],
    )


def _partition(columns: Columns, examples: tuple[Example, ...], wanted: Wanted) -> tuple[dict[str, Any], Said]:
    """By the site column where there is one, else as many unlike sites as the data can fill."""
    named = {row.site for row in examples}
    if wanted.get("sites") is None and None not in named and len(named) > 1:
        sizes = {site: len(partition.units(rows)) for site, rows in partition.natural(examples).items()}
        least, most = min(sizes.values()), max(sizes.values())
        each = f"{least}" if least == most else f"{least} to {most}"
        what = f"values of '{columns.group}'" if columns.group else "images or texts"
        said = f"{len(sizes)} sites in '{columns.site}', with {each} {what} each"
        if least >= SMALL:
            return {"kind": "natural"}, Said("sites", "natural", said)
        small = sum(size < SMALL for size in sizes.values())
        why = f"{said}; {small} below {SMALL} become one, 'other'"
        return {"kind": "natural", "merge_below": SMALL}, Said("sites", "natural", why)
    units, asked = len(partition.units(examples)), wanted.get("sites")
    most = int(asked or min(SITES, units // SMALL))
    for sites in range(most, most - 1 if asked else 0, -1):
        try:
            partition.dirichlet(examples, sites, ALPHA, 0, SMALL)
        except DataError:
            continue
        why = "as you said" if asked else "no column names a site, so unlike ones are made"
        made = {"kind": "dirichlet", "sites": sites, "alpha": ALPHA, "minimum": SMALL}
        return made, Said("sites", f"{sites}, made", why)
    raise DataError(f"{units} units (images, or groups) are too few for {max(most, 1)} sites of {SMALL}; name fewer.")


def _is_full(rows: list[Mapping[str, object]], name: str) -> bool:
    return all(row.get(name) not in (None, "") for row in rows)


def _are_images(rows: list[Mapping[str, object]], name: str) -> bool:
    cells = [str(row[name]) for row in rows if row.get(name)]
    return bool(cells) and all(Path(cell).suffix.lower() in IMAGES for cell in cells[:50])


def _that_repeats(rows: list[Mapping[str, object]], names: list[str]) -> str | None:
    """The one column whose values recur; None where there are several, or none."""
    recurring = [name for name in names if 1 < len({str(row.get(name)) for row in rows}) <= len(rows) / 4]
    return recurring[0] if len(recurring) == 1 else None


def _has_test(examples: tuple[Example, ...]) -> bool:
    said = [SPLITS.get((row.split or "").lower()) for row in examples]
    return "test" in said and "train" in said and None not in said


def _some(labels: Counter[str]) -> str:
    (most, n), (least, m) = labels.most_common()[0], labels.most_common()[-1]
    return f"'{most[:24]}' ({n}) to '{least[:24]}' ({m})"


def _placed(source: str, folder: Path) -> str:
    """A path as seen from the recipe's folder, where it lies in it; else the whole path, or the pack."""
    if source.startswith("pack:"):
        return source
    path = Path(source).expanduser().resolve()
    return f"./{path.relative_to(folder.resolve())}" if path.is_relative_to(folder.resolve()) else os.fspath(path)


def _inline(table: Mapping[str, str]) -> str:
    return "{ " + ", ".join(f"{key} = {_quoted(value)}" for key, value in table.items()) + " }"


def _quoted(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _line(code: str, why: str) -> str:
    """A line with its reason; what stands in the data cannot end a comment."""
    return f"{code:<26} # {one_line(why)}"
