"""What a wire saves in bytes, and what it costs in what sites serve in the end.

The same federation is run over each wire, from the same start on the same batches. Of what every site serves, the
logits on its own test split are held against those of the run without a wire: ‖z - z₀‖ / ‖z₀‖ over all sites, after the
first round and after the last. Between the two lie rounds of training, which make a difference in the last bits larger:
what rounding itself costs is the first figure, what a run ends with the last.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fedloom.engines.local import LocalEngine
from fedloom.federation import Schedule, federate, own_state, predict
from fedloom.methods import Method
from fedloom.recipe import load
from fedloom.store import Store
from fedloom.studies.setting import ACCURACY, TEST_LOSS, Sites, gathered
from fedloom.studies.study import Options, Part, Result, Row, verdict
from fedloom.tensors import Private, Shared
from fedloom.wire import Stage, Wire

QUESTION = "What does a wire save in bytes, and what does it cost in what sites serve?"
RECIPE = "quickstart"
UP, DOWN = "bytes up, of fp32", "bytes down, of fp32"
FIRST, LAST = "logits after one round, relative difference", "logits after the last round, relative difference"
PLAIN, INT8, TIGHT = "none", "int8 up", "int8 up, within an eighth of fp32"
PACKED: tuple[Stage, ...] = ("shuffle", "zstd")
GOAL_BYTES, GOAL_LOGITS = 0.26, 1e-2


@dataclass(frozen=True)
class End:
    """What a run ends with."""

    bytes_up: int
    bytes_down: int
    first: Tensor  # logits of all sites in one row, after one round
    last: Tensor
    figures: Mapping[str, float]


def study(options: Options) -> Result:
    """The study: its figures, and what they say."""
    asked = load(options.recipe or RECIPE).altered(options.changes)
    rows: list[Row] = []
    for seed in options.drawn():
        sites, _ = gathered(options, seed, {}, recipe=RECIPE)
        rows += compared(sites, asked.method, asked.federation.rounds)
    part = Part("Over each wire", ("wire",), (UP, DOWN, FIRST, LAST, ACCURACY, TEST_LOSS), tuple(rows))
    of = (
        f"{asked.federation.rounds} rounds of {asked.method_name} on the recipe {options.recipe or RECIPE}, all sites "
        "in each, each site's own test split; fp32 is what the run without a wire sends, whose frames are safetensors"
    )
    return Result("wire", QUESTION, of, options.drawn(), (part,), tuple(found(part)))


def compared(sites: Sites, method: Method, rounds: int) -> list[Row]:
    """A row for every wire."""
    plain = ended(sites, method, rounds, Wire())
    rows: list[Row] = []
    for name, wire in wires(plain.bytes_up / rounds / len(sites.participants)).items():
        own = ended(sites, method, rounds, wire) if wire != Wire() else plain
        ratios = {UP: own.bytes_up / plain.bytes_up, DOWN: own.bytes_down / plain.bytes_down}
        apart = {FIRST: relative(own.first, plain.first), LAST: relative(own.last, plain.last)}
        rows.append({"wire": name, "seed": sites.seed, **ratios, **apart, **own.figures})
    return rows


def wires(frame: float) -> dict[str, Wire]:
    """What is tried; `frame`: the bytes that a site sends without a wire."""
    return {
        PLAIN: Wire(),
        "lossless both ways": Wire(PACKED, PACKED),
        "bf16 up": Wire(("delta", "bf16", *PACKED)),
        INT8: Wire(("delta", "int8", "zstd")),
        "int8 up, bf16 down": Wire(("delta", "int8", "zstd"), ("bf16", *PACKED)),
        TIGHT: Wire(("delta", "int8", "zstd"), budget=int(frame / 8)),
    }


def ended(sites: Sites, method: Method, rounds: int, wire: Wire) -> End:
    """A whole run over a wire, on a disk that is gone after it."""
    with tempfile.TemporaryDirectory() as folder:
        own = {
            name: replace(one, store=Store(Path(folder) / str(i)))
            for i, (name, one) in enumerate(sites.participants.items())
        }
        up, down, logits = 0, 0, []
        schedule = Schedule(tuple(own), rounds, sites.seed)
        for done in federate(method, LocalEngine(method, own, wire), sites.start(method), schedule):
            up += sum(answer.bytes_up for answer in done.answers.values())
            down += sum(answer.bytes_down for answer in done.answers.values())
            privates = {name: own_state(one.store.before(rounds)[1]) for name, one in own.items()}
            if done.round in (0, rounds - 1):
                logits.append(served(sites, method, done.shared, privates))
        return End(up, down, logits[0], logits[-1], sites.figures(method, done.shared, privates))


def served(sites: Sites, method: Method, shared: Shared, privates: Mapping[str, Private]) -> Tensor:
    """The logits of what every site serves on its own test split, in one row."""
    each = (predict(method, one.site, privates[name], shared, one.test) for name, one in sites.participants.items())
    return torch.cat([logits.double().flatten() for logits in each])


def relative(logits: Tensor, plain: Tensor) -> float:
    """‖z - z₀‖ / ‖z₀‖."""
    return float((logits - plain).norm() / plain.norm())


def found(part: Part) -> list[str]:
    """What the figures say, in sentences."""
    told = []
    for case in part.cases():
        wire = str(case["wire"])
        if wire == PLAIN:
            continue
        up, first, last = (part.mean(figure, wire=wire) for figure in (UP, FIRST, LAST))
        told.append(
            f"{wire}: {up:.3f} of the bytes up ({'at most' if up <= GOAL_BYTES else 'more than'} {GOAL_BYTES}), "
            f"{part.mean(DOWN, wire=wire):.3f} down; logits are {first:.2g} apart after one round and {last:.2g} after "
            f"the last ({'at most' if last <= GOAL_LOGITS else 'more than'} {GOAL_LOGITS:g})."
        )
        told.append(verdict(ACCURACY, wire, "no wire", part.compared(ACCURACY, {"wire": wire}, {"wire": PLAIN})))
    return told
