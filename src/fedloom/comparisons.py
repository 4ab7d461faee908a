"""Several methods on the same sites, splits and seeds, and what of their differences is more than chance.

A cell is one row at one seed: a run folder named by the hash of its recipe, so that none is run twice and a comparison
that was stopped goes on where it was, and keeps the rows and seeds that are not asked for again. `comparison.json` is
written anew after every cell, `comparison.html` at the end.

A row is judged against the one that trains the same adapter at each site alone, where that is there, else `local`.
"""

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fedloom import __version__
from fedloom.assembly import planned
from fedloom.cells import Cell, attempt, cell, each, folder_of
from fedloom.errors import RecipeError, RunError
from fedloom.events import Note, Watch
from fedloom.lineage import source
from fedloom.outcomes import Comparison, Target, summarised
from fedloom.recipe import Recipe
from fedloom.report.compared import ALONE, FILE, read, write_comparison
from fedloom.store import holds_anything, write
from fedloom.tuning import Grid, tuned

LATER = ("target", "tuning")  # of comparison.json, where there is one


class Place(NamedTuple):
    row: str
    seed: int

    def __str__(self) -> str:
        return f"{self.row}, seed {self.seed}"


def compare(
    recipe: Recipe,
    rows: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    resume: bool,
    watch: Watch,
    workers: int = 1,
    target: Target = None,
    grid: Grid | None = None,
    counted: bool = False,
    protocol: str | None = None,
) -> Comparison:
    """Run every row at every seed that is not there yet.

    workers: cells that run side by side, in processes of their own
    grid: tune every row by it first, on development seeds and held-out examples
    counted: count FLOPs and trained parameters too, on a few steps of each row
    protocol: the hash of the one that the cells are run under

    raises RecipeError: there is no such row; RunError: the folder holds another comparison, or one without `resume`
    """
    for row in rows:
        _planned(recipe, row, seeds[0])
    before = _before(folder, recipe, resume, grid)
    target = before.target if target is None else target
    every = list(dict.fromkeys([*(row for row in before.rows if row in recipe.rows), *rows]))
    if isinstance(target, str) and target not in every:
        raise RecipeError(f"the target '{target}' is neither a number nor one of the rows {every}.")
    tuning = None if grid is None else tuned(recipe, rows, grid, folder / "tuning", workers, watch)
    if tuning is not None and before.tuning is not None:
        tuning = {**tuning, "rows": {**before.tuning["rows"], **tuning["rows"]}}
    chosen = {} if tuning is None else tuning["rows"]
    all_seeds = sorted({*before.seeds, *seeds})
    cells = {(at := Place(row, seed)): _planned(recipe, *at, chosen.get(row)) for seed in all_seeds for row in every}
    found, jobs = _stock(cells, {Place(row, seed) for row in rows for seed in seeds}, before, folder / "cells", watch)
    stock = {Place(row, seed): own for row, its in found.items() for seed, own in its.items()}
    other = [str(at) for at, own in stock.items() if isinstance(own, Cell) and own.source not in (None, source())]
    if other:
        about = f"finished cells of another source of fedloom: {len(other)}, the first is {other[0]}"
        watch(Note(f"{about}; they are not run again: name another folder (--out) for that"))
    for row in before.rows:
        if row not in rows and not found.get(row):
            watch(Note(f"{row}: nothing that was run of it is of {recipe.file} as it is now; it is left out"))
            found.pop(row, None)
    known = _known({row: own for (row, _), own in reversed(cells.items()) if isinstance(own, Recipe)})
    costs = {row: own["costs"] for row, own in before.rows.items() if "costs" in own}
    under = dict.fromkeys([*before.protocols, *([protocol] if jobs and protocol else ())])

    def so_far() -> Comparison:
        said = {row: {**known.get(row, {}), **({"costs": costs[row]} if row in costs else {})} for row in found}
        return replace(summarised(found, all_seeds, target, tuning, said), protocols=tuple(under))

    for place, made in each(jobs, cell, folder / "cells", workers, watch):
        found[place.row][place.seed] = made
        _save(folder, recipe, so_far())
    if counted:
        costs |= {row: _costs(own, watch) for row in rows if isinstance(own := cells[Place(row, seeds[0])], Recipe)}
    comparison = so_far()
    _save(folder, recipe, comparison)
    write_comparison(folder)
    return comparison


def _stock(
    cells: Mapping[Place, Recipe | str], asked: Set[Place], before: Comparison, folder: Path, watch: Watch
) -> tuple[dict[str, dict[int, Cell | str]], dict[Place, Recipe]]:
    """By row and seed what is finished, or why it is not there; and those of the asked ones that are to be run."""
    found: dict[str, dict[int, Cell | str]] = {row: {} for row, _ in cells}
    jobs = {}
    for place, own in cells.items():
        why = before.rows.get(place.row, {}).get("missing", {}).get(str(place.seed))
        if isinstance(own, Recipe) and (done := folder_of(own, folder) / "summary.json").is_file():
            found[place.row][place.seed] = attempt(cell, own, done.parent, watch)
        elif place not in asked:
            found[place.row] |= {} if why is None else {place.seed: why}
        elif isinstance(own, Recipe):
            jobs[place] = own
        else:
            watch(Note(f"{place}: {own}"))
            found[place.row][place.seed] = own
    return found, jobs


