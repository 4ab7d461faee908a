"""A backbone elsewhere: the same bits, and all that is outside of it on the CPU."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from elsewhere import ELSEWHERE, Elsewhere, Held
from torch import Tensor

from fedloom import backbones
from fedloom.adapters import IA3, Bottleneck, Everything, LoRA, Norms, Prompt
from fedloom.assembly import alone, planned
from fedloom.backbones import Adaptable, Batch, devices
from fedloom.errors import BackboneError, RecipeError
from fedloom.export.fingerprint import picture
from fedloom.places import Adapter
from fedloom.recipe import load
from fedloom.runs import Run, run
from fedloom.tensors import same

ADAPTERS = (Bottleneck(4), LoRA(2), IA3(), Norms(), Everything(), Prompt(2))


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a device that is there for one test."""
    monkeypatch.setattr(devices, "available", lambda: ("cpu", str(ELSEWHERE)))
    before = torch.are_deterministic_algorithms_enabled()
    torch.__future__.set_swap_module_params_on_conversion(True)  # so that tied weights stay so, as on an accelerator
    with Elsewhere():
        yield str(ELSEWHERE)
    torch.__future__.set_swap_module_params_on_conversion(False)
    torch.use_deterministic_algorithms(before)
    torch.backends.cudnn.allow_tf32 = True


def examples(name: str, model: Adaptable) -> Batch:
    texts = ("which organ?", "is there anything abnormal in the image?")
    if name == "text-small":
        return Batch(torch.zeros(2), texts=texts)
    images = torch.stack([model.network.decode(picture(i)) for i in range(2)])
    candidates = {"clip-small": ("a photo of a cat.", "a dog"), "albef-small": ("brain", "left lung")}.get(name)
    return Batch(torch.zeros(2), images, None if name == "clip-small" else texts, candidates)


def answers(model: Adaptable, batch: Batch, adapter: Adapter) -> tuple[Tensor, ...]:
    """Features and gradients of all that is trained."""
    free = {name: (t + 0.01).requires_grad_() for name, t in model.init(adapter, 0).items()}
    made = model(batch, adapter, free)
    features = (made.pooled,) if made.scores is None else (made.pooled, made.scores)
    loss = torch.stack([part.square().sum() for part in features]).sum()
    slopes = torch.autograd.grad(loss, list(free.values()), allow_unused=True)
    return *features, *(slope for slope in slopes if slope is not None)


def equal(here: tuple[Tensor, ...], there: tuple[Tensor, ...]) -> None:
    assert len(here) == len(there) > 1
    assert not any(isinstance(tensor, Held) for tensor in there)
    assert all(map(torch.equal, here, there))


@pytest.mark.parametrize("name", ["albef-small", "clip-small", "text-small", "vilt-small"])
def test_every_backbone_computes_elsewhere(name: str, elsewhere: str) -> None:
    here = backbones.load(name, attention="eager")
    there = backbones.load(name, attention="eager", device=devices.device(elsewhere))
    assert all(isinstance(parameter, Held) for parameter in there.network.module.parameters())
    batch = examples(name, here)
    for adapter in ADAPTERS if here.network.sequences else ADAPTERS[:-1]:
        equal(answers(here, batch, adapter), answers(there, batch, adapter))
    adapter = LoRA(2)
    tensors = here.init(adapter, 0)
    for kernels in ("fused", "short"):
        here.use(kernels)
        there.use(kernels)
        equal(answers(here, batch, adapter), answers(there, batch, adapter))
    for one, other in zip(here.inputs(batch, adapter, tensors), there.inputs(batch, adapter, tensors), strict=True):
        assert one[0] == other[0]
        equal(one[1:], other[1:])
    kept = [model.prefix([batch], 1) for model in (here, there)]
    assert same(*kept)
    shorter = replace(batch, prefix=kept[1], images=None if name == "clip-small" else batch.images)
    equal(answers(here, shorter, adapter), answers(there, shorter, adapter))
    pair = [(batch, adapter, tensors), (batch, adapter, here.init(adapter, 1))]
    for one, other in zip(here.together(pair), there.together(pair), strict=True):
        assert torch.equal(one.pooled, other.pooled)


