"""What the probabilities of sites are worth: reliability diagrams, calibration errors, figures of every label."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedloom.report import charts
from fedloom.report.figures import one_line
from fedloom.report.result import Summary, at, references

SIDE = 260  # of a diagram, in pixels
LARGEST = 11.0  # the radius of the point of all probabilities
LABELWISE = ("sensitivity", "specificity", "auroc", "auprc")


@dataclass(frozen=True)
class Point:
    """A bin: how many probabilities, their mean, and how far they came true."""

    n: int
    said: float
    true: float
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Diagram:
    """Mean probability against what came of it, over all sites of a metric; the diagonal is what it should be."""

    x: charts.Scale
    y: charts.Scale
    points: tuple[Point, ...]
    size: int = SIDE


def diagrams(summary: Summary) -> dict[str, Diagram]:
    """By metric."""
    tens = tuple(i / 5 for i in range(6))
    x, y = charts.Scale(tens, 38, SIDE - 12), charts.Scale(tens, SIDE - 34, 12)
    pooled: dict[str, dict[int, list[float]]] = {}
    for site, details in (summary.get("details") or {}).items():
        bins = pooled.setdefault(_metric(summary, site), {})
        for n, said, true in details.get("reliability") or ():
            sums = bins.setdefault(min(int(said * 15), 14), [0.0, 0.0, 0.0])
            bins[min(int(said * 15), 14)] = [sums[0] + n, sums[1] + n * said, sums[2] + n * true]
    found = {}
    for metric, bins in pooled.items():
        total = sum(n for n, _, _ in bins.values())
        found[metric] = Diagram(
            x,
            y,
            tuple(
                Point(int(n), p / n, t / n, x(p / n), y(t / n), round(max(2.0, LARGEST * (n / total) ** 0.5), 2))
                for _, (n, p, t) in sorted(bins.items())
            ),
        )
    return {metric: diagram for metric, diagram in found.items() if diagram.points}


def errors(summary: Summary) -> dict[str, dict[str, float | None]]:
    """By site: the calibration error of each reference and, as "", of the method; empty where none was kept."""
    own = at(summary, "views", "personal", "sites") or {}
    found = {
        one_line(site): {
            **{name: at(summary, "references", name, "personal", "sites", site, "ece") for name in references(summary)},
            "": row.get("ece"),
        }
        for site, row in own.items()
    }
    return found if any(row[""] is not None for row in found.values()) else {}


def by_site(summary: Summary) -> dict[str, dict[str, Any]]:
    """Of every site that finds labels: each figure's mean over the labels of which it is defined, `labels`, how many
    there are, and `undefined`, those of which a figure is not there."""
    found = {}
    for site, details in (summary.get("details") or {}).items():
        if labels := details.get("labels"):
            lacking = [one_line(name) for name, own in labels.items() if any(key not in own for key in LABELWISE)]
            found[one_line(site)] = {**_means(labels.values()), "labels": len(labels), "undefined": lacking}
    return found


def by_label(summary: Summary) -> dict[str, dict[str, Any]]:
    """Of every label: the mean of each figure over the sites of which it is defined, `sites`, those that have an
    example with it, and `positives`, how many examples there are."""
    every: dict[str, list[Mapping[str, float]]] = {}
    for details in (summary.get("details") or {}).values():
        for name, own in (details.get("labels") or {}).items():
            every.setdefault(one_line(name), []).append(own)
    return {
        name: {
            **_means(rows),
            "sites": sum(row["positives"] > 0 for row in rows),
            "positives": int(sum(row["positives"] for row in rows)),
        }
        for name, rows in sorted(every.items())
    }


def _means(rows: Any) -> dict[str, float | None]:
    listed: Sequence[Mapping[str, float]] = list(rows)
    values = {key: [row[key] for row in listed if key in row] for key in LABELWISE}
    return {key: sum(own) / len(own) if own else None for key, own in values.items()}


def _metric(summary: Summary, site: str) -> str:
    return one_line(str(at(summary, "views", "personal", "sites", site, "metric") or ""))
