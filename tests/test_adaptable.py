"""A frozen model under adapters from outside, held against HF PEFT and against the same model with its weights set."""

import copy
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedloom.adapters import BitFit, Bottleneck, Everything, Head, LoRA, Norms, Sum
from fedloom.backbones import Adaptable, Batch
from fedloom.backbones.clip import CLIP
from fedloom.errors import AdapterError
from fedloom.places import Adapter
from fedloom.tensors import generator

BOTH = ("vision", "text")
PROMPTS = ("a photo of a cat.", "a photo of a dog.", "the small bird sings")
LINEAR = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "projection")
TARGETS = torch.tensor([0, 2, 1, 1])

Network = Callable[..., CLIP]


@pytest.fixture
def batch(images: Callable[..., Tensor]) -> Batch:
    return Batch(targets=TARGETS, images=images(4), candidates=PROMPTS)


def drawn(model: Adaptable, adapter: Adapter, std: float = 0.1) -> dict[str, Tensor]:
    """Tensors of an adapter's shapes, a little off their start, so that nothing is zero."""
    rng = generator("drawn")
    return {name: t + std * torch.randn(t.shape, generator=rng) for name, t in model.init(adapter, 1).items()}


def scores(model: Adaptable, batch: Batch, adapter: Adapter, tensors: dict[str, Tensor]) -> Tensor:
    found = model(batch, adapter, tensors).scores
    assert found is not None
    return found


def gradients(model: Adaptable, batch: Batch, adapter: Adapter, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    loss = F.cross_entropy(scores(model, batch, adapter, leaves), batch.targets)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), strict=True))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT
def test_lora_is_hugging_face_peft_s(network: Network, batch: Batch) -> None:
    from peft import LoraConfig, get_peft_model

    ours = Adaptable(network(towers=BOTH))
    adapter = LoRA(rank=3, alpha=5.0, targets=LINEAR)
    tensors = drawn(ours, adapter)
    plain = network()
    targets = r".*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)|visual_projection|text_projection"
    theirs = get_peft_model(plain.module, LoraConfig(r=3, lora_alpha=5, lora_dropout=0.0, target_modules=targets))
    modules = {name: module for name, module in theirs.named_modules() if hasattr(module, "lora_A")}
    assert len(modules) == len(tensors) / 2
    factors: dict[str, Tensor] = {}
    for name, module in modules.items():
        place = _place(name)
        for leaf, layer in (("A", module.lora_A["default"]), ("B", module.lora_B["default"])):
            layer.weight.data.copy_(tensors[f"{place}/{leaf}"])
            factors[f"{place}/{leaf}"] = layer.weight
    pixels = (batch.images / 255 - plain._mean) / plain._std  # type: ignore[operator]
    tokens = plain.tokenizer(list(PROMPTS), padding="longest", return_tensors="pt")
    logits = theirs(pixel_values=pixels, **tokens).logits_per_image
    torch.testing.assert_close(scores(ours, batch, adapter, tensors), logits, rtol=1e-5, atol=1e-5)
    assert not torch.equal(logits, scores(ours, batch, Head(), {}))
    theirs_g = torch.autograd.grad(F.cross_entropy(logits, TARGETS), list(factors.values()))
    ours_g = gradients(ours, batch, adapter, tensors)
    for name, gradient in zip(factors, theirs_g, strict=True):
        largest = float(gradient.abs().max())
        assert largest > 0
        # Sums in another order: what is small beside the largest entry is off by as much as that one.
        torch.testing.assert_close(ours_g[name], gradient, rtol=0, atol=1e-4 * largest)


def _place(path: str) -> str:
    parts = path.removeprefix("base_model.model.").split(".")
    if len(parts) == 1:
        return {"visual_projection": "vision.top.projection", "text_projection": "text.top.projection"}[parts[0]]
    return f"{parts[0].partition('_')[0]}.{parts[parts.index('layers') + 1]}.{parts[-1]}"


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize(
    "adapter", [LoRA(rank=2, targets=LINEAR), Bottleneck(3), Sum(LoRA(rank=2), Bottleneck(3))], ids=str
)
def test_checkpointing_keeps_the_adapter_and_its_gradients(
    network: Network, batch: Batch, family: str, adapter: Adapter
) -> None:
    plain, checkpointed = (Adaptable(network(family, BOTH), checkpointing) for checkpointing in (False, True))
    tensors = drawn(plain, adapter)
    assert torch.equal(scores(checkpointed, batch, adapter, tensors), scores(plain, batch, adapter, tensors))
    expected = gradients(plain, batch, adapter, tensors)
    for name, gradient in gradients(checkpointed, batch, adapter, tensors).items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)


def test_checkpointing_really_recomputes(network: Network, batch: Batch) -> None:
    calls = []
    model = Adaptable(network(), checkpointing=True)
    model.network.module.vision_model.encoder.layers[0].mlp.fc1.register_forward_hook(lambda *_: calls.append(1))
    gradients(model, batch, LoRA(), drawn(model, LoRA()))
    assert len(calls) == 2


