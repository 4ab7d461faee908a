"""What a site sends over a wire, against float32, and how far apart the models are in the end.

The backbone is in float32: in bfloat16 the least difference turns up as the backbone's own rounding, which is larger.
Rounds of training make any difference larger; how much so shows where no wire is, and the start moves by a millionth.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fedloom.backbones import Adaptable, Batch
from fedloom.bench.lines import Line
from fedloom.bench.lora import BATCH, CLASSES
from fedloom.bench.shapes import NAMES, Size, batch, clip, prompts
from fedloom.bench.sites import of_noise
from fedloom.federation import Schedule, federate
from fedloom.tensors import Shared
from fedloom.wire import Wire

SITES, EXAMPLES, ROUNDS = 2, 16, 10  # four steps a round
MOVED = 1e-6
INT8 = Wire(("delta", "int8", "zstd"))
BYTES, LOGITS = 0.26, 1e-2


def wire(size: Size, repeats: int) -> Iterator[Line]:
    """Goal 9, on images of noise; what it costs on real ones is in the study of that name. It has no repetitions."""
    made, given = clip(size), batch(BATCH, candidates=prompts(CLASSES))
    (plain, exact), (packed, rounded) = (ended(made, wire, given) for wire in (Wire(), INT8))
    _, elsewhere = ended(made, Wire(), given, MOVED)
    over, control = "int8 deltas with zstd", f"no wire, from a start moved by {MOVED:g}"
    sent = {"own": packed / 1e6, "unit": "MB", "against": "float32", "peer": plain / 1e6}
    yield Line("wire", f"a site's frame, LoRA of {NAMES[size]}, {over}", **sent, goal=BYTES, at_most=True)  # type: ignore[arg-type]
    for how, logits, goal in ((over, rounded, LOGITS), (control, elsewhere, None)):
        for rounds, one, other in zip(("one round", f"{ROUNDS} rounds"), exact, logits, strict=True):
            apart, norm = float((other - one).norm()), float(one.norm())
            told = f"logits' distance after {rounds}, {NAMES[size]}, {how}"
            yield Line("wire", told, apart, "", "their norm without a wire", norm, goal, at_most=True)


def ended(made: Adaptable, wire: Wire, given: Batch, moved: float = 0.0) -> tuple[float, list[Tensor]]:
    """Bytes of a site's frame, and the global model's logits after the first round and the last."""
    sent, logits = 0.0, []
    with tempfile.TemporaryDirectory() as folder:
        engine = replace(of_noise(made, SITES, EXAMPLES, Path(folder)), wire=wire)
        start = Shared({name: t * (1 + moved) for name, t in engine.method.start(made, None, SITES, 0).items()})
        for done in federate(engine.method, engine, start, Schedule(tuple(engine.participants), ROUNDS)):
            sent += sum(answer.bytes_up for answer in done.answers.values()) / (SITES * ROUNDS)
            if done.round in (0, ROUNDS - 1):
                with torch.no_grad():
                    scores = made(given, engine.method.adapter, done.shared).scores
                assert scores is not None  # the batch has candidates
                logits.append(scores.double())
    return sent, logits
