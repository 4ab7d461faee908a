"""What a run will cost, measured on a few steps of it: `fedloom run RECIPE --dry-run`."""

import resource
import sys
import time
from dataclasses import dataclass, replace

import torch

from fedloom.assembly import Federation, assemble, planned
from fedloom.engines.local import Participant
from fedloom.federation import site_evaluate, visible
from fedloom.recipe import Recipe
from fedloom.report.figures import on_the_wire
from fedloom.site import Update
from fedloom.tensors import Private, Shared, at, shapes, to_bytes, under, without

STEPS = 3  # that are timed


@dataclass(frozen=True)
class Estimate:
    """Of a whole run, references included, on this machine."""

    sites: int
    rounds: int
    steps: int  # of the optimiser, at all sites
    trained: int  # parameters that a site trains
    flops: int  # of a step: matrix products, convolutions and attention, forward and backward
    seconds: float
    memory: int  # bytes, at most, of this process
    disk: int  # bytes of checkpoints and private states
    bytes_up: int  # that sites send in all
    bytes_down: int
    bytes_site: int  # that a site moves in a round, both ways
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """For a person to read."""
        mega = {"memory": self.memory, "disk": self.disk, "up": self.bytes_up, "down": self.bytes_down}
        return [
            f"sites     {self.sites}",
            f"rounds    {self.rounds}",
            f"steps     {self.steps}",
            f"trained   {self.trained:,} parameters a site",
            f"step      {self.flops / 1e9:,.3g} GFLOP",
            f"time      {self.seconds / 60:.1f} minutes",
            *(f"{name:<10}{size / 1e6:,.1f} MB" for name, size in mega.items()),
            f"wire      {on_the_wire(self.bytes_site)}",
            *(f"note      {note}" for note in self.notes),
        ]


def estimate(recipe: Recipe) -> Estimate:
    """Read and check all that a recipe names, run a few steps at one site, and count. Nothing is left on disk."""
    recipe = planned(recipe)
    federation = assemble(recipe)
    own = max(federation.participants.values(), key=lambda p: len(p.site))
    shared = recipe.method.start(federation.model, federation.task, len(federation.participants), 0)
    a_step, update, private = _one_round(federation, own, shared)
    a_look = _time_of_a_look(federation, own, shared)
    training, schedule = recipe.training, federation.schedule
    answers = [len(schedule.asked(round)) for round in range(schedule.rounds)]
    batches = {name: -(-len(p.site) // training.batch) for name, p in federation.participants.items()}
    steps = sum(batches[n] * training.epochs for r in range(schedule.rounds) for n in schedule.asked(r))
    steps += sum(batches.values()) * training.finetune
    trainings = 1 + len({"local", "pooled"} & set(recipe.reference.rows))
    every = recipe.federation.evaluate_every
    held_out = sum(len(p.site.held_out) for p in federation.participants.values())
    tested = sum(len(p.test) for p in federation.participants.values()) * (1 + len(federation.participants))
    looks = (
        trainings * (held_out * (schedule.rounds // every if every else 0)) + (1 + len(recipe.reference.rows)) * tested
    )
    given, wire = visible(shared), recipe.wire
    first = wire.give(given)
    sent, left = wire.send(own.site.name, update.tensors, wire.given(first), {})
    # Fresh adapters are half zeros, which pack better than what comes down after the first round.
    trained = {name: tensor for name, tensor in update.tensors.items() if shapes(given).get(name) == tensor.shape}
    up, down = len(sent), len(wire.give({**given, **trained}))
    frame, kept = len(to_bytes(shared)), len(to_bytes({**private, **at("wire", left)}))
    checkpoints = min(recipe.federation.keep, schedule.rounds)
    states = min(recipe.federation.keep + 1, schedule.rounds)  # that a site keeps
    adapter = federation.model.init(recipe.method.adapter, 0)
    stored = 1 + ("local" in recipe.reference.rows)
    alone = len(to_bytes({**adapter, **own.site.task.init(federation.model.dim, 0)}))  # of a site that sends nothing
    kept_by_each = kept * states + alone * (states * (stored - 1) + stored * bool(training.finetune))
    return Estimate(
        sites=len(federation.participants),
        rounds=schedule.rounds,
        steps=steps * trainings,
        trained=_trained(update, private),
        flops=_flops(federation, own, shared),
        seconds=steps * trainings * a_step + looks * a_look,
        memory=_peak(),
        disk=frame * checkpoints + kept_by_each * len(federation.participants),
        bytes_up=up * sum(answers),
        bytes_down=len(first) * answers[0] + down * sum(answers[1:]),
        bytes_site=up + down,
        notes=federation.skipped,
    )


def _one_round(federation: Federation, own: Participant, shared: Shared) -> tuple[float, Update, Private]:
    """Seconds a step, and what a site sends and keeps."""
    method, training = federation.method, replace(own.site.training, epochs=1, warmup_head=0)
    few = own.site.train[: training.batch * STEPS]
    site = replace(own.site, train=few, held_out=own.site.held_out[:0], training=training)
    method.local_round(
        0, site, visible(shared), Private({})
    )  # the first pass also decodes images and encodes candidates
    began = time.perf_counter()
    update, private = method.local_round(0, site, visible(shared), Private({}))
    return (time.perf_counter() - began) / -(-len(few) // training.batch), update, private


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


def _flops(federation: Federation, own: Participant, shared: Shared) -> int:
    """Counted while a site trains on one batch, after a first pass."""
    from torch.utils.flop_counter import FlopCounterMode

    training = replace(own.site.training, epochs=1, warmup_head=0)
    # Without what is held out, on which a method may choose once a round.
    nothing = own.site.held_out[:0]
    site = replace(own.site, train=own.site.train[: training.batch], held_out=nothing, training=training)
    with FlopCounterMode(display=False) as counter:
        federation.method.local_round(0, site, visible(shared), Private({}))
    return int(counter.get_total_flops())


def _time_of_a_look(federation: Federation, own: Participant, shared: Shared) -> float:
    few = own.site.train[: own.site.training.batch * STEPS]
    began = time.perf_counter()
    site_evaluate(federation.method, own.site, Private({}), shared, few)
    return (time.perf_counter() - began) / len(few)


def _peak() -> int:
    """The most memory that this process has held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
