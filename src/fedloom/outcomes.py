"""What the cells of a comparison come to: each row by itself, and the paired difference of every two."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from fedloom.cells import Cell
from fedloom.report.compared import ALONE
from fedloom.statistics import interval, sign_flip

Target = float | str | None  # a held-out metric to reach: a value, or what this row ends with at the same seed


@dataclass(frozen=True)
class Comparison:
    """What comparison.json holds."""

    rows: Mapping[str, Mapping[str, Any]]  # by row: cells by seed, summaries, and why a cell or the row is not there
    differences: Sequence[Mapping[str, Any]]  # paired over seeds, of every two rows
    seeds: Sequence[int]
    target: Target = None
    tuning: Mapping[str, Any] | None = None  # what was tried for each row, and taken
    protocols: Sequence[str] = ()  # SHA-256 of what was asked beforehand: of each that cells were run under


def summarised(
    found: Mapping[str, Mapping[int, Cell | str]],
    seeds: Sequence[int],
    target: Target = None,
    tuning: Mapping[str, Any] | None = None,
    known: Mapping[str, Mapping[str, Any]] | None = None,
) -> Comparison:
    """Rows and differences of the cells there are: a cell by seed, or the sentence that says why there is none.

    known: what is said of a row besides its cells; `alone` is the row that it is judged against, else local-only
    """
    good = {row: {n: own for n, own in sorted(cells.items()) if isinstance(own, Cell)} for row, cells in found.items()}
    rows = {}
    for row, cells in good.items():
        names = dict.fromkeys(name for own in cells.values() for name in own.figures)
        series = {name: [own.figures[name] for own in cells.values() if name in own.figures] for name in names}
        said = (known or {}).get(row, {})
        alone = said.get("alone") or ALONE
        rows[row] = {
            **said,
            "cells": {str(seed): own.figures for seed, own in cells.items()},
            "summary": {name: interval(values) for name, values in series.items()},
            "seconds": interval([own.seconds for own in cells.values()]) if cells else None,
            "missing": {str(seed): own for seed, own in found[row].items() if isinstance(own, str)},
            "sites": _sites(cells, good.get(alone, {}) if row != alone else {}),
            "held_out": _curves(cells),
            "reached": dict(_reached(cells, target if not isinstance(target, str) else good.get(target, {}))),
        }
    return Comparison(rows, differences(rows), list(seeds), target, tuning)


def differences(rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of every two rows and each figure that both have, the mean difference over the seeds that both have."""
    found = []
    for one, other in combinations(rows, 2):
        of, minus = rows[one]["cells"], rows[other]["cells"]
        for name in dict.fromkeys(name for own in of.values() for name in own):
            both = [seed for seed, own in of.items() if name in own and name in minus.get(seed, {})]
            if paired := [of[seed][name] - minus[seed][name] for seed in both]:
                told = {**interval(paired), "p": sign_flip(paired)}
                found.append({"of": one, "minus": other, "figure": name, **told})
    return found


def _sites(cells: Mapping[int, Cell], alone: Mapping[int, Cell]) -> dict[str, Any]:
    """By view and site: mean and interval over seeds, and the same of the gain over training alone, where that is."""

    def values(view: str, site: str) -> dict[int, float]:
        return {seed: own.sites[view][site] for seed, own in cells.items() if site in own.sites.get(view, {})}

    def gains(view: str, site: str) -> list[float]:
        others = {seed: own.sites.get(view, {}).get(site) for seed, own in alone.items()}
        paired = ((value, others.get(seed)) for seed, value in values(view, site).items())
        return [value - other for value, other in paired if other is not None]

    views: dict[str, dict[str, None]] = {}
    for own in cells.values():
        for view, sites in own.sites.items():
            views.setdefault(view, {}).update(dict.fromkeys(sites))
    return {
        view: {
            site: {
                **interval(list(values(view, site).values())),
                "gain": interval(paired) if (paired := gains(view, site)) else None,
            }
            for site in sites
        }
        for view, sites in views.items()
    }


def _curves(cells: Mapping[int, Cell]) -> dict[str, list[dict[str, float]]]:
    """By task: the held-out metric after each round, and the bytes so far, both the mean over seeds."""
    points: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for own in cells.values():
        for line in own.rounds:
            for task, value in line["held_out"].items():
                points.setdefault(task, {}).setdefault(line["round"], []).append((line["bytes"], value))
    return {
        task: [
            {"round": round, "bytes": sum(b for b, _ in own) / len(own), "mean": sum(v for _, v in own) / len(own)}
            for round, own in sorted(rounds.items())
        ]
        for task, rounds in points.items()
    }


def _reached(cells: Mapping[int, Cell], target: float | Mapping[int, Cell] | None) -> Iterator[tuple[str, Any]]:
    """By task: the mean of the first rounds whose held-out metric is no less than the target, and of how many seeds."""
    firsts: dict[str, list[int | None]] = {}
    for seed, own in cells.items():
        if target is None or not own.rounds or (not isinstance(target, float) and seed not in target):
            continue
        for task in own.rounds[-1]["held_out"]:
            aim = target if isinstance(target, float) else _last(target[seed], task)
            if aim is not None:
                reached = (line["round"] for line in own.rounds if line["held_out"].get(task, -1.0) >= aim)
                firsts.setdefault(task, []).append(next(reached, None))
    for task, rounds in firsts.items():
        have = [round for round in rounds if round is not None]
        yield task, {"mean": sum(have) / len(have) if have else None, "reached": len(have), "n": len(rounds)}


def _last(own: Cell, task: str) -> float | None:
    held_out: float | None = own.rounds[-1]["held_out"].get(task) if own.rounds else None
    return held_out
