"""What FedPIA is sensitive to: a random design over γ, learning rate, batch, heterogeneity and task.

Each point draws all five at once, and runs FedPIA and its own ablation, without permutation and with γ = 0, on the
same sites; once from one start, as in the paper, and once from starts of their own. A rank correlation between what was
drawn and the difference in test loss, finer than a share of right answers, says what the worth depends on.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from scipy.stats import spearmanr

from fedloom.methods import FedPIA
from fedloom.statistics import interval
from fedloom.studies.setting import STARTS, TEST_LOSS, Setting, measured, moved, prepared
from fedloom.studies.study import DEVELOPMENT, Options, Part, Result, Row, verdict
from fedloom.tensors import generator

QUESTION = "What does the worth of FedPIA depend on: γ, learning rate, batch, heterogeneity, task?"
TASKS = {"questions": "vqamed-organ", "labels": "medlabels-dirichlet"}
BATCHES = (8, 16, 32)
ROUNDS, SITES = 3, 3
WORTH, LESS = "FedPIA minus plain averaging, points", f"{TEST_LOSS}, FedPIA minus plain averaging"
PLAIN, FULL, MOVED = "plain averaging, %", "FedPIA, %", "units moved in the last round, %"
FIGURES = (WORTH, LESS, PLAIN, FULL, MOVED)
FACTORS = ("log10 γ", "log10 learning rate", "batch", "log10 α")


def study(options: Options) -> Result:
    """The study: its figures, and what they say."""
    rows = [row for i in range(options.seeds) for row in point(options, i)]
    parts = (
        Part("By task", ("task", "starts"), FIGURES, tuple(rows)),
        Part("Every point", ("point", "starts", "task", *FACTORS), FIGURES, tuple(rows)),
    )
    seeds = tuple(dict.fromkeys(int(row["seed"]) for row in rows))
    of = (
        f"vilt-small on pack:vqamed; {options.seeds} points of a random design, log-uniform in γ in [0.001, 10], in "
        f"learning rate in [0.0003, 0.01] and in Dirichlet α in [0.1, 10]; a batch of {BATCHES}; one of two tasks "
        f"(questions: accuracy; labels: micro F1); {SITES} of five sites with 20 training images each, {ROUNDS} "
        "rounds; test metric and loss of what each site serves"
    )
    return Result("sensitivity", QUESTION, of, seeds, parts, tuple(found(rows)))


def drawn(i: int) -> dict[str, Any]:
    """The i-th point of the design: a function of i alone."""
    u = torch.rand(5, generator=generator("sensitivity", i)).tolist()

    def between(share: float, low: float, high: float) -> float:
        return math.log10(low) + share * (math.log10(high) - math.log10(low))

    return {
        "point": i,
        "task": list(TASKS)[int(u[0] * len(TASKS))],
        "log10 γ": round(between(u[1], 1e-3, 10), 3),
        "log10 learning rate": round(between(u[2], 3e-4, 1e-2), 3),
        "batch": BATCHES[int(u[3] * len(BATCHES))],
        "log10 α": round(between(u[4], 0.1, 10), 3),
    }


def point(options: Options, i: int) -> list[Row]:
    """One point of the design, and what came of it: a row for each way to start."""
    at = drawn(i)
    seed = DEVELOPMENT[i % len(DEVELOPMENT)]
    changes: dict[str, Any] = {
        "data.train": 20,
        "data.test": 40,
        "data.newcomer": 0,
        "data.partition": {"kind": "dirichlet", "sites": 5, "alpha": 10 ** at["log10 α"], "minimum": 110},
        "training.lr": 10 ** at["log10 learning rate"],
        "training.batch": at["batch"],
    }
    setting = prepared(options, seed, changes, SITES, TASKS[at["task"]])
    gamma = 10 ** at["log10 γ"]
    rows: list[Row] = []
    for starts, init in STARTS.items():
        full = served(setting, FedPIA(setting.adapter, gamma=gamma, init=init))
        plain = served(setting, FedPIA(setting.adapter, gamma=0.0, permute="neither", init=init))
        worth = {WORTH: full["accuracy"] - plain["accuracy"], LESS: full["loss"] - plain["loss"]}
        figures = {**worth, PLAIN: plain["accuracy"], FULL: full["accuracy"], MOVED: full["moved"]}
        rows.append({**at, "starts": starts, "seed": seed, **figures})
    return rows


def served(setting: Setting, method: FedPIA) -> dict[str, float]:
    """What the sites serve after the last round, the mean over sites, and what the server moved in it."""
    after = setting.last(method, ROUNDS)
    figures = [
        measured(method, own.site, after.privates[site], after.shared, own.test)
        for site, own in setting.participants.items()
    ]
    means = {figure: sum(each[figure] for each in figures) / len(figures) for figure in ("accuracy", "loss")}
    return {**means, "moved": moved(after.told, "server")}


def found(rows: Sequence[Row]) -> list[str]:
    """What the figures say, in sentences."""
    told = []
    for starts in STARTS:
        of = [row for row in rows if row["starts"] == starts]
        for figure in (WORTH, LESS):
            for task in ("both tasks", *TASKS):
                worth = [float(row[figure]) for row in of if task in ("both tasks", row["task"])]
                if worth:
                    about = f"{starts.capitalize()}, {task}: {figure}"
                    told.append(verdict(about, "FedPIA", "plain averaging", interval(worth), "points"))
        told += [correlated(of, starts, factor) for factor in FACTORS]
    return told


def correlated(rows: Sequence[Row], starts: str, factor: str) -> str:
    """Whether the difference in loss goes with a factor, in a sentence."""
    values, worth = [float(row[factor]) for row in rows], [float(row[LESS]) for row in rows]
    if len(set(values)) < 2 or len(set(worth)) < 2 or len(rows) < 4:
        return f"{starts.capitalize()}, {factor}: too few unlike points for a rank correlation."
    rho, p = spearmanr(values, worth)
    bound = 0.05 / len(FACTORS)
    return (
        f"{starts.capitalize()}, {factor}: its rank correlation with the difference in loss is {rho:+.2f} "
        f"(p = {p:.2g}), "
        + ("beyond noise." if p < bound else f"not beyond noise (bound {bound:g} for {len(FACTORS)} factors).")
    )
