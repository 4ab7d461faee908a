"""Every row is the method that its paper describes, as it is built; and every baseline runs from a recipe: rounds,
fine-tuning, all views, resuming from what was written."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.adapters import IA3, Attention, BitFit, Bottleneck, Context, Everything, Head, LoRA, Norms, Prompt
from fedloom.backbones.adaptable import Adaptable
from fedloom.errors import RecipeError
from fedloom.methods import (
    Ensemble,
    FedAvg,
    FedDAT,
    FedDLP,
    FedExLoRA,
    FedOpt,
    FedPIA,
    FlexLoRA,
    FLoRA,
    Frozen,
    Local,
    Majority,
    Partial,
)
from fedloom.recipe import load
from fedloom.rows import ROWS
from fedloom.runs import run
from fedloom.site import Answer, Site, Update
from fedloom.tensors import Shared, of_model, squared_distance

BASELINES = (
    "ditto",
    "ensemble",
    "ensemble-distilled",
    "fedadam",
    "fedavg-ia3",
    "fedavg-norms",
    "fedavg-prompt",
    "fedclip",
    "feddat",
    "fedexlora",
    "fedsa-lora",
    "ffa-lora",
    "flexlora",
    "flora",
    "promptfl",
    "scaffold",
)

# FedAvg of this adapter, whose head are the classes' texts; rows of its own left out
BASE = replace(load("caltech-dirichlet"), compare={})
LOW = LoRA(rank=8)

# What each row is; what stands in no bracket is as the method's own default.
METHODS = {
    "ensemble-distilled": Ensemble(LOW, distil=True),  # FedDF: one adapter learns from all
    "fedadagrad": FedOpt(LOW, server="adagrad"),
    "fedadam": FedOpt(LOW, server="adam"),
    "fedavg-adapter": FedAvg(Bottleneck()),
    "fedavg-bitfit": FedAvg(BitFit()),
    "fedavg-head": FedAvg(Head(), heads="shared"),
    "fedavg-ia3": FedAvg(IA3()),
    "fedavg-lora": FedAvg(LOW),
    "fedavg-lora-r2": FedAvg(LoRA(rank=2)),
    "fedavg-lora-r2-untuned": FedAvg(LoRA(rank=2)),
    "fedavg-norms": FedAvg(Norms()),
    "fedavg-prompt": FedAvg(Prompt()),
    "fedavg-untuned": FedAvg(LOW),
    "fedavgm": FedOpt(LOW, server="momentum", eta=1.0, beta1=0.9),
    "fedclip": FedAvg(Attention()),
    "feddat-alone": FedDAT(LOW, exchange=False),
    "feddlp": FedDLP(LOW, rank=2, gamma=0.01, gamma_shared=0.1, predict_with="blend"),
    "feddlp-alone": FedDLP(LOW, gamma=0.0, gamma_shared=0.0, predict_with="local"),
    "feddlp-global": FedDLP(LOW, predict_with="global"),
    "feddlp-local": FedDLP(LOW, predict_with="local"),
    "feddlp-no-distillation": FedDLP(LOW, gamma=0.0, gamma_shared=0.0),
    "feddlp-no-pruning": FedDLP(LOW, pruning=None),
    "feddlp-one-way": FedDLP(LOW, gamma_shared=0.0),
    "fedexlora": FedExLoRA(LOW),
    "fedpia-client": FedPIA(LOW, permute="client"),
    "fedpia-literal": FedPIA(LOW, permute="both", integration="literal", scale="one", gamma=1e-3),
    "fedpia-server": FedPIA(LOW, permute="server"),
    "fedpia-unpermuted": FedPIA(LOW, permute="neither"),
    "fedprox": FedAvg(LOW, mu=0.1),
    "fedsa-lora": Partial(LOW, frozen=(), kept=("B",)),  # A is averaged, B is the site's own
    "fedyogi": FedOpt(LOW, server="yogi"),
    "ffa-lora": Partial(LOW, frozen=("A",), kept=()),  # A stays as it was drawn, B is averaged
    "flexlora": FlexLoRA(LOW),
    "flora": FLoRA(LOW),
    "frozen": Frozen(),
    "full": FedAvg(Everything()),
    "hlora": FlexLoRA(LOW),
    "linear-probe": FedAvg(Head(), heads="private"),
    "local-adapter": Local(Bottleneck()),
    "local-lora": Local(LOW),
    "majority": Majority(),
    "promptfl": FedAvg(Context()),
}

# And what it changes besides its method.
BESIDES: dict[str, dict[str, Any]] = {
    "fedavg-head": {"task.head": "linear"},
    "fedavg-lora-r2-untuned": {"training.finetune": 0},
    "fedavg-untuned": {"training.finetune": 0},
    "frozen": {"federation.rounds": 1},
    "linear-probe": {"task.head": "linear"},
    "majority": {"federation.rounds": 1},
    "promptfl": {"backbone.towers": ("text",), "task.template": "X X X X {}."},  # CoOp: words before the class names
}

# The last part of every tensor's name that is trained and averaged.
BOTTLENECK = {"block/down", "block/down_bias", "block/up", "block/up_bias"}
SENT = {
    "fedavg-adapter": BOTTLENECK,
    "fedavg-head": {"head/weight", "head/bias"},
    "fedavg-ia3": {"k_proj/l", "v_proj/l", "fc1/l"},  # keys, values, and between the two layers of the feed-forward
    "fedavg-lora": {"q_proj/A", "q_proj/B", "v_proj/A", "v_proj/B"},
    "fedavg-prompt": {"block/tokens"},
    "fedclip": {"features/W1", "features/b1", "features/W2", "features/b2"},  # above the image tower
    "fedsa-lora": {"q_proj/A", "v_proj/A"},
    "ffa-lora": {"q_proj/B", "v_proj/B"},
    "linear-probe": set[str](),
    "local-lora": set[str](),
    "promptfl": {"words/tokens"},
}


def sent(row: str, network: Callable[..., Any]) -> dict[str, torch.Tensor]:
    """What a row's sites train and send."""
    own = BASE.row(row)
    model = Adaptable(network(towers=own.backbone.towers or ("vision",)))
    started = own.method.start(model, own.task, 2, 0)
    return {name: tensor for name, tensor in of_model(started).items() if not name.startswith("given/")}