@pytest.mark.parametrize("row", ["fedpia", "feddlp", "full", "fedclip", "ensemble-distilled"])
def test_a_run_elsewhere_leaves_the_same_bits(row: str, recipe: Path, tmp_path: Path, elsewhere: str) -> None:
    asked = load(recipe, {"reference.rows": [], "data.newcomer": 1, "backbone.attention": "eager"}).row(row)
    asked = asked.altered({"method.probe": 4} if row == "fedpia" else {})
    here = run(asked, tmp_path / "here")
    there = run(asked.altered({"backbone.device": elsewhere}), tmp_path / "there")
    assert same(here.shared, there.shared)
    assert all(same(here.private(site), there.private(site)) for site in here.sites)
    assert here.summary["views"] == there.summary["views"]
    for name, made in (("cpu", here), (elsewhere, there)):
        assert f", {name} of " in made.summary["lineage"]["plan"]
    assert Run(there.folder, device="cpu").evaluate() == there.evaluate() == here.evaluate()


def test_sites_grouped_and_cached_elsewhere(
    recipe: Path, tmp_path: Path, elsewhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"reference.rows": [], "backbone.attention": "eager", "federation.group": 3, "backbone.cache": True}
    changes["method.adapter.last"] = 1
    work = threading.Thread.run

    def within(thread: threading.Thread) -> None:
        with Elsewhere():  # a mode is one thread's
            work(thread)

    monkeypatch.setattr(threading.Thread, "run", within)
    here = run(load(recipe, changes), tmp_path / "here")
    there = run(load(recipe, {**changes, "backbone.device": elsewhere}), tmp_path / "there")
    for name, tensor in here.shared.items():  # a batched product takes another path elsewhere
        torch.testing.assert_close(there.shared[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_device_that_is_not_there(recipe: Path, fedloom: Callable[..., Any]) -> None:
    for name in ("cuda", "cuda:7", "nonsense", "1"):
        with pytest.raises(BackboneError, match=rf"there is no device '{name}' here: torch .* finds cpu\."):
            devices.device(name)
    assert fedloom("run", recipe, "--set", "backbone.device=cuda")[0] == 2
    done = run(load(recipe, {"reference.rows": []}), recipe.with_name("run"))
    assert fedloom("evaluate", done.folder, "--device", "cuda")[0] == 2
    assert fedloom("evaluate", done.folder, "--device", "cpu")[0] == 0


def test_workers_are_of_the_cpu(recipe: Path, tmp_path: Path, elsewhere: str) -> None:
    asked = load(recipe, {"federation.workers": 2, "backbone.device": elsewhere})
    with pytest.raises(RecipeError, match=r"workers share a backbone on the CPU alone, and .* device is 'lazy'"):
        run(asked, tmp_path / "run")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_auto_stands_for_the_attention_whose_bits_are_the_same_each_time(recipe: Path, dtype: str) -> None:
    asked = load(recipe, {"backbone.device": "cuda", "backbone.dtype": dtype})
    assert planned(asked).backbone.attention == "eager"
    assert planned(asked.altered({"backbone.attention": "sdpa"})).backbone.attention == "sdpa"


def test_workers_mean_nothing_to_a_site_where_its_data_are(recipe: Path, elsewhere: str) -> None:
    asked = planned(load(recipe, {"federation.workers": 2, "backbone.device": elsewhere}))
    assert len(alone(asked, "oslo", asked.parts[""]).site) > 0


def test_what_ran_on_the_cpu_keeps_its_id(recipe: Path) -> None:
    asked = load(recipe)
    assert asked.altered({"backbone.device": "cpu"}).id == asked.id
    assert asked.altered({"backbone.device": "cuda"}).id != asked.id
