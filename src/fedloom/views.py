"""Three views of every run, because a single one can be gamed.

personal   each site's own test split, by what that site serves
global     the test splits of all sites together, every class counting alike: what a site can do with what it never saw
newcomer   a site that did not take part: its head fitted, then one epoch (`rounds.newcomers`)
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedloom.assembly import Federation
from fedloom.data import Dataset, Example
from fedloom.engines.local import Participant
from fedloom.federation import predict
from fedloom.labels import widen
from fedloom.methods import Method
from fedloom.tasks import Task
from fedloom.tensors import Private, Shared, padded
from fedloom.tested import Answered, targets_of, tested

Privates = Mapping[str, Private]
View = dict[str, Any]
Row = dict[str, Any]
Answers = Mapping[str, Answered]


def own_tests(federation: Federation, method: Method, shared: Shared, privates: Privates) -> Answers:
    """What each site serves on its own test split; without the sites that have none."""
    every = {
        name: tested(method, own, shared, privates[name], own.test) for name, own in federation.participants.items()
    }
    return {name: said for name, said in every.items() if said is not None}


def views(
    federation: Federation, method: Method, shared: Shared, privates: Privates, answered: Answers
) -> dict[str, View | None]:
    """The three views of a method's result; None for one that is left out (see `left_out`).

    privates: also of the newcomers
    answered: what `own_tests` makes of the same
    """
    tests = {group: pooled(federation, group) for group in federation.groups}

    def personal(name: str, own: Participant) -> Row:
        return answered[name].row() if name in answered else {}

    def everywhere(name: str, own: Participant) -> Row:
        return spread(method, own, shared, privates[name], tests[own.group], federation.groups[own.group])

    def newcomer(name: str, own: Participant) -> Row:
        return measured(method, own, shared, privates[name], own.test)

    return {
        "personal": _view(federation.participants, personal),
        "global": _view(federation.participants, everywhere),
        "newcomer": _view(federation.newcomers, newcomer),
    }


def left_out(federation: Federation) -> dict[str, str]:
    """Why a view is not there."""
    return {} if federation.newcomers else {"newcomer": "every site took part; hold some out with [data] newcomer."}


def measured(method: Method, own: Participant, shared: Shared, private: Private, dataset: Dataset) -> Row:
    """The task's own metric on a site's data set; nothing where it is undefined, as it is without an example."""
    said = tested(method, own, shared, private, dataset)
    return {} if said is None else said.row()


def spread(method: Method, own: Participant, shared: Shared, private: Private, pool: Dataset, union: Task) -> Row:
    """The metric on the pool of all sites' tests, every label counting alike, over the labels of all sites.

    Where the site knows only some of them, `own_labels` is the same on the examples whose label it knows.
    """
    if not len(pool):
        return {}
    logits = predict(method, own.site, private, shared, pool)
    wide, labels = logits, own.site.task.labels
    if labels != union.labels:
        wide = widen(logits, labels, union.labels)
    if (value := balanced(union, wide, pool)) is None:
        return {}
    row = {"value": value, "examples": len(pool)}
    if labels != union.labels:
        known = [i for i, example in enumerate(pool.examples) if set(_labels(example)) <= set(labels)]
        if (own_value := balanced(union, wide[known], pool[known])) is not None:
            row["own_labels"] = own_value
    return row


def balanced(task: Task, logits: Tensor, dataset: Dataset) -> float | None:
    """The task's metric with every label counting alike: the mean over the labels of the metric among their examples.

    Examples of several labels have no one to count by; theirs is the metric of all together. A label among whose
    examples the metric is undefined does not count; None where that leaves no label.
    """
    targets = targets_of(task, dataset)
    rows: dict[object, list[int]] = {}
    for i, example in enumerate(dataset.examples):
        rows.setdefault(example.label if isinstance(example.label, str) else None, []).append(i)
    values = [task.metrics(logits[own], targets[own]).get(task.metric) for own in rows.values()]
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def summarised(rows: Iterable[Row]) -> dict[str, float]:
    """Over sites: mean, mean weighted by examples, standard deviation (n), worst, and mean of the worst fifth; the mean
    over labels that a site knows, where some site does not know all."""
    listed = list(rows)
    scores = torch.tensor([row["value"] for row in listed], dtype=torch.float64)
    examples = torch.tensor([row["examples"] for row in listed], dtype=torch.float64)
    fifth = scores.sort().values[: max(1, round(len(scores) / 5))]
    found = {
        "mean": float(scores.mean()),
        "weighted_mean": float((scores * examples).sum() / examples.sum()),
        "std": float(scores.std(correction=0)),
        "worst": float(scores.min()),
        "worst_fifth": float(fifth.mean()),
    }
    if any("own_labels" in row for row in listed):
        known = torch.tensor([row.get("own_labels", row["value"]) for row in listed], dtype=torch.float64)
        found["own_labels"] = float(known.mean())
    return found


def pooled(federation: Federation, group: str) -> Dataset:
    """The test splits of a group's sites as one data set."""
    parts = [own.test for own in federation.participants.values() if own.group == group and len(own.test)]
    if not parts:
        return Dataset(())
    prefix = {name: padded([part.prefix[name] for part in parts]) for name in parts[0].prefix}
    return Dataset(tuple(example for part in parts for example in part.examples), parts[0].pixels, prefix)


def _view(sites: Mapping[str, Participant], measure: Callable[[str, Participant], Row]) -> View | None:
    rows: dict[str, Any] = {}
    tasks: dict[str, list[Row]] = {}
    for name, own in sites.items():
        if row := measure(name, own):
            rows[name] = {"metric": own.site.task.metric, **row}
            tasks.setdefault(own.kind, []).append(row)
    return {"sites": rows, "by_task": {task: summarised(values) for task, values in tasks.items()}} if rows else None


def _labels(example: Example) -> tuple[str, ...]:
    return (example.label,) if isinstance(example.label, str) else example.label
