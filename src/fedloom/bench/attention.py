"""Which attention is quicker on this machine, in each dtype: what `auto` stands for in [backbone] attention."""

from collections.abc import Iterator
from typing import get_args

from fedloom.backbones import Attention
from fedloom.bench.lines import Line
from fedloom.bench.lora import BATCH, CLASSES, Step, dtypes, own
from fedloom.bench.measuring import interleaved, milliseconds
from fedloom.bench.shapes import NAMES, Size, batch, clip, prompts


def attention(size: Size, repeats: int) -> Iterator[Line]:
    """A LoRA step under torch's fused attention, against the same step under Hugging Face's formula."""
    given = batch(BATCH, candidates=prompts(CLASSES))
    for dtype in dtypes():
        steps: dict[str, Step] = {kind: own(clip(size, dtype, attention=kind), given) for kind in get_args(Attention)}
        took = interleaved(steps, repeats)
        yield Line(
            "attention",
            f"LoRA step, {NAMES[size]}, {dtype}, sdpa, batch {BATCH}",
            against="the same, eager",
            **milliseconds(took["sdpa"], took["eager"]),
        )
