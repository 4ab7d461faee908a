"""What studies run on: a small federation in memory, and its figures."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from fedloom.adapters import Bottleneck
from fedloom.assembly import assemble, planned
from fedloom.backbones.adaptable import Adaptable
from fedloom.data import Dataset
from fedloom.engines.local import Participant
from fedloom.errors import RecipeError
from fedloom.federation import predict, visible
from fedloom.methods import Method
from fedloom.places import Adapter
from fedloom.recipe import load
from fedloom.site import Answer, Site
from fedloom.statistics import means
from fedloom.studies.study import Options
from fedloom.tensors import Private, Shared, Tensors, part, to_bytes
from fedloom.training import head

RECIPE = "vqamed-organ"
SITES = (
    "vilt-small on pack:vqamed, a site an organ (recipe vqamed-organ); bottleneck adapters of 24 units in the last "
    "three blocks; private linear heads, fitted first on the frozen model"
)
STARTS: Mapping[str, Literal["shared", "independent"]] = {"one start": "shared", "starts of their own": "independent"}
ACCURACY, TEST_LOSS, HELD_OUT = "test accuracy, %", "test loss", "held-out loss"


@dataclass(frozen=True)
class After:
    """What a round leaves."""

    shared: Shared
    privates: Mapping[str, Private]
    answers: tuple[Answer, ...]
    told: Mapping[str, float]  # the method's diagnostics: those of the server, and the mean of those of the sites
    bytes_up: int
    seconds: float  # of the round, without any evaluation


@dataclass(frozen=True)
class Sites:
    """The sites of a recipe, each with its head fitted."""

    model: Adaptable
    participants: Mapping[str, Participant]
    heads: Mapping[str, Private]
    seed: int

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(own.site for own in self.participants.values())

    def start(self, method: Method) -> Shared:
        task = next(iter(self.participants.values())).site.task
        return method.start(self.model, task, len(self.participants), self.seed)

    def rounds(self, method: Method, n: int) -> Iterator[After]:
        """Rounds in which everybody answers."""
        shared, privates = self.start(method), dict(self.heads)
        for round in range(n):
            began, answers = time.perf_counter(), []
            for site in self.sites:
                update, privates[site.name] = method.local_round(round, site, visible(shared), privates[site.name])
                answers.append(Answer(site.name, update, len(to_bytes(update.tensors))))
            shared, told = method.aggregate(shared, answers)
            seconds = time.perf_counter() - began
            told = {**means([answer.update.metrics for answer in answers]), **told}
            sent = sum(answer.bytes_up for answer in answers)
            yield After(shared, dict(privates), tuple(answers), told, sent, seconds)

    def last(self, method: Method, n: int) -> After:
        *_, after = self.rounds(method, n)
        return after

    def figures(self, method: Method, shared: Shared, privates: Mapping[str, Private]) -> dict[str, float]:
        """What sites serve, the mean over them."""
        found = []
        for name, own in self.participants.items():
            held_out, test = (
                measured(method, own.site, privates[name], shared, own.split(split)) for split in ("held_out", "test")
            )
            found.append({ACCURACY: test["accuracy"], TEST_LOSS: test["loss"], HELD_OUT: held_out["loss"]})
        return means(found)


@dataclass(frozen=True)
class Setting(Sites):
    """Sites whose adapters have hidden units to look into."""

    adapter: Bottleneck


def prepared(
    options: Options, seed: int, changes: Mapping[str, Any], sites: int | None = None, recipe: str | Path = RECIPE
) -> Setting:
    """`gathered` sites; raises RecipeError where their adapter is no bottleneck."""
    every, adapter = gathered(options, seed, changes, sites, recipe)
    if not isinstance(adapter, Bottleneck):
        raise RecipeError(
            f"[method.adapter] of {options.recipe or recipe} has no hidden units; a study of them needs kind = "
            "'bottleneck'."
        )
    return Setting(every.model, every.participants, every.heads, seed, adapter)


def gathered(
    options: Options, seed: int, changes: Mapping[str, Any], sites: int | None = None, recipe: str | Path = RECIPE
) -> tuple[Sites, Adapter]:
    """The study's recipe with its changes and then the user's; of its sites the first few."""
    asked = load(options.recipe or recipe, {**changes, "federation.seed": seed}).altered(options.changes)
    whole = assemble(planned(asked.altered({"backbone.cache": False})))
    adapter: Adapter = whole.method.adapter
    kept = {
        name: replace(own, site=own.site.cached(adapter), test=own.site.kept(own.test, adapter))
        for name, own in list(whole.participants.items())[:sites]
    }
    if sites is not None and len(kept) < sites:
        raise RecipeError(f"{asked.file} has {len(kept)} sites, and this study needs {sites}.")
    heads = {name: Private(head(own.site, {})) for name, own in kept.items()}
    return Sites(whole.model, kept, heads, seed), adapter


def measured(method: Method, site: Site, private: Private, shared: Shared, dataset: Dataset) -> dict[str, float]:
    """The accuracy in percent and the loss of what a site serves; where its task has another metric, that one."""
    logits = predict(method, site, private, shared, dataset)
    targets = site.task.targets([example.label for example in dataset.examples])
    value = site.task.metrics(logits, targets)[site.task.metric]
    return {"accuracy": 100 * value, "loss": float(site.task.loss(logits, targets))}


@torch.no_grad()
def loss(setting: Setting, site: Site, private: Private, adapter: Tensors, dataset: Dataset) -> float:
    """The mean loss on a data set of an adapter with the site's own head."""
    tensors = {**part("head", private), **adapter}
    parts = [(float(site.loss(setting.adapter, tensors, batch)), len(batch)) for batch in site.passes(dataset)]
    return sum(value * n for value, n in parts) / sum(n for _, n in parts)


def moved(told: Mapping[str, float], level: str) -> float:
    """The share of units that a level moved, in percent, the mean over places; 0 where it matched none."""
    shares = [value for name, value in told.items() if name.startswith(f"{level}/moved/")]
    return 100 * sum(shares) / len(shares) if shares else 0.0
