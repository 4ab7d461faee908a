"""The server's end of an experiment: it greets the sites, runs the rounds, and asks each site what it gained.

An experiment outlives a job, a server and a site: its folder holds what is needed to go on, and a round that was begun
is begun again.

    recipe.toml   rounds.jsonl   server/   audit.log
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedloom import __version__, backbones
from fedloom.assembly import THREADS
from fedloom.deploy.audit import Audit
from fedloom.engines.remote import Limits, Link, RemoteEngine
from fedloom.errors import QuorumError, RecipeError
from fedloom.events import Note, Watch
from fedloom.federation import Schedule
from fedloom.methods import Pooled
from fedloom.recipe import Recipe
from fedloom.rounds import Course, follow
from fedloom.site import Silence
from fedloom.tensors import Shared
from fedloom.tested import SURE
from fedloom.views import summarised

SKEW = 300.0  # seconds that two clocks may be apart before anybody is told
SIMULATION = "only a simulation has the data of all sites at one place."


@dataclass(frozen=True)
class Experiment:
    """A recipe, run by these sites into this folder."""

    id: str
    recipe: Recipe
    roster: tuple[str, ...]  # in the order in which answers are folded
    folder: Path


@dataclass(frozen=True)
class Standing:
    """How it stands with the sites, while an experiment goes on."""

    lost: dict[str, str] = field(default_factory=dict)  # that no longer answer, and since when
    said: dict[str, str] = field(default_factory=dict)  # of themselves, when they were greeted


def conduct(experiment: Experiment, link: Link, limits: Limits, watch: Watch, standing: Standing) -> dict[str, Any]:
    """Run an experiment to its end, from wherever it was left: of its summary, what has to be measured.

    standing: is kept up to date
    raises QuorumError: too few sites are there, or answered
    """
    recipe, audit = experiment.recipe, Audit(experiment.folder / "audit.log")

    def seen(site: str, text: str) -> None:
        audit.note(experiment.id, f"{site}: {text}")

    engine = RemoteEngine(link, experiment.id, recipe.method, recipe.wire, limits, seen, standing.lost)
    deployable(recipe)
    schedule = _schedule(experiment)
    greeted = _greeted(engine, experiment, watch, standing.said)
    if not greeted:
        why = _said({**engine.lost, **engine.refused})
        raise QuorumError(f"none of the {len(experiment.roster)} sites is ready: {why}")
    course = Course(
        recipe.method_name,
        recipe.method,
        engine,
        schedule,
        recipe.federation,
        {site: greeted[site]["task"] if site in greeted else "" for site in experiment.roster},
        {site: greeted[site]["metric"] if site in greeted else "" for site in experiment.roster},
        lambda site: greeted[site]["held"] if site in greeted else range(recipe.federation.rounds),
    )
    shared = follow(course, lambda: _begun(experiment), experiment.folder, watch)
    return _result(engine, experiment, course, shared)


def deployable(recipe: Recipe) -> None:
    """Whether each site can do its part with what it has; raises RecipeError where it cannot."""
    if isinstance(recipe.method, Pooled):
        raise RecipeError(f"the method of {recipe.file} trains on the data of all sites, and they leave no site.")
    for group in recipe.parts.values():
        if group.data.vocabulary == "shared" and not group.task.labels:
            raise RecipeError(
                f"{recipe.file} leaves the labels to be read off the data of all sites, which nobody sees; write them "
                "out ([task] labels = [...]), or let each site have its own ([data] vocabulary = 'site')."
            )


def _schedule(experiment: Experiment) -> Schedule:
    recipe, options = experiment.recipe, experiment.recipe.federation
    if unknown := [name for name in recipe.sites if name not in experiment.roster]:
        raise RecipeError(f"there is no site '{unknown[0]}' (named in {recipe.file}); they are {experiment.roster}.")
    joins = {name: min(own.joins, options.rounds - 1) for name, own in recipe.sites.items() if own.joins}
    return Schedule(experiment.roster, options.rounds, options.seed, options.participation, options.quorum, joins)


def _begun(experiment: Experiment) -> Shared:
    """What the first round begins with, made at the server, where no data are."""
    torch.set_num_threads(THREADS)
    recipe = experiment.recipe
    named = recipe.backbone
    # Labels that only a site knows are no task of the server's.
    tasks = {group.task if group.data.vocabulary == "shared" else None for group in recipe.parts.values()}
    model = backbones.load(named.name, named.towers, getattr(torch, named.dtype), named.attention)  # type: ignore[arg-type]
    task = tasks.pop() if len(tasks) == 1 else None
    return recipe.method.start(model, task, len(experiment.roster), recipe.federation.seed)


def _greeted(
    engine: RemoteEngine, experiment: Experiment, watch: Watch, told: dict[str, str]
) -> dict[str, Mapping[str, Any]]:
    """What each site said of itself, by name; a site that refused the recipe counts as lost, with its reason."""
    hello = {"recipe": experiment.recipe.dump(), "version": __version__, "sites": len(experiment.roster)}
    ready = engine.ready(experiment.roster)
    hello["clock"] = time.time()
    greeted: dict[str, Mapping[str, Any]] = {}
    for site, reply, _ in engine.ask("hello", ready, hello):
        if isinstance(reply, Silence):
            engine.refused[site] = reply.reason
            watch(Note(f"{site} takes no part: {reply.reason}"))
            continue
        held, words = reply.get("held"), [reply.get(key) for key in ("metric", "task", "version", "data", "device")]
        if not (isinstance(held, list) and all(isinstance(n, int) for n in held)) or not all(
            isinstance(word, str) for word in words
        ):
            engine.refused[site] = "its hello is none"
            continue
        greeted[site] = reply
        told[site] = (
            f"fedloom {reply['version']} on {reply['device']}, examples {reply.get('examples')}, data {reply['data']}"
        )
        watch(Note(f"{site} is ready: {told[site]}"))
        if isinstance(late := reply.get("ahead"), float) and abs(late) > SKEW:
            way = "ahead of" if late > 0 else "behind"
            watch(Note(f"{site}'s clock is {abs(late):,.0f} s {way} this server's: one of the two is wrong; set it."))
    return greeted


def _result(engine: RemoteEngine, experiment: Experiment, course: Course, shared: Shared) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    tasks: dict[str, list[dict[str, float]]] = {}
    why: dict[str, str] = {}
    rounds = experiment.recipe.federation.rounds
    for reply in engine.personalise(rounds, shared, experiment.roster):
        if isinstance(reply, Silence):
            why[reply.site] = reply.reason
            continue
        value = reply.update.metrics.get(course.metrics[reply.site])
        if value is not None:
            row = {"value": value, "examples": reply.update.examples}
            sure = {name: reply.update.metrics.get(name) for name in SURE}
            rows[reply.site] = {"metric": course.metrics[reply.site], **row, **sure}
            tasks.setdefault(course.kinds[reply.site], []).append(row)
    personal = {"sites": rows, "by_task": {task: summarised(own) for task, own in tasks.items()}} if rows else None
    left_out = {"global": SIMULATION, "newcomer": SIMULATION}
    if personal is None:
        left_out["personal"] = _said(why) or "no site let its metric leave."
    return {
        "views": {"personal": personal, "global": None, "newcomer": None},
        "references": {},
        "left_out": left_out,
        "skipped_images": 0,
        "late_answers": dict(engine.late),
        "unmeasured": why,
    }


def _said(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{site}: {reason}" for site, reason in reasons.items())
