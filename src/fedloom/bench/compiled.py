"""A training step whose blocks torch has compiled, and how long that takes: why fedloom compiles nothing."""

import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from fedloom.bench.lines import Line
from fedloom.bench.lora import BATCH, CLASSES, dtypes, own
from fedloom.bench.measuring import interleaved, milliseconds
from fedloom.bench.shapes import NAMES, Size, batch, clip, prompts
from fedloom.errors import RunError


def compiled(size: Size, repeats: int) -> Iterator[Line]:
    """Each block of the image tower through torch.compile, for one form of batch; adapters are part of the graph."""
    from torch._dynamo import config as dynamo
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor import config

    given = batch(BATCH, candidates=prompts(CLASSES))
    for dtype in dtypes():
        torch.compiler.reset()  # or what was compiled before counts against the limit
        model = clip(size, dtype)
        network: Any = model.network
        for block in network.module.vision_model.encoder.layers:
            block.forward = torch.compile(block.forward, dynamic=False)
        steps = {"compiled": own(model, given), "plain": own(clip(size, dtype), given)}
        began = time.perf_counter()
        try:
            # Every block, and as on a machine that has compiled nothing yet, of which torch warns.
            every, anew = dynamo.patch(recompile_limit=model.network.blocks), config.patch(force_disable_caches=True)
            with every, anew, warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                steps["compiled"]()
        except BackendCompilerFailed as e:
            reason = str(e).strip().splitlines()[0]
            raise RunError(f"torch.compile failed ({reason}); it needs a C++ compiler: install g++.") from None
        took = time.perf_counter() - began
        step = f"LoRA step, {NAMES[size]}, {dtype}, blocks compiled, batch {BATCH}"
        turns = interleaved(steps, repeats)
        yield Line("compiled", step, against="not compiled", **milliseconds(turns["compiled"], turns["plain"]))
        yield Line("compiled", f"{step}: compiling, on the clock", took, "s")
