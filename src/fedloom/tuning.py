"""A small grid for every row of a comparison, judged on development seeds and held-out examples alone.

A point is a row with other values at one seed; its federation is assembled without test splits, so that no choice can
have seen them. All rows get the same seeds and points, but for options that not all methods have: a key of [method] is
tried for the rows that have it, and [compare.tune.rows.NAME] adds keys for one row, or other values. How many points
each row got is recorded and told.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from fedloom.assembly import assemble, planned
from fedloom.cells import each
from fedloom.endpoints import Protocol
from fedloom.errors import RecipeError
from fedloom.events import Note, Watch
from fedloom.overrides import dotted, leaves
from fedloom.recipe import TUNE, Recipe
from fedloom.rounds import train
from fedloom.store import write
from fedloom.tables import guess
from fedloom.views import measured

SEEDS = (100, 101)  # of development: none of those that figures are told of
ROWS = "rows"  # of a grid: what single rows have beside what is tried for all
Grid: TypeAlias = Mapping[str, Any]  # the values to try, by a recipe's key; under ROWS such a grid by row


class Point(NamedTuple):
    row: str
    said: str  # the values
    seed: int

    def __str__(self) -> str:
        return f"tuning {self.row}, {self.said}, seed {self.seed}"


def grid_of(recipe: Recipe, protocol: Protocol | None) -> Grid:
    """What the recipe's [compare.tune] asks to try, else the [grid] of a protocol, whose bare keys are of [training].

    raises RecipeError: there is none, a value is no list, or a row is unknown
    """
    if TUNE in recipe.compare:
        table, file = recipe.compare[TUNE], f"[compare.tune] of {recipe.file}"
    elif protocol is not None:
        # What is no list was fixed beforehand, and stays as each recipe has it.
        table = {key: value for key, value in protocol.grid.items() if isinstance(value, list | Mapping)}
        file = f"[grid] of {protocol.file}"
    else:
        table, file = {}, f"{recipe.file} (it has no [compare.tune], and there is no protocol)"
    if not isinstance(table.get(ROWS, {}), Mapping):
        raise RecipeError(
            f"{ROWS} in {file} is {table[ROWS]!r}; expected tables by row: rows.fedprox.method.mu = [0.1]."
        )
    grid: dict[str, Any] = _listed({key: value for key, value in table.items() if key != ROWS}, file)
    if single := table.get(ROWS):
        for row, own in single.items():
            if row not in recipe.rows:
                raise RecipeError(f"rows.{row} in {file} tunes a row that there is not{guess(row, recipe.rows)}")
            if not isinstance(own, Mapping):
                raise RecipeError(f"rows.{row} in {file} is {own!r}; expected keys with lists: method.mu = [0.1, 1.0].")
        grid[ROWS] = {row: _listed(own, f"rows.{row} of {file}") for row, own in single.items()}
    if not grid:
        raise RecipeError(f"there is nothing to tune in {file}; expected keys with lists: training.lr = [3e-4, 1e-3].")
    return grid


def _listed(table: Mapping[str, Any], file: str) -> dict[str, list[Any]]:
    grid = {dotted(names if len(names) > 1 else ("training", *names)): values for names, values in leaves(table)}
    for key, values in grid.items():
        if not isinstance(values, list | tuple) or not values:
            raise RecipeError(f"{key} in {file} is {values!r}; expected a list of values to try.")
    return {key: list(values) for key, values in grid.items()}


def points(recipe: Recipe, rows: Sequence[str], grid: Grid) -> dict[str, list[dict[str, Any]]]:
    """By row, the values that are tried for it; one point without any where no key is for it.

    raises RecipeError: no row has a key of [method]
    """
    common = {key: values for key, values in grid.items() if key != ROWS}
    has = {row: _taken(recipe, row, common) for row in rows}
    if gone := [key for key in common if not any(key in own for own in has.values())]:
        raise RecipeError(f"no method of the rows {list(rows)} has '{gone[0]}', which is to be tuned; leave it out.")
    grids = {
        row: {key: values for key, values in common.items() if key in own} | grid.get(ROWS, {}).get(row, {})
        for row, own in has.items()
    }
    return {
        row: [dict(zip(own, values, strict=True)) for values in product(*own.values())] for row, own in grids.items()
    }


def _taken(recipe: Recipe, row: str, keys: Iterable[str]) -> set[str]:
    """Those of the keys that a row has; none where the recipe refuses it, which is said where it would run."""
    try:
        method = recipe.row(row).method
    except RecipeError:
        if row not in recipe.rows:
            raise
        return set()
    return {key for key in keys if _takes(method, key)}


def _takes(method: Any, key: str) -> bool:
    """Whether a key is none of [method], or one that this method has."""
    section, *names = key.split(".")
    for name in names if section == "method" and names[0] not in ("name", "preset") else ():
        if not is_dataclass(method) or name not in {part.name for part in fields(method)}:
            return False
        method = getattr(method, name)
    return True


def tuned(recipe: Recipe, rows: Sequence[str], grid: Grid, folder: Path, workers: int, watch: Watch) -> dict[str, Any]:
    """For every row, each point's mean held-out metric over sites and seeds, and the best one; the first of equals.

    A point of which a seed failed is not chosen; the choice is None where all did.
    """
    tried = points(recipe, rows, grid)
    watch(Note(f"points to tune by: {', '.join(f'{row} {len(own)}' for row, own in tried.items())}"))
    jobs: dict[Point, Recipe] = {}
    found: dict[Point, float | str] = {}
    for row, (point, seed) in [(row, one) for row, own in tried.items() for one in product(own, SEEDS)]:
        place = Point(row, _said(point), seed)
        try:
            changes = {**point, "federation.seed": seed, "reference.rows": ()}
            jobs[place] = planned(recipe.row(row).altered(changes))
        except RecipeError as e:
            found[place] = f"cannot run: {e}"
    found |= dict(each(jobs, held_out, folder, workers, watch))
    return {
        "grid": dict(grid),
        "seeds": list(SEEDS),
        "rows": {
            row: _best([_tried(point, [found[Point(row, _said(point), seed)] for seed in SEEDS]) for point in own])
            for row, own in tried.items()
        },
    }


def held_out(recipe: Recipe, folder: Path, watch: Watch) -> float:
    """The mean over sites of the metric of what each serves in the end, on its held-out examples; kept in the folder.

    raises RecipeError: no site has held-out examples
    """
    path = folder / "held_out.json"
    if not path.is_file():
        federation = assemble(recipe, tested=False)
        shared, privates = train(recipe.method_name, recipe.method, federation, folder, watch)
        rows = [
            measured(recipe.method, own, shared, privates[name], own.site.held_out)
            for name, own in federation.participants.items()
        ]
        values = [row["value"] for row in rows if row]
        if not values:
            raise RecipeError(f"no site of {recipe.file} has held-out examples to tune on; raise [data] held_out.")
        write(path, json.dumps(sum(values) / len(values)).encode())
    value: float = json.loads(path.read_text())
    return value


def _tried(point: Mapping[str, Any], values: Sequence[float | str]) -> dict[str, Any]:
    good = [value for value in values if not isinstance(value, str)]
    if len(good) < len(values):
        return {"set": point, "failed": next(value for value in values if isinstance(value, str))}
    return {"set": point, "held_out": sum(good) / len(good), "by_seed": good}


def _best(tried: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    best = max((one for one in tried if "held_out" in one), key=lambda one: one["held_out"], default=None)
    return {"choice": None if best is None else best["set"], "points": len(tried), "tried": list(tried)}


def _said(point: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {json.dumps(value)}" for key, value in point.items()) or "as it is"
