"""What a run will cost, measured on a few steps of it: `fedloom run RECIPE --dry-run`."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from itertools import islice

import torch

from fedloom.assembly import Federation, assemble, planned
from fedloom.backbones.batches import Batch
from fedloom.data import Dataset
from fedloom.engines.local import Participant
from fedloom.errors import UpdateError
from fedloom.federation import admit, site_evaluate, visible
from fedloom.flops import Count, counted, of_cache
from fedloom.lineage import peak
from fedloom.methods import Method
from fedloom.places import Adapter
from fedloom.quiet import quiet
from fedloom.recipe import Recipe
from fedloom.report.figures import duration, on_the_wire, size
from fedloom.site import Answer, Site, Update
from fedloom.tensors import Private, Shared, at, shapes, to_bytes, under, without

STEPS = 3  # that are timed


@dataclass(frozen=True)
class Estimate:
    """Of a whole run, references included, on this machine."""

    sites: int
    rounds: int
    steps: int  # of the optimiser, at all sites
    trained: tuple[int, int]  # parameters: of the site that trains fewest, and of the one that trains most
    flops: int  # of the largest step: matrix products, convolutions and attention, forward and backward
    flops_training: int  # of all that sites compute to train by the method; without references and newcomers
    seconds: float
    memory: int  # bytes, at most, of this process
    disk: int  # bytes of checkpoints and private states
    bytes_up: int  # that sites send in all
    bytes_down: int
    bytes_site: int  # that the site that sends most moves in a round, both ways
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """For a person to read."""
        sizes = {"memory": self.memory, "disk": self.disk, "up": self.bytes_up, "down": self.bytes_down}
        return [
            f"sites     {self.sites}",
            f"rounds    {self.rounds}",
            f"steps     {self.steps}",
            f"trained   {' to '.join(f'{n:,}' for n in sorted(set(self.trained)))} parameters a site",
            f"step      {self.flops / 1e9:,.3g} GFLOP",
            f"training  {self.flops_training / 1e12:,.3g} TFLOP",
            f"time      {duration(self.seconds)}",
            *(f"{name:<10}{size(n)}" for name, n in sizes.items()),
            f"wire      {on_the_wire(self.bytes_site)}",
            *(f"note      {note}" for note in self.notes),
        ]


@dataclass(frozen=True)
class _Measured:
    """What a site of one kind does: of one task, with an adapter of one width."""

    step: float  # seconds
    look: float  # seconds an example
    trained: int
    update: Update
    private: Private
    up: int  # bytes
    state: int  # bytes that it keeps after a round
    alone: int  # bytes of the adapter and the head of a site that sends nothing


def estimate(recipe: Recipe) -> Estimate:
    """Read and check all that a recipe names, run a few steps at a site of each kind, and count.

    Nothing is left on disk.
    """
    recipe = planned(recipe)
    federation = assemble(recipe)
    participants, schedule, wire = federation.participants, federation.schedule, recipe.wire
    shared = recipe.method.start(federation.model, federation.task, len(participants), 0)
    given = visible(shared)
    first = wire.give(given)
    largest: dict[object, Participant] = {}
    for own in sorted(participants.values(), key=lambda p: len(p.site)):
        largest[_kind(own)] = own
    with quiet():  # of sites that hold nothing out, as none does here
        kinds = {kind: _measured(federation, own, shared, wire.given(first)) for kind, own in largest.items()}
        flops, flops_training = _flops(federation, shared, largest, {kind: one.private for kind, one in kinds.items()})
    measured = {name: kinds[_kind(own)] for name, own in participants.items()}
    # Fresh adapters are half zeros, which pack better than what comes down after the first round.
    trained = {
        name: tensor
        for one in kinds.values()
        for name, tensor in one.update.tensors.items()
        if shapes(given).get(name) == tensor.shape
    }
    down = len(wire.give({**given, **trained}))
    asked = [schedule.asked(round) for round in range(schedule.rounds)]
    batches = {name: -(-len(p.site) // recipe.training.batch) for name, p in participants.items()}
    steps = {
        name: n * (recipe.training.epochs * sum(name in sites for sites in asked) + recipe.training.finetune)
        for name, n in batches.items()
    }
    trainings = 1 + len({"local", "pooled"} & set(recipe.reference.rows))
    every, keep = recipe.federation.evaluate_every, recipe.federation.keep
    times = trainings * (schedule.rounds // every if every else 0)  # that held-out examples are looked at
    tests = (1 + len(recipe.reference.rows)) * (1 + len(participants))
    looks = {name: times * len(p.site.held_out) + tests * len(p.test) for name, p in participants.items()}
    checkpoints, states = min(keep, schedule.rounds), min(keep + 1, schedule.rounds)  # that server and site keep
    stored, tuned = 1 + ("local" in recipe.reference.rows), bool(recipe.training.finetune)
    kept = sum(one.state * states + one.alone * (states * (stored - 1) + stored * tuned) for one in measured.values())
    return Estimate(
        sites=len(participants),
        rounds=schedule.rounds,
        steps=sum(steps.values()) * trainings,
        trained=(min(one.trained for one in kinds.values()), max(one.trained for one in kinds.values())),
        flops=flops,
        flops_training=flops_training,
        seconds=sum(steps[name] * trainings * one.step + looks[name] * one.look for name, one in measured.items()),
        memory=peak(),
        disk=len(to_bytes(shared)) * checkpoints + kept,
        bytes_up=sum(measured[name].up for sites in asked for name in sites),
        bytes_down=len(first) * len(asked[0]) + down * sum(len(sites) for sites in asked[1:]),
        bytes_site=max(one.up for one in kinds.values()) + down,
        notes=federation.skipped,
    )


def _kind(own: Participant) -> tuple[object, ...]:
    return own.group, *sorted(shapes(own.site.initial).items())


def _measured(federation: Federation, own: Participant, shared: Shared, given: Shared) -> _Measured:
    """given: what the site reads in the server's first frame"""
    step, update, private = _one_round(federation, own, shared)
    sent, left = federation.recipe.wire.send(own.site.name, update.tensors, given, {})
    adapter = federation.model.init(federation.recipe.method.adapter, 0)
    return _Measured(
        step=step,
        look=_time_of_a_look(federation, own, shared),
        trained=_trained(update, private),
        update=update,
        private=private,
        up=len(sent),
        state=len(to_bytes({**private, **at("wire", left)})),
        alone=len(to_bytes({**adapter, **own.site.initial, **own.site.task.init(federation.model.dim, 0)})),
    )


