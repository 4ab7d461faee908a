"""Figure 2 of the FedDLP paper: sites that train alone, with a plain LoRA and with one whose ranks are pruned by gates.

The paper shows, on Flowers102, a LoRA that gets worse as training goes on and a SoRA that does not. Here both train
from one start on the same batches, and are looked at every few rounds. Who has Flowers102 takes it: `fedloom study
sora-overfitting --set data.source=flowers:FOLDER`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from fedloom.adapters import LoRA
from fedloom.errors import RecipeError
from fedloom.methods.feddlp import LAYERS, FedDLP
from fedloom.pruning import Pruning
from fedloom.studies.setting import ACCURACY, TEST_LOSS, Sites, gathered, measured
from fedloom.studies.study import Options, Part, Result, Row, verdict
from fedloom.tensors import Private

QUESTION = "Does a LoRA overfit at a site that trains alone, and do gates prevent it?"
RECIPE = "caltech-dirichlet"
SITES, ROUNDS, EVERY = 4, 40, 4
CHANGES = {
    "backbone.towers": ["vision"],
    "training.finetune": 0,
    "data.newcomer": 0,
    "training.lr": 1e-3,  # at the recipe's, for q and v alone, a LoRA of all linear layers hardly learns
}
RANK = 2
SLOW = replace(FedDLP.official().pruning or Pruning(), lr=1e-3)
WAYS: Mapping[str, tuple[Pruning | None, Literal["ones", "normal"]]] = {
    "LoRA": (None, "ones"),
    "SoRA, as published": (SLOW, "normal"),
    "SoRA, gates from one, λ = 0.0095": (Pruning(sparsity=9.5e-3, rank=None, schedule="constant"), "ones"),
}
TRAIN_LOSS, FITTED, ALIVE = "training loss", "training accuracy, %", "ranks alive"
LORA = "LoRA"


def study(options: Options) -> Result:
    """The study: its figures, and what they say."""
    rows = [row for seed in options.drawn() for row in over_rounds(options, seed)]
    part = Part(
        "Over rounds", ("adapter", "round"), (ACCURACY, TEST_LOSS, FITTED, TRAIN_LOSS, ALIVE), tuple(rows), "round"
    )
    of = (
        f"clip-small on pack:caltech, Dirichlet 0.1 (recipe {RECIPE}), the first {SITES} of ten sites; rank {RANK} at "
        f"{', '.join(LAYERS)} of the image tower; {ROUNDS} rounds of one epoch without any "
        f"communication; published: gates from N(0, 1), which step by {SLOW.lr:g} here, λ = {SLOW.sparsity:g}; the "
        "other's gates step by 0.01, and its λ is the one of 0.008 and 0.0095 under which more ranks die, at seed 100"
    )
    return Result("sora-overfitting", QUESTION, of, options.drawn(), (part,), tuple(found(part)))


def over_rounds(options: Options, seed: int) -> list[Row]:
    """Each way on the same sites, looked at every few rounds."""
    sites, adapter = gathered(options, seed, CHANGES, SITES, RECIPE)
    if not isinstance(adapter, LoRA):
        raise RecipeError("this study is of low-rank adapters; set [method.adapter] kind = 'lora'.")
    rows: list[Row] = []
    for way, (pruning, gates) in WAYS.items():
        own = replace(adapter, rank=RANK, targets=LAYERS, start_gate=gates)
        # Without distillation the local branch, which alone predicts, hears nothing of the shared one.
        method = FedDLP(own, rank=1, gamma=0.0, gamma_shared=0.0, pruning=pruning, predict_with="local")
        for i, after in enumerate(sites.rounds(method, ROUNDS)):
            if (i + 1) % EVERY == 0:
                figures = looked_at(sites, method, after.privates)
                rows.append({"adapter": way, "round": i + 1, "seed": seed, **figures, ALIVE: after.told["rank"]})
    return rows


def looked_at(sites: Sites, method: FedDLP, privates: Mapping[str, Private]) -> dict[str, float]:
    """Loss and accuracy on test and training images, the mean over sites."""
    every: dict[str, list[float]] = {ACCURACY: [], TEST_LOSS: [], FITTED: [], TRAIN_LOSS: []}
    shared = sites.start(method)
    for name, own in sites.participants.items():
        for split, accuracy, loss in (("test", ACCURACY, TEST_LOSS), ("train", FITTED, TRAIN_LOSS)):
            values = measured(method, own.site, privates[name], shared, own.split(split))
            every[accuracy].append(values["accuracy"])
            every[loss].append(values["loss"])
    return {figure: sum(values) / len(values) for figure, values in every.items()}


def found(part: Part) -> list[str]:
    """What the figures say, in sentences."""
    told = []
    for way in WAYS:
        curve = {r: part.mean(ACCURACY, adapter=way, round=r) for r in range(EVERY, ROUNDS + 1, EVERY)}
        losses = {r: part.mean(TEST_LOSS, adapter=way, round=r) for r in curve}
        best, least = max(curve, key=lambda r: curve[r]), min(losses, key=lambda r: losses[r])
        told.append(
            f"{way}: the best test accuracy is {curve[best]:.1f} % after {best} rounds, the last {curve[ROUNDS]:.1f} %"
            f"; the least test loss is {losses[least]:.2f} after {least} rounds, the last {losses[ROUNDS]:.2f}."
        )
        last = part.compared(ACCURACY, {"adapter": way, "round": ROUNDS}, {"adapter": way, "round": best})
        told.append(verdict(f"{way}: {ACCURACY}", f"after {ROUNDS} rounds", f"after {best}", last))
        alive = part.mean(ALIVE, adapter=way, round=ROUNDS)
        told.append(f"{way}: of {RANK} ranks a layer {alive:.2f} are alive after {ROUNDS} rounds.")
    for way in list(WAYS)[1:]:
        for figure in (ACCURACY, TEST_LOSS, FITTED):
            difference = part.compared(figure, {"adapter": way, "round": ROUNDS}, {"adapter": LORA, "round": ROUNDS})
            told.append(verdict(f"After {ROUNDS} rounds: {figure}", f"[{way}]", f"[{LORA}]", difference))
    return told