def test_another_adapter_between_forward_and_backward_changes_no_gradient(model: Adaptable, batch: Batch) -> None:
    """The trap of adapters that are switched inside the model: PEFT's set_adapter zeroes the first one's gradients."""
    a, b = LoRA(rank=2), Bottleneck(3)
    one, two = drawn(model, a), drawn(model, b)
    expected = gradients(model, batch, a, one)
    leaves = {name: tensor.requires_grad_() for name, tensor in one.items()}
    loss = F.cross_entropy(scores(model, batch, a, leaves), TARGETS)
    scores(model, batch, b, two)
    for name, gradient in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        assert torch.equal(gradient, expected[name])


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("towers", [("vision",), ("text",), BOTH], ids=str)
@pytest.mark.parametrize("adapter", [Everything(), BitFit(), Norms()], ids=str)
def test_replaced_parameters_are_those_of_a_model_with_its_weights_set(
    network: Network, batch: Batch, family: str, towers: tuple[str, ...], adapter: Adapter
) -> None:
    model = Adaptable(network(family, towers))
    tensors = drawn(model, adapter, std=0.02)
    before = copy.deepcopy(model.network.module.state_dict())
    replaced = scores(model, batch, adapter, tensors)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.network.module.state_dict().items())
    expected_g = gradients(model, batch, adapter, tensors)
    other = network(family, towers)
    parameters = dict(other.module.named_parameters())
    for name, tensor in tensors.items():
        parameters[name.replace("/", ".")].data.copy_(tensor)
    theirs = other.features(batch, live=BOTH).scores
    assert theirs is not None
    torch.testing.assert_close(replaced, theirs, rtol=1e-5, atol=1e-5)  # not to the bit: memory lies elsewhere
    assert not torch.equal(replaced, scores(model, batch, Head(), {}))
    their_parameters = [parameters[name.replace("/", ".")].requires_grad_() for name in tensors]
    loss = F.cross_entropy(other.features(batch, live=BOTH).scores, TARGETS)  # type: ignore[arg-type]
    for name, gradient in zip(tensors, torch.autograd.grad(loss, their_parameters, allow_unused=True), strict=True):
        if gradient is None:
            assert expected_g[name] is None
        else:
            torch.testing.assert_close(expected_g[name], gradient)


def test_replaced_parameters_are_of_the_adapted_towers_alone(network: Network) -> None:
    model = Adaptable(network(towers=("vision",)))
    names = model.init(Everything(), 0)
    assert {name.split(".")[0].split("/")[0] for name in names} == {"vision_model", "visual_projection"}
    parameters = dict(model.network.module.named_parameters())
    assert len(names) == sum(name.startswith(("vision_model", "visual_projection")) for name in parameters)
    assert all(torch.equal(tensor, parameters[name.replace("/", ".")]) for name, tensor in names.items())
    names["visual_projection/weight"].zero_()
    assert parameters["visual_projection.weight"].any()  # a copy


def test_an_adapter_of_another_backbone_or_tower_is_refused_by_name(
    model: Adaptable, network: Network, batch: Batch
) -> None:
    tensors = drawn(model, LoRA())
    for name in ("vision.12.q_proj", "text.0.q_proj", "joint.0.q_proj"):
        with pytest.raises(AdapterError, match=rf"'{name}'.*no such place.*vision.0.*of another backbone or tower"):
            model(batch, LoRA(), {**tensors, f"{name}/A": torch.zeros(8, 32)})
    for name in ("vision_model.encoder.layers.9.layer_norm1/weight", "text_model.final_layer_norm/weight"):
        with pytest.raises(AdapterError, match=rf"'{name}'.*no such parameter.*another backbone or tower"):
            model(batch, Norms(), {name: torch.zeros(32)})
    assert torch.equal(scores(model, batch, Head(), {}), network().features(batch, live=()).scores)


def test_an_adapter_that_finds_nothing_to_train_is_refused(network: Network) -> None:
    class Nothing:
        def takes(self, module: Any, leaf: str) -> bool:
            return False

    with pytest.raises(AdapterError, match="finds no parameter"):
        Adaptable(network()).init(Nothing(), 0)
    with pytest.raises(AdapterError, match=r"'q_prj'.*finds no place"):
        Adaptable(network()).init(LoRA(targets=("q_prj",)), 0)
    assert Adaptable(network()).init(Head(), 0) == {}  # which looks for none


@pytest.mark.parametrize("reserved", ["head", "opt", "control", "local", "server", "wire"])
def test_reserved_names_are_passed_over(model: Adaptable, batch: Batch, reserved: str) -> None:
    for adapter in (LoRA(), Norms()):
        tensors = drawn(model, adapter)
        beside = {**tensors, f"{reserved}/weight": torch.full((2, 2), torch.nan)}
        assert torch.equal(scores(model, batch, adapter, beside), scores(model, batch, adapter, tensors))