def test_every_row_is_the_method_of_its_paper() -> None:
    assert {row: BASE.row(row).method for row in ROWS} == METHODS


@pytest.mark.parametrize("row", ROWS)
def test_a_row_changes_nothing_else_but_what_it_says(row: str) -> None:
    own, said = BASE.row(row), BESIDES.get(row, {})
    assert {key for key in BASE.difference(own) if not key.startswith("method.")} == said.keys()
    for key, value in said.items():
        section, name = key.split(".")
        assert getattr(getattr(own, section), name) == value


def test_promptfl_is_of_class_names() -> None:
    assert BASE.altered({"task.head": "linear"}).row("promptfl").table()["task"]["head"] == "prompts"
    with pytest.raises(RecipeError, match=r"row 'promptfl'"):
        load("vqamed-organ").row("promptfl")


@pytest.mark.parametrize("row", SENT)
def test_a_row_sends_what_its_paper_trains(row: str, network: Callable[..., Any]) -> None:
    names = sent(row, network)
    assert {"/".join(name.replace(".", "/").split("/")[-2:]) for name in names} == SENT[row]
    tower = {"promptfl": "text", "fedavg-head": "head"}.get(row, "vision")
    assert all(name.startswith(tower) for name in names)


def test_biases_norms_and_everything_are_those_of_the_image_tower(network: Callable[..., Any]) -> None:
    biases, norms, everything = (set(sent(row, network)) for row in ("fedavg-bitfit", "fedavg-norms", "full"))
    assert all(name.endswith("/bias") for name in biases)
    assert all("norm" in name or "layrnorm" in name for name in norms)
    assert {name.rpartition("/")[2] for name in norms} == {"weight", "bias"}
    assert biases | norms < everything
    assert {name for name in everything if name.endswith("/bias")} == biases
    own = {name for name, _ in network().module.named_parameters()}
    tower = {name for name in own if name.startswith(("vision_model.", "visual_projection."))}
    assert {name.replace("/", ".") for name in everything} == tower


