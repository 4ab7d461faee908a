"""What a study is: a question, what was measured, and what that says, in sentences computed from the numbers.

A study looks for how something works, on development seeds. It is no confirmatory result: those come from other seeds,
by a protocol written down before.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

from fedloom import __version__
from fedloom.errors import RecipeError
from fedloom.statistics import interval

DEVELOPMENT = range(100, 110)  # seeds on which choices are made; figures that are told come from others
EXACT = 1e-9  # differences below it are rounding
Cell: TypeAlias = str | int | float
Row: TypeAlias = Mapping[str, Cell]


@dataclass(frozen=True)
class Options:
    """How large a study is, and on what."""

    seeds: int = 3  # of the development seeds, or points of a random design
    recipe: str | None = None  # another one than the study's own
    changes: Mapping[str, Any] = field(default_factory=dict)  # of its keys

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise RecipeError(f"a study of {self.seeds} seeds was asked for; it needs one at least.")

    def drawn(self) -> tuple[int, ...]:
        """The seeds; raises RecipeError where there are not so many."""
        if self.seeds > len(DEVELOPMENT):
            raise RecipeError(
                f"{self.seeds} seeds were asked for, and studies are made on the development seeds, which are "
                f"{DEVELOPMENT[0]} to {DEVELOPMENT[-1]}."
            )
        return tuple(DEVELOPMENT[: self.seeds])


@dataclass(frozen=True)
class Part:
    """Rows of one kind, one for each seed: a table of the page and a panel of its picture."""

    title: str
    by: tuple[str, ...]  # columns that say what was done
    figures: tuple[str, ...]  # columns of what was measured, named with their units; the first one is drawn
    rows: tuple[Row, ...]
    x: str = ""  # the column of `by` that runs along the picture; none: a line of the picture for each case

    def values(self, figure: str, **where: Cell) -> dict[int, float]:
        """A figure by seed; of several rows of a seed, their mean."""
        found: dict[int, list[float]] = {}
        for row in self.rows:
            if figure in row and all(row[key] == value for key, value in where.items()):
                found.setdefault(int(row["seed"]), []).append(float(row[figure]))
        return {seed: sum(values) / len(values) for seed, values in found.items()}

    def mean(self, figure: str, **where: Cell) -> float:
        """The mean over seeds."""
        values = self.values(figure, **where)
        return sum(values.values()) / len(values)

    def cases(self) -> tuple[dict[str, Cell], ...]:
        """What was done, in the order of the rows."""
        keys = dict.fromkeys(tuple(row[column] for column in self.by) for row in self.rows)
        return tuple(dict(zip(self.by, key, strict=True)) for key in keys)

    def compared(self, figure: str, of: Mapping[str, Cell], minus: Mapping[str, Cell]) -> dict[str, Any]:
        """Mean and 95 % interval of the differences, paired by seed."""
        one, other = self.values(figure, **of), self.values(figure, **minus)
        return interval([value - other[seed] for seed, value in one.items() if seed in other])


@dataclass(frozen=True)
class Result:
    """What a study found; its JSON is all that its page and its picture are made from."""

    name: str
    question: str
    setting: str  # data, backbone, adapter, training, in words
    seeds: tuple[int, ...]
    parts: tuple[Part, ...]
    found: tuple[str, ...]  # sentences, each computed from the rows
    command: str = ""
    lineage: Mapping[str, str] = field(default_factory=lambda: {"fedloom": __version__})

    def json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def of(cls, text: str) -> "Result":
        """The inverse of `json`."""
        table = _tuples(json.loads(text))
        return cls(**{**table, "parts": tuple(Part(**_tuples(part)) for part in table["parts"])})


def _tuples(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}


def verdict(figure: str, of: str, minus: str, difference: Mapping[str, Any], each: str = "seeds") -> str:
    """What a paired difference says, and no more than that; `each` is what it was paired over."""
    mean, low, high, n = (difference[key] for key in ("mean", "low", "high", "n"))
    mean = 0.0 if abs(mean) < EXACT else mean
    if low is None:
        one = each.removesuffix("s")
        return f"{figure}, {of} against {minus}: {mean:+.3g} at one {one}, which says nothing of chance."
    told = f"{mean:+.3g} [{low:.3g}, {high:.3g}], {n} {each}"
    if high - low < EXACT:
        return f"{figure}, {of} against {minus}: {f'{mean:+.3g}' if mean else 'the same'} at each of {n} {each}."
    if low <= 0 <= high:
        return f"{figure}, {of} against {minus}: no difference beyond noise ({told})."
    return f"{figure}, {of} against {minus}: {'higher' if mean > 0 else 'lower'} ({told})."


def command(name: str, options: Options, own: int, settings: Sequence[str] = ()) -> str:
    """The command line that runs a study again; `own` is how many seeds it takes unasked."""
    words = ["fedloom", "study", name]
    words += ["--seeds", str(options.seeds)] if options.seeds != own else []
    words += ["--recipe", options.recipe] if options.recipe else []
    return " ".join([*words, *(f"--set {setting}" for setting in settings)])
