"""A summary as what is shown of it: rows that hold a number beside the same number of each reference."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedloom.report.figures import loses, one_line

NAMES = {"local": "local-only"}  # of references, where they are shown
STATISTICS = {
    "mean": "mean",
    "weighted_mean": "weighted mean",
    "std": "std",
    "worst": "worst",
    "worst_fifth": "worst fifth",
}
OWN_LABELS = "own_labels"  # the mean of the global view where each site is asked only about labels that it knows
MEANS = {"mean": "mean", OWN_LABELS: "mean, own labels"}
Summary = Mapping[str, Any]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Row:
    """A number of the method, and the same of what it is compared with; None where there is none."""

    label: str
    value: float | None
    beside: Mapping[str, float | None]
    metric: str = ""
    examples: int | None = None
    worst: bool = False  # no other site of this metric has less
    interval: Interval | None = None  # of the value, over the test examples
    gains: Mapping[str, Interval | None] = field(default_factory=dict)  # of what it is better by than each reference

    def gain(self, reference: str) -> float | None:
        other = self.beside.get(reference)
        return None if self.value is None or other is None else self.value - other

    @property
    def better_alone(self) -> bool:
        """Whether this site loses by federating: local-only does better."""
        return loses(self.gain("local"))

    @property
    def numbers(self) -> list[float]:
        return [x for x in (self.value, *self.beside.values(), *(self.interval or ())) if x is not None]


def method(summary: Summary) -> str:
    """The method's name without the module of one's own."""
    return one_line(str(summary["method"])).rpartition(":")[2]


def references(summary: Summary) -> list[str]:
    """frozen, local, ..., as far as the run has them."""
    return list(summary.get("references") or {})


def rivals(summary: Summary) -> list[str]:
    """The references that gains are told against: neither the floor, nor what no federation may do."""
    return [name for name in references(summary) if name not in ("majority", "pooled")]


def sites(summary: Summary, view: str = "personal") -> list[Row]:
    """A row a site of a view, in roster order; none where the view was left out."""
    own, others = _view(summary, view)
    rows = [
        Row(
            label=one_line(name),
            value=_number(row.get("value")),
            beside={
                reference: _number(at(other, "sites", name, "value"))
                if at(other, "sites", name, "metric") == row.get("metric")
                else None
                for reference, other in others.items()
            },
            metric=one_line(str(row.get("metric"))),
            examples=row.get("examples"),
            interval=_interval(row),
            gains={reference: _interval(at(other, "sites", name, "gain")) for reference, other in others.items()},
        )
        for name, row in (own.get("sites") or {}).items()
    ]
    return _with_worst(rows)


def statistics(summary: Summary, view: str = "personal") -> dict[str, list[Row]]:
    """By task: the mean over the sites, and how they differ."""
    own, others = _view(summary, view)
    return {
        task: [
            Row(name, _number(values.get(key)), {r: _number(at(o, "by_task", task, key)) for r, o in others.items()})
            for key, name in {**STATISTICS, **MEANS}.items()
            if key in values
        ]
        for task, values in (own.get("by_task") or {}).items()
    }


def means(summary: Summary, view: str) -> dict[str, list[Row]]:
    """By task: the mean over the sites, and where some do not know all labels, that of those which they know."""
    return {
        task: [row for row in rows if row.label in MEANS.values()] for task, rows in statistics(summary, view).items()
    }


def why_left_out(summary: Summary, view: str) -> str | None:
    """Why a view is not there; None where it is."""
    if at(summary, "views", view, "sites"):
        return None
    return one_line((summary.get("left_out") or {}).get(view) or "no site has an example of it.")


def silences(summary: Summary) -> dict[str, dict[int, str]]:
    """The reason, by site and round, of every answer that did not come."""
    found: dict[str, dict[int, str]] = {}
    for line in summary.get("roster") or ():
        for name, reason in line["silent"].items():
            found.setdefault(one_line(name), {})[line["round"]] = one_line(str(reason))
    return found


def roster(summary: Summary) -> dict[str, dict[int, bool]]:
    """By site and round: whether it answered. A round that did not ask it is not there."""
    found: dict[str, dict[int, bool]] = {}
    for line in summary.get("roster") or ():
        for name, answered in [*((n, True) for n in line["answered"]), *((n, False) for n in line["silent"])]:
            found.setdefault(one_line(name), {})[line["round"]] = answered
    ordered = dict.fromkeys([*(row.label for row in sites(summary)), *found])
    return {name: found[name] for name in ordered if name in found}


def held_out_means(line: Mapping[str, Any]) -> dict[str, float]:
    """By task: the mean of the metric on held-out examples, over the sites that a line of rounds.jsonl has it of."""
    values: dict[str, list[float]] = {}
    for row in line["sites"].values():
        if row.get("metric") is not None:
            values.setdefault(row.get("task", ""), []).append(row["metric"])
    return {task: sum(own) / len(own) for task, own in values.items()}


def unmeasured(summary: Summary) -> list[str]:
    """Sites that took part and have no number of their own."""
    have = {row.label for row in sites(summary) if row.value is not None}
    named = [*roster(summary), *(row.label for row in sites(summary))]
    return [name for name in dict.fromkeys(named) if name not in have]


def at(table: Any, *keys: str) -> Any:
    """What stands in nested tables under these keys; None where one of them is missing."""
    for key in keys:
        table = table.get(key) if isinstance(table, Mapping) else None
    return table


def _view(summary: Summary, view: str) -> tuple[Mapping[str, Any], dict[str, Mapping[str, Any]]]:
    others = {name: at(table, view) or {} for name, table in (summary.get("references") or {}).items()}
    return at(summary, "views", view) or {}, others


def _with_worst(rows: Sequence[Row]) -> list[Row]:
    values: dict[str, list[float]] = {}
    for row in rows:
        if row.value is not None:
            values.setdefault(row.metric, []).append(row.value)

    def worst(row: Row) -> bool:
        others = values.get(row.metric, [])
        return row.value is not None and row.value == min(others) < max(others)

    return [replace(row, worst=worst(row)) for row in rows]


def _interval(table: Any) -> Interval | None:
    low, high = _number(at(table, "low")), _number(at(table, "high"))
    return None if low is None or high is None else (low, high)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