def _costs(recipe: Recipe, watch: Watch) -> Mapping[str, Any]:
    """FLOPs of the whole training of all sites, and trained parameters of a site (the one with most), or why they
    cannot be counted."""

    def count(recipe: Recipe, folder: Path, watch: Watch) -> dict[str, int]:
        from fedloom.estimate import estimate

        counted = estimate(recipe)
        return {"flops": counted.flops_training, "trained": counted.trained[1]}

    found = attempt(count, recipe, Path(), watch)
    if isinstance(found, str):  # its figures may well be there: pooled training has no rounds that a step is counted of
        return {"uncounted": found.replace("cannot run", "cannot be counted", 1)}
    return found


def target_of(text: str | None) -> Target:
    """`0.6` as a value, anything else as the name of a row.

    raises RecipeError: a number that is no fraction
    """
    try:
        value = None if text is None else float(text)
    except ValueError:
        return text
    if value is not None and not 0 < value <= 1:
        raise RecipeError(f"the target is {text}; expected a fraction, 0.6 for 60 %, or a row.")
    return value


def _planned(recipe: Recipe, row: str, seed: int, tuning: Mapping[str, Any] | None = None) -> Recipe | str:
    """The recipe of a cell, or why there is none."""
    choice = {} if tuning is None else tuning["choice"]
    if choice is None and tuning is not None:
        return tuning["tried"][-1]["failed"]  # type: ignore[no-any-return]
    try:
        return planned(recipe.row(row).altered({**choice, "federation.seed": seed, "reference.rows": ()}))
    except RecipeError as e:
        if row not in recipe.rows:
            raise
        return f"cannot run: {e}"


def _known(recipes: Mapping[str, Recipe]) -> dict[str, dict[str, Any]]:
    """By row: its adapter, and the row that it is judged against: that trains the same one `alone`, else local-only."""
    adapters = {row: _adapter(own) for row, own in recipes.items()}
    lone = sorted((row for row, own in recipes.items() if own.method_name == ALONE), key=lambda row: row != ALONE)
    local = ALONE if ALONE in recipes else None

    def judge(row: str) -> str | None:
        if row in lone:
            return local or row
        return next((one for one in lone if adapters[one] == adapters[row]), local)

    return {row: {"adapter": adapter, "alone": judge(row)} for row, adapter in adapters.items()}


def _adapter(recipe: Recipe) -> dict[str, Any] | None:
    """What a row trains, and in which towers where that is said; None for what trains no adapter."""
    adapter, towers = recipe.table()["method"].get("adapter"), recipe.backbone.towers
    return adapter if adapter is None or towers is None else {**adapter, "towers": list(towers)}


def _before(folder: Path, recipe: Recipe, resume: bool, grid: Grid | None) -> Comparison:
    """What the folder holds already, if this comparison may go on with it."""
    path = folder / FILE
    if folder.exists() and not folder.is_dir():
        raise RunError(f"'{folder}' is a file; name another folder (--out).")
    begun = path.is_file() or (folder / "cells").is_dir() or (folder / "tuning").is_dir()
    if begun and not resume:
        raise RunError(
            f"'{folder}' holds a comparison already; go on with it (--resume) or name another folder (--out)."
        )
    if not begun and holds_anything(folder):
        raise RunError(f"'{folder}' is not empty and is no comparison; name another folder (--out).")
    if not path.is_file():
        return Comparison({}, (), ())
    before = read(folder)
    if before["recipe"] != recipe.id:
        raise RunError(f"the comparison in '{folder}' is of another recipe; name another folder (--out).")
    if before.get("tuning", {}).get("grid") != (None if grid is None else dict(grid)):
        raise RunError(f"the comparison in '{folder}' was tuned otherwise (--tune); name another folder (--out).")
    rows, differences, seeds = (before[key] for key in ("rows", "differences", "seeds"))
    target, tuning = map(before.get, LATER)
    return Comparison(rows, differences, seeds, target, tuning, before.get("protocols", ()))


def _save(folder: Path, recipe: Recipe, comparison: Comparison) -> None:
    content = {
        "fedloom": __version__,
        "recipe": recipe.id,
        "seeds": list(comparison.seeds),
        "rows": comparison.rows,
        "differences": comparison.differences,
        **{key: said for key in LATER if (said := getattr(comparison, key)) is not None},
        **({"protocols": list(comparison.protocols)} if comparison.protocols else {}),
    }
    write(folder / FILE, (json.dumps(content, indent=2) + "\n").encode())
