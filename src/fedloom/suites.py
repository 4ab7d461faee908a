"""The suite: settings on which methods are compared, as data (`benchmarks/suite.toml`).

A setting is a built-in recipe, what it changes in it, and the rows that stand beside each other there. Each becomes a
comparison of its own, whose cells are never run twice.
"""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedloom.comparisons import compare
from fedloom.errors import RecipeError
from fedloom.events import Note, Watch
from fedloom.outcomes import Comparison, Target
from fedloom.overrides import Overrides
from fedloom.recipe import Recipe, load
from fedloom.tables import Table, Where, build, convert, guess
from fedloom.tuning import Grid, points

FILE = Path("benchmarks") / "suite.toml"


@dataclass(frozen=True)
class Setting:
    """One question, and the recipe that asks it."""

    name: str
    asks: str
    recipe: Recipe
    rows: tuple[str, ...]
    tune: bool = False  # its question is asked of rows that are tuned: they are, also where nobody asks for it


@dataclass(frozen=True)
class _Said:
    """A table under [settings]; its views are for who reads it: the recipe decides which there are."""

    asks: str
    recipe: str
    rows: tuple[str, ...]
    views: tuple[str, ...] = ()
    tune: bool = False
    set: Table = field(default_factory=dict)


def settings(
    file: Path = FILE, names: Sequence[str] = (), backbones: Mapping[str, str] | None = None, overrides: Overrides = ()
) -> list[Setting]:
    """The settings of these names, or all; with other weights and no names, all whose backbone those replace.

    backbones: other weights for a backbone that the recipes name, or for a family's: {"vilt": "dandelin/vilt-b32-mlm"}
    overrides: of every setting's recipe, as `recipe.load` takes them
    raises RecipeError: the file is missing or damaged, or has no setting of a name
    """
    try:
        read = tomllib.loads(file.read_text("utf-8"))["settings"]
    except OSError as e:
        raise RecipeError(
            f"'{file}' cannot be read ({e.strerror}); run in a checkout of fedloom, or name it."
        ) from None
    except (ValueError, KeyError) as e:
        raise RecipeError(f"'{file}' is no suite: {e}.") from None
    said: Mapping[str, Table] = convert(Mapping[str, Table], read, "settings", Where(str(file)))
    for name in names:
        if name not in said:
            raise RecipeError(f"there is no setting '{name}' in {file}{guess(name, said)}")
    found = [_setting(name, build(_Said, said[name], Where(str(file), f"settings.{name}"))) for name in names or said]
    have = sorted({setting.recipe.backbone.name for setting in found})
    others = backbones or {}
    for name in others:
        if name not in have and name not in map(_family, have):
            raise RecipeError(f"no setting that was asked for has the backbone '{name}'; there is {', '.join(have)}.")
    return [
        _on(setting, others, overrides)
        for setting in found
        if names or not others or {setting.recipe.backbone.name, _family(setting.recipe.backbone.name)} & others.keys()
    ]


def run(
    chosen: Sequence[Setting],
    rows: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    watch: Watch,
    workers: int = 1,
    target: Target = None,
    grids: Mapping[str, Grid] | None = None,
    counted: bool = False,
    protocols: Mapping[str, str | None] | None = None,
) -> Iterator[tuple[Setting, Comparison]]:
    """Each setting's comparison as it ends; cells that are there are not run again.

    rows: only these of each setting's own; all where empty
    target: a value, or a row; nothing is counted in a setting that does not have it
    grids: by setting, what each row is tuned by first
    workers, counted: as of `compare`
    protocols: by setting, the hash of the one that its cells are run under

    raises RecipeError: before the first cell, what any of the settings cannot be asked
    """
    have = dict.fromkeys(row for setting in chosen for row in setting.rows)
    for row in rows:
        if row not in have:
            raise RecipeError(f"no setting that was asked for has the row '{row}'{guess(row, have)}")
    asked = {setting.name: [row for row in setting.rows if not rows or row in rows] for setting in chosen}
    if isinstance(target, str) and target not in have:
        raise RecipeError(f"the target '{target}' is neither a number nor a row{guess(target, have)}")
    for setting in chosen:
        if unknown := [row for row in asked[setting.name] if row not in setting.recipe.rows]:
            raise RecipeError(f"{setting.name} has no row '{unknown[0]}'{guess(unknown[0], setting.recipe.rows)}")
        if asked[setting.name] and setting.name in (grids or {}):
            points(setting.recipe, asked[setting.name], (grids or {})[setting.name])
    for setting in chosen:
        if own := asked[setting.name]:
            watch(Note(f"{setting.name}: {setting.asks}"))
            aim = None if isinstance(target, str) and target not in setting.rows else target
            grid, protocol = (grids or {}).get(setting.name), (protocols or {}).get(setting.name)
            how = (True, watch, workers, aim, grid, counted, protocol)
            yield setting, compare(setting.recipe, own, seeds, folder / setting.name, *how)


def seeds_of(text: str) -> list[int]:
    """`0-4` or `0,3,7` as numbers; raises RecipeError for anything else."""
    first, dash, last = text.partition("-")
    try:
        seeds = list(range(int(first), int(last) + 1)) if dash else [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds:
        raise RecipeError(f"the seeds '{text}' are none; expected 0-4, or 0,3,7.")
    return seeds


def _setting(name: str, said: _Said) -> Setting:
    return Setting(name, said.asks, load(said.recipe, said.set), said.rows, said.tune)


def _family(backbone: str) -> str:
    """`vilt` of the built-in `vilt-small`."""
    return backbone.removesuffix("-small")


def _on(setting: Setting, others: Mapping[str, str], overrides: Overrides) -> Setting:
    own = setting.recipe.backbone.name
    backbone = others.get(own, others.get(_family(own)))
    recipe = setting.recipe if backbone is None else setting.recipe.altered({"backbone.name": backbone})
    return replace(setting, recipe=recipe.altered(overrides) if overrides else recipe)
