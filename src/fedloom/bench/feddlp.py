"""A batch of FedDLP, both branches: against PEFT with two adapters, in the schedules that one would write."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedloom.backbones import Adaptable, Batch
from fedloom.bench.lines import Line
from fedloom.bench.lora import BATCH, CLASSES, Step, dtypes, floor
from fedloom.bench.measuring import interleaved, milliseconds
from fedloom.bench.shapes import NAMES, Size, batch, clip, clip_module, normalised, prompts
from fedloom.data import Dataset
from fedloom.distillation import divergence
from fedloom.methods import FedDLP
from fedloom.site import Site
from fedloom.tasks import Classification
from fedloom.training import State, Training

GOALS = {"two passes": 3.0, "four forwards": 4.5}  # base, bfloat16


def feddlp_step(size: Size, repeats: int) -> Iterator[Line]:
    """Goal 3. One pass is the joint schedule's; the peers' two passes are the same arithmetic, four forwards are the
    alternating schedule."""
    given = batch(BATCH, candidates=prompts(CLASSES))
    models = {dtype: clip(size, dtype) for dtype in dtypes()}
    steps: dict[str, Step] = {dtype: own(made, given, FedDLP(schedule="joint")) for dtype, made in models.items()}
    last = dtypes()[-1]
    steps["alternating"] = own(models[last], given, FedDLP(reuse=True))
    steps |= {"two passes": peft(size, given, joint=True), "four forwards": peft(size, given, joint=False)}
    steps |= {f"floor {dtype}": floor(clip(size, dtype, "short"), given) for dtype in models}
    took = interleaved(steps, repeats)
    asked = [(dtype, peer) for dtype in models for peer in GOALS] + [("alternating", "four forwards")]
    for name, peer in asked:
        alternating = name == "alternating"
        dtype = last if alternating else name
        least = {"float32": 1.0, "bfloat16": GOALS[peer]}[dtype] if size == "base" and not alternating else None
        yield Line(
            "feddlp-step",
            f"FedDLP batch, {'alternating, three forwards' if alternating else 'joint, one pass'}, "
            f"{NAMES[size]}, {dtype}, batch {BATCH}",
            against=f"PEFT, {peer}, float32",
            goal=least,
            floor=None if alternating else 2e3 * took[f"floor {dtype}"].minimum,  # of two branches
            **milliseconds(took[name], took[peer]),
        )


def own(model: Adaptable, given: Batch, method: FedDLP) -> Step:
    """Both steps of a batch, as the method makes them."""
    task = Classification(tuple(str(i) for i in range(CLASSES)))
    site = Site("bench", model, task, Dataset(()), Dataset(()), Training(), 0)
    states = [State(model.init(method.local, 0)), State(model.init(method.shared, 1))]

    def run() -> None:
        states[:] = method._steps(0, site, given, states[0], states[1])[:2]

    return run


def peft(size: Size, given: Batch, joint: bool) -> Step:
    """Two adapters in one PEFT model. Joint: both with gradients, one backward pass through either; else, as the
    authors' program: each branch learns from a forward pass of the other made for it, one after the other."""
    from peft import LoraConfig, get_peft_model

    aside = clip(size)
    network: Any = aside.network
    targets = r"vision_model.*\.(q_proj|v_proj)"
    tuned: Any = get_peft_model(clip_module(size), LoraConfig(r=4, lora_alpha=16, target_modules=targets), "local")
    tuned.add_adapter("shared", LoraConfig(r=2, lora_alpha=16, target_modules=targets))
    method = FedDLP()
    both = {
        name: [p for key, p in tuned.named_parameters() if "lora_" in key and f".{name}." in key]
        for name in ("local", "shared")
    }
    optimisers = {name: torch.optim.AdamW(own, lr=1e-3, weight_decay=0.0) for name, own in both.items()}
    with torch.no_grad():
        texts = F.normalize(network._text(given.candidates), dim=-1)

    def logits(name: str) -> Tensor:
        tuned.set_adapter(name)
        for parameter in (*both["local"], *both["shared"]):  # which set_adapter takes from the other one
            parameter.requires_grad_()
        pixels = normalised(aside, given.images)  # type: ignore[arg-type]  # the batch has images
        images = F.normalize(tuned.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        return images @ texts.T * tuned.logit_scale.exp()  # type: ignore[no-any-return]

    def loss(student: Tensor, teacher: Tensor, gamma: float) -> Tensor:
        return F.cross_entropy(student, given.targets) + gamma * divergence(student, teacher, method.temperature)

    def at_once() -> None:
        mine, ours = logits("local"), logits("shared")
        for optimiser in optimisers.values():
            optimiser.zero_grad()
        (loss(mine, ours, method.gamma) + loss(ours, mine, method.gamma_shared)).backward()  # type: ignore[no-untyped-call]
        for optimiser in optimisers.values():
            optimiser.step()

    def in_turn() -> None:
        for name, other, gamma in (("local", "shared", method.gamma), ("shared", "local", method.gamma_shared)):
            with torch.no_grad():
                teacher = logits(other)
            value = loss(logits(name), teacher, gamma)
            optimisers[name].zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            optimisers[name].step()

    chosen: Callable[[], object] = at_once if joint else in_turn
    return chosen