# Two rounds of the server's rule by hand: sites move from 0 by 1, then from there by 0.5.
# m = 0.1, then 0.9 · 0.1 + 0.1 · 0.5 = 0.14; momentum has m = 1, then 0.9 + 0.5
TAU = 1e-3
ADAM = (0.99 * TAU**2 + 0.01, 0.99 * (0.99 * TAU**2 + 0.01) + 0.01 * 0.25)
YOGI = (TAU**2 + 0.01, TAU**2 + 0.01 + 0.01 * 0.25)  # v is below Δ² both times
GRAD = (TAU**2 + 1, TAU**2 + 1.25)
RULES = {
    "fedadagrad": (0.01 * 0.1 / (GRAD[0] ** 0.5 + TAU), 0.01 * 0.14 / (GRAD[1] ** 0.5 + TAU)),
    "fedadam": (0.01 * 0.1 / (ADAM[0] ** 0.5 + TAU), 0.01 * 0.14 / (ADAM[1] ** 0.5 + TAU)),
    "fedyogi": (0.01 * 0.1 / (YOGI[0] ** 0.5 + TAU), 0.01 * 0.14 / (YOGI[1] ** 0.5 + TAU)),
    "fedavgm": (1.0, 1.4),
    "fedprox": (1.0, 0.5),  # its server is FedAvg's
}


@pytest.mark.parametrize("row", RULES)
def test_the_server_of_a_row_steps_as_its_paper_says(row: str, network: Callable[..., Any]) -> None:
    own = BASE.row(row)
    shared = own.method.start(Adaptable(network()), own.task, 2, 0)
    for moved, step in zip((1.0, 0.5), RULES[row], strict=True):
        before = of_model(shared)
        answers = [
            Answer(str(weight), Update(Shared({name: t + moved for name, t in before.items()}), weight, 1))
            for weight in (1.0, 3.0)
        ]
        shared, _ = own.method.aggregate(shared, answers)
        for name, tensor in of_model(shared).items():
            torch.testing.assert_close(tensor - before[name], torch.full_like(tensor, step), rtol=1e-4, atol=1e-6)


def test_fedprox_holds_its_sites_to_what_they_were_sent(site: Callable[..., Site]) -> None:
    oxford, moved = site(), {}
    for row, mu in (("fedavg-lora", None), ("fedprox", None), ("fedprox", 100.0)):
        method = BASE.row(row).method
        method = method if mu is None else replace(method, mu=mu)
        shared = method.start(oxford.model, oxford.task, 1, 3)
        update, _ = method.local_round(0, oxford, shared, {})
        moved[row, mu] = float(squared_distance(update.tensors, shared))
    assert moved["fedprox", 100.0] < moved["fedprox", None] < moved["fedavg-lora", None]


@pytest.mark.slow
@pytest.mark.parametrize("row", BASELINES)
def test_a_baseline_runs_and_goes_on(recipe: Path, tmp_path: Path, row: str) -> None:
    changes = {"federation.rounds": 1, "reference.rows": [], "data.newcomer": 1}
    chosen = load(recipe, changes).row(row)
    folder = tmp_path / "run"
    run(chosen, folder)
    done = run(chosen.altered({"federation.rounds": 2}), folder, resume=True)
    views = done.summary["views"]
    assert done.summary["rounds"] == 2
    for view in ("personal", "newcomer"):
        values = [site["value"] for site in views[view]["sites"].values()]
        assert values
        assert all(math.isfinite(value) for value in values)