@dataclass(frozen=True)
class _Brief(Site):
    """A site whose loops over training examples end after a few steps."""

    def batches(self, round: int | str, epochs: int | None = None) -> Iterator[Batch]:
        return islice(super().batches(round, epochs), STEPS)

    def kept(self, dataset: Dataset, adapter: Adapter) -> Dataset:
        return super().kept(dataset[: self.training.batch * STEPS], adapter)


def _one_round(federation: Federation, own: Participant, shared: Shared) -> tuple[float, Update, Private]:
    """Seconds a step, and what a site sends and keeps."""
    method, training = federation.method, replace(own.site.training, epochs=1, warmup_head=0)
    brief = replace(own.site, held_out=own.site.held_out[:0], training=training)
    site = _Brief(**{part.name: getattr(brief, part.name) for part in fields(brief)})
    method.local_round(
        0, site, visible(shared), Private({})
    )  # the first pass also decodes images and encodes candidates
    began = time.perf_counter()
    update, private = method.local_round(0, site, visible(shared), Private({}))
    return (time.perf_counter() - began) / min(STEPS, -(-len(site) // training.batch)), update, private


def _trained(update: Update, private: Private) -> int:
    """Elements of what a site sends, and of an adapter and a head that it keeps; those of one that it does both with
    once."""
    sent = without("local", update.tensors)
    own = {
        name: tensor
        for name, tensor in under("local", private).items()
        if name not in sent or not torch.equal(tensor, sent[name])
    }
    return sum(tensor.numel() for part in (sent, own, under("head", private)) for tensor in part.values())


def _flops(
    federation: Federation,
    shared: Shared,
    largest: Mapping[object, Participant],
    trained: Mapping[object, Private],
) -> tuple[int, int]:
    """FLOPs of the largest step, and of all that sites compute in all rounds, once for fine-tuning and once for what
    `cache` keeps, as counted at the largest site of each kind.

    Of rounds the first and the second are counted, and the others taken to be as the second: ranks that are pruned on
    the way save hardly any arithmetic, which is the backbone's. A site's second round goes on from what is `trained`,
    with what the server makes of all sites' first.
    """
    method, schedule = federation.method, federation.schedule
    kinds = {name: _kind(own) for name, own in federation.participants.items()}
    began = {
        kind: counted(lambda site: method.local_round(0, site, visible(shared), Private({})), own.site)
        for kind, own in largest.items()
    }
    given = visible(_aggregated(method, shared, {name: began[kind][1][0] for name, kind in kinds.items()}))
    further = {kind: _further(federation, own, given, trained[kind]) for kind, own in largest.items()}
    total = 0.0
    asked = Counter(name for round in range(schedule.rounds) for name in schedule.asked(round))
    for name, own in federation.participants.items():
        (first, _), (later, once), rounds = began[kinds[name]], further[kinds[name]], asked[name]
        total += (first.of(own.site) + (rounds - 1) * later.of(own.site) if rounds else 0.0) + once.of(own.site)
    return round(max(began[kind][0].step(own.site) for kind, own in largest.items())), round(total)


def _further(federation: Federation, own: Participant, given: Shared, private: Private) -> tuple[Count, Count]:
    """FLOPs of a site's second round, and of what it does once: fine-tuning, and what is kept of its examples."""
    method, recipe = federation.method, federation.recipe
    later, tuned, epochs = Count(), Count(), recipe.training.finetune
    if federation.schedule.rounds > 1:
        later, _ = counted(lambda site: method.local_round(1, site, given, private), own.site)
    if epochs:
        tuned, _ = counted(lambda site: method.personalise(site, given, private, epochs), own.site)
    return later, tuned + (of_cache(own.site, method.adapter) if recipe.backbone.cache else Count())


def _aggregated(method: Method, shared: Shared, updates: Mapping[str, Update]) -> Shared:
    """What the server makes of these sites' updates, or of those that it admits."""
    answers = []
    for name, update in updates.items():
        with suppress(UpdateError):
            admit(answer := Answer(name, update), shared, method)
            answers.append(answer)
    return method.aggregate(shared, answers)[0] if answers else shared


def _time_of_a_look(federation: Federation, own: Participant, shared: Shared) -> float:
    few = own.site.train[: own.site.training.batch * STEPS]
    began = time.perf_counter()
    site_evaluate(federation.method, own.site, Private({}), shared, few)
    return (time.perf_counter() - began) / len(few)
