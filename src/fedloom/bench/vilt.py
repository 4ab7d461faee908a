"""A training step of bottleneck adapters in a ViLT, against the loop that one writes with forward hooks."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedloom.adapters import Bottleneck, Head
from fedloom.backbones import Adaptable, Batch
from fedloom.bench.lines import Line
from fedloom.bench.lora import BATCH, Step, dtypes
from fedloom.bench.measuring import interleaved, milliseconds, products
from fedloom.bench.shapes import VILT_NAMES, VILT_SIDE, Size, batch, normalised, vilt, vilt_module
from fedloom.training import State, Training, step


def vilt_step(size: Size, repeats: int) -> Iterator[Line]:
    """Both answer one of two, by the first two pooled features."""
    given = batch(BATCH, VILT_SIDE, texts=True)
    models = {dtype: vilt(size, dtype) for dtype in dtypes()}
    steps: dict[str, Step] = {dtype: own(made, given) for dtype, made in models.items()}
    steps["hooks"] = hooks(size, given)
    for dtype, made in models.items():
        steps[f"floor {dtype}"] = products(made.network.module, lambda made=made: made(given, Head(), {}))  # type: ignore[misc]
    took = interleaved(steps, max(2, repeats // 2))
    for dtype in models:
        yield Line(
            "vilt-step",
            f"bottleneck step, {VILT_NAMES[size]}, {dtype}, batch {BATCH}",
            against="torch, plain loop with hooks, float32",
            floor=1e3 * took[f"floor {dtype}"].minimum,
            **milliseconds(took[dtype], took["hooks"]),
        )


def own(model: Adaptable, given: Batch) -> Step:
    """A step of fedloom's."""
    adapter = Bottleneck()
    states = [State(model.init(adapter, 0))]

    def loss(tensors: Any) -> Tensor:
        return F.cross_entropy(model(given, adapter, tensors).pooled[:, :2], given.targets)

    def run() -> None:
        states[0], _ = step(states[0], loss, Training())

    return run


def hooks(size: Size, given: Batch) -> Step:
    """The same adapters as modules, in float32, with torch's AdamW; Hugging Face's own embeddings."""
    aside = vilt(size)
    network: Any = aside.network
    module = vilt_module(size).requires_grad_(False)
    width, hidden = module.config.hidden_size, Bottleneck().width
    added = [nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)) for _ in module.encoder.layer]
    for block, adapter in zip(module.encoder.layer, added, strict=True):
        block.output.register_forward_hook(lambda layer, args, out, adapter=adapter: out + adapter(out))
    optimiser = torch.optim.AdamW([p for adapter in added for p in adapter.parameters()], lr=1e-3, weight_decay=0.0)
    tokens = network.tokens.tokenizer(list(given.texts or ()), return_tensors="pt")

    def run() -> None:
        pixels = normalised(aside, given.images)  # type: ignore[arg-type]  # the batch has images
        states = module(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels)
        loss = F.cross_entropy(states.pooler_output[:, :2], given.targets)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()

    return run
