"""A training step of LoRA: against HF PEFT in a plain loop, with all prompts encoded anew, and on a cached prefix."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fedloom.adapters import Head, LoRA
from fedloom.assembly import KERNELS
from fedloom.backbones import Adaptable, Batch
from fedloom.backbones.adaptable import Kernels
from fedloom.backbones.devices import has_bf16
from fedloom.bench.lines import Line
from fedloom.bench.measuring import interleaved, milliseconds, products
from fedloom.bench.shapes import NAMES, Size, batch, clip, clip_module, normalised, prompts
from fedloom.places import Adapter
from fedloom.training import State, Training, step

BATCH = 8
LASTS: Mapping[Size, tuple[int, ...]] = {"small": (1,), "base": (1, 4)}  # blocks that take an adapter
CLASSES = 10
MANY = 100
GOALS = {("base", "bfloat16"): 3.0, ("small", "bfloat16"): 1.7}
WITHOUT_UNITS = 1.05
Step = Callable[[], object]


def lora_step(size: Size, repeats: int) -> Iterator[Line]:
    """Goal 1: the class prompts are encoded once by both."""
    given = batch(BATCH, candidates=prompts(CLASSES))
    asked = [(dtype, kernels) for dtype in dtypes() for kernels in (KERNELS[dtype], "short")]
    models = {(dtype, kernels): clip(size, dtype, cast(Kernels, kernels)) for dtype, kernels in asked}
    steps: dict[Hashable, Step] = {plan: own(model, given) for plan, model in models.items()}
    steps["peft"] = peft(size, given, encoded=True)
    steps |= {("floor", *plan): floor(model, given) for plan, model in models.items()}
    took = interleaved(steps, repeats)
    for dtype, kernels in asked:
        yield Line(
            "lora-step",
            f"LoRA step, {NAMES[size]}, {dtype}, {kernels}, batch {BATCH}",
            against="PEFT, plain loop, float32",
            goal=GOALS.get((size, dtype), None if has_bf16() else WITHOUT_UNITS),
            floor=1e3 * took["floor", dtype, kernels].minimum,
            **milliseconds(took[dtype, kernels], took["peft"]),
        )


def many_classes(size: Size, repeats: int) -> Iterator[Line]:
    """Goal 2: a hundred classes, whose prompts the peer encodes at each step, as CLIP does: filled up to 77 tokens."""
    given = batch(BATCH, candidates=prompts(MANY))
    models = {dtype: clip(size, dtype) for dtype in dtypes()}
    steps: dict[str, Step] = {dtype: own(model, given) for dtype, model in models.items()}
    steps["peft"] = peft(size, given, encoded=False)
    took = interleaved(steps, max(2, repeats // 2))
    for dtype in models:
        yield Line(
            "clip-classes",
            f"LoRA step of {MANY} classes, {NAMES[size]}, {dtype}, batch {BATCH}",
            against="PEFT, prompts encoded at each step, float32",
            goal={("base", "bfloat16"): 12.0, ("base", "float32"): 5.0}.get((size, dtype)),
            **milliseconds(took[dtype], took["peft"]),
        )


def prefix(size: Size, repeats: int) -> Iterator[Line]:
    """Goal 5: adapters in the last L of H blocks, and what the blocks below make of each image kept."""
    made = clip(size, dtypes()[-1])
    given = batch(BATCH, candidates=prompts(CLASSES))
    blocks = made.network.blocks
    steps: dict[str, Step] = {"all": own(made, given)}
    for last in LASTS[size]:
        kept = made.prefix([given], blocks - last)
        steps[str(last)] = own(made, Batch(given.targets, candidates=given.candidates, prefix=kept), LoRA(last=last))
    took = interleaved(steps, repeats)
    for last in LASTS[size]:
        yield Line(
            "prefix",
            f"LoRA step in the last {last} of {blocks} blocks, prefix cached, {NAMES[size]}, {dtypes()[-1]}",
            against="the same in all blocks",
            goal=0.9 * blocks / last,
            **milliseconds(took[str(last)], took["all"]),
        )


def dtypes() -> tuple[str, ...]:
    """Those in which the frozen weights are measured here."""
    return ("float32", "bfloat16") if has_bf16() else ("float32",)


def own(model: Adaptable, given: Batch, adapter: Adapter | None = None) -> Step:
    """A step of fedloom's; its state goes on from call to call."""
    put = adapter or LoRA()
    states = [State(model.init(put, 0))]

    def loss(tensors: Any) -> Tensor:
        scores = model(given, put, tensors).scores
        assert scores is not None  # the batch has candidates
        return F.cross_entropy(scores, given.targets)

    def run() -> None:
        states[0], _ = step(states[0], loss, Training())

    return run


def peft(size: Size, given: Batch, encoded: bool) -> Step:
    """The loop that one writes with PEFT: its adapters, torch's AdamW; prompts are encoded before it, or in it."""
    from peft import LoraConfig, get_peft_model

    aside = clip(size)
    network: Any = aside.network
    config = LoraConfig(r=8, lora_alpha=16, target_modules=r"vision_model.*\.(q_proj|v_proj)")
    tuned = get_peft_model(clip_module(size), config)
    optimiser = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    filled = {"padding": "max_length", "max_length": 77, "return_tensors": "pt"}
    tokens = network.tokenizer(list(given.candidates or ()), **filled)

    def texts() -> Tensor:
        with torch.no_grad():
            pooled = tuned.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output
            return F.normalize(pooled, dim=-1)

    kept = texts() if encoded else None

    def run() -> None:
        pixels = normalised(aside, given.images)  # type: ignore[arg-type]  # the batch has images
        images = F.normalize(tuned.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        logits = images @ (texts() if kept is None else kept).T * tuned.logit_scale.exp()
        loss = F.cross_entropy(logits, given.targets)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()

    return run


def floor(model: Adaptable, given: Batch) -> Step:
    """The products with the image tower's frozen matrices alone."""
    return products(model.network.module, lambda: model(given, Head(), {}))