def test_no_state_is_left_behind(model: Adaptable, batch: Batch) -> None:
    def itself() -> Tensor:
        found = model.network.features(batch, live=()).scores
        assert found is not None
        return found

    bare, adapter = scores(model, batch, Head(), {}), Bottleneck(3)
    for calls in (scores, lambda *given: list(model.inputs(batch, adapter, given[-1]))):
        calls(model, batch, adapter, drawn(model, adapter))
        assert torch.equal(itself(), bare)
    with pytest.raises(RuntimeError):
        model(batch, adapter, {**drawn(model, adapter), "vision.1.block/down": torch.zeros(3, 7)})
    assert torch.equal(itself(), bare)
    assert not any(p.requires_grad or p.grad is not None for p in model.network.module.parameters())
    assert not model.network.module.training


def test_a_fresh_start_is_a_function_of_seed_and_place(network: Network) -> None:
    one, both = Adaptable(network()), Adaptable(network(towers=BOTH))
    first = one.init(LoRA(), 4)
    torch.manual_seed(5)
    again = both.init(LoRA(), 4)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert {name.partition(".")[0] for name in again} == {"vision", "text"}
    a = [tensor for name, tensor in first.items() if name.endswith("/A")]
    assert not any(torch.equal(x, y) for i, x in enumerate(a) for y in a[:i])
    assert not torch.equal(one.init(LoRA(), 5)["vision.0.q_proj/A"], first["vision.0.q_proj/A"])


@pytest.mark.parametrize("adapter", [LoRA(rank=3, targets=LINEAR), Bottleneck(4)], ids=str)
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_inputs_are_what_the_adapter_reads(network: Network, batch: Batch, adapter: Any, family: str) -> None:
    model = Adaptable(network(family, BOTH))
    tensors = drawn(model, adapter)
    computed: list[Tensor] = []

    class Listening(type(adapter)):  # type: ignore[misc]
        def pre(self, h: Tensor, leaves: dict[str, Tensor]) -> Tensor:
            computed.append(super().pre(h, leaves).detach())
            return computed[-1]

    model(batch, Listening(**{f.name: getattr(adapter, f.name) for f in fields(adapter)}), tensors)
    read = list(model.inputs(batch, adapter, tensors))
    assert len(read) == len(computed)
    assert {place for place, *_ in read} == set(filter(adapter.at, model.places))
    for (place, h, mask), expected in zip(read, computed, strict=True):
        leaves = {name.partition("/")[2]: t for name, t in tensors.items() if name.startswith(f"{place.name}/")}
        assert torch.equal(adapter.pre(h, leaves), expected)
        assert h.shape[-1] == place.in_dim
        if h.dim() == 3:
            assert mask.shape == h.shape[:2]


def test_inputs_come_with_what_is_not_padding(network: Network, batch: Batch) -> None:
    model = Adaptable(network(towers=BOTH))
    masks = {place.name: mask for place, _, mask in model.inputs(batch, Bottleneck(3), drawn(model, Bottleneck(3)))}
    lengths = model.network.tokenizer(list(PROMPTS), padding="longest", return_tensors="pt")["attention_mask"]
    assert not lengths.all()  # there is something to mask
    assert torch.equal(masks["text.1.block"], lengths.bool())
    assert masks["vision.1.block"].shape == (4, 17)
    assert masks["vision.1.block"].all()


@pytest.mark.parametrize("adapter", [LoRA(rank=3, targets=LINEAR), Bottleneck(4), Everything(), Norms()], ids=str)
def test_a_bf16_backbone_trains_fp32_adapters(network: Network, batch: Batch, adapter: Adapter) -> None:
    half, full = Adaptable(network(towers=BOTH, dtype=torch.bfloat16)), Adaptable(network(towers=BOTH))
    assert half.dtype is torch.bfloat16
    tensors = drawn(half, adapter, std=0.02)
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    for name, gradient in gradients(half, batch, adapter, tensors).items():
        if gradient is not None:
            assert gradient.dtype is torch.float32
            assert torch.isfinite(gradient).all()
            assert gradient.abs().max() > 0 or "k_proj/bias" in name  # a shift of all keys changes no attention
    close = scores(half, batch, adapter, tensors)
    assert close.dtype is torch.float32
    torch.testing.assert_close(close, scores(full, batch, adapter, tensors), rtol=0.1, atol=0.3)


@pytest.mark.parametrize("towers", [("vision",), ("text",), BOTH], ids=str)
def test_only_adapted_towers_move(network: Network, images: Callable[..., Tensor], towers: tuple[str, ...]) -> None:
    model = Adaptable(network(towers=towers))
    tensors = drawn(model, LoRA())
    seen = Batch(TARGETS, images=images(4))
    told = Batch(torch.tensor([0, 1, 2]), texts=PROMPTS)
    for tower, batch in (("vision", seen), ("text", told)):
        moved = not torch.equal(model(batch, LoRA(), tensors).pooled, model(batch, Head(), {}).pooled)
        assert moved == (tower in towers)
