"""Adapters that multiply what a layer returns, and positions that stand in a block's sequence, in CLIP and ViLT."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedloom.adapters import IA3, Attention, Context, Head, LoRA, Prompt
from fedloom.backbones import Adaptable, Batch
from fedloom.backbones.vilt import ViLT
from fedloom.errors import AdapterError
from fedloom.places import Adapter
from fedloom.tensors import generator

BOTH = ("vision", "text")
PROMPTS = ("a photo of a cat.", "a dog")
Make = Callable[..., Any]


def drawn(model: Adaptable, adapter: Adapter) -> dict[str, Tensor]:
    rng = generator("unlike")
    return {name: t + 0.3 * torch.randn(t.shape, generator=rng) for name, t in model.init(adapter, 1).items()}


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.fixture
def batch(images: Callable[..., Tensor]) -> Batch:
    return Batch(torch.zeros(3), images=images(3), candidates=PROMPTS)


def grads(model: Adaptable, batch: Batch, adapter: Adapter, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    scores = model(batch, adapter, leaves).scores
    assert scores is not None
    found = torch.autograd.grad(scores.square().sum(), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_ia3_is_a_change_of_weights(network: Make, batch: Batch, family: str) -> None:
    ours = network(family)
    model = Adaptable(ours)
    tensors = drawn(model, IA3())
    assert tensors.keys() == {f"vision.{i}.{layer}/l" for i in range(3) for layer in ("k_proj", "v_proj", "fc1")}
    scaled = network(family)
    for i, block in enumerate(scaled.module.vision_model.encoder.layers):
        for layer, module in (("k_proj", block.self_attn), ("v_proj", block.self_attn), ("fc1", block.mlp)):
            linear, factor = getattr(module, layer), tensors[f"vision.{i}.{layer}/l"]
            linear.weight.data *= factor[:, None]
            linear.bias.data *= factor
    expected = scaled.features(batch, live=()).scores
    torch.testing.assert_close(model(batch, IA3(), tensors).scores, expected, rtol=1e-4, atol=1e-4)
    fresh = model(batch, IA3(), model.init(IA3(), 0))
    assert torch.equal(fresh.pooled, ours.features(batch, live=()).pooled)


def test_fedclip_s_attention_weighs_the_dimensions_of_the_features(network: Make, batch: Batch) -> None:
    model = Adaptable(network())
    tensors = drawn(model, Attention())
    t = {name.partition("/")[2]: tensor for name, tensor in tensors.items()}
    x = model(batch, Head(), {}).pooled
    expected = x * (torch.tanh(x @ t["W1"].T + t["b1"]) @ t["W2"].T + t["b2"]).softmax(1)
    got = model(batch, Attention(), tensors)
    torch.testing.assert_close(got.pooled, expected)
    texts = model.network._text(PROMPTS)  # type: ignore[attr-defined]
    cosines = F.normalize(expected, dim=1) @ F.normalize(texts, dim=1).T
    logit_scale = model.network.module.logit_scale.exp()  # type: ignore[operator, union-attr]
    torch.testing.assert_close(got.scores, cosines * logit_scale)
    assert model.frozen_blocks(Attention()) == 3  # all of the tower can be cached
    with pytest.raises(AdapterError, match="finds no place"):
        Adaptable(network(towers=("text",))).init(Attention(), 0)


@pytest.mark.parametrize("last", [None, 1])
def test_prompts_stand_in_a_block_s_sequence_and_leave_it(network: Make, batch: Batch, last: int | None) -> None:
    ours, adapter = network(), Prompt(4, last=last)
    model = Adaptable(ours)
    tensors = drawn(model, adapter)
    vision = ours.module.vision_model
    hidden = ours._embed(batch.images)
    for i, block in enumerate(vision.encoder.layers):
        P = tensors.get(f"vision.{i}.block/tokens")
        inserted = hidden if P is None else torch.cat([P.expand(len(hidden), -1, -1), hidden], 1)
        hidden = block(inserted, None)[:, 0 if P is None else 4 :]
    expected = ours.module.visual_projection(vision.post_layernorm(hidden[:, 0]))
    got = model(batch, adapter, tensors).pooled
    torch.testing.assert_close(got, expected)
    assert len(tensors) == (3 if last is None else 1)
    assert apart(got, model(batch, Head(), {}).pooled) > 1e-3
    assert torch.equal(model(batch, adapter, {}).pooled, model(batch, Head(), {}).pooled)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_prompts_are_seen_by_every_word(network: Make, batch: Batch, family: str, attention: str) -> None:
    """Under a causal mask too: the tower is told of the first prompt in the first block alone, and its end changes."""
    ours = network(family, BOTH)
    ours.module.set_attn_implementation(attention)
    model, adapter = Adaptable(ours), Prompt(2)
    found = grads(model, batch, adapter, drawn(model, adapter))
    assert {name.partition(".")[0] for name in found} == set(BOTH)
    assert all(bool((g.abs().sum(1) > 0).all()) for g in found.values())


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_learned_words_are_words_that_a_vocabulary_might_have(network: Make, batch: Batch, family: str) -> None:
    model, adapter = Adaptable(network(family, ("text",))), Context(3)
    tensors = drawn(model, adapter)
    assert {name: t.shape for name, t in tensors.items()} == {"text.words/tokens": (3, 32)}
    spoken = replace(batch, candidates=("a photo of a cat.", "a photo of a big dog."))
    got = model(spoken, adapter, tensors).scores
    other = network(family)
    tokens, start = other._tokens(spoken.candidates), int(family == "clip")  # CLIP's begin with a token of their own
    ids = tokens["input_ids"].clone()
    vocabulary = other.module.text_model.embeddings.token_embedding.weight
    unused = torch.tensor([i for i in range(len(vocabulary)) if i not in ids][:3])
    vocabulary.data[unused] = tensors["text.words/tokens"]
    ids[:, start : start + 3] = unused
    texts = other.module.get_text_features(**{**tokens, "input_ids": ids}).pooler_output
    x = model(batch, Head(), {}).pooled
    cosines = F.normalize(x, dim=1) @ F.normalize(texts, dim=1).T
    bias = other.module.logit_bias if family == "siglip" else 0.0
    torch.testing.assert_close(got, cosines * other.module.logit_scale.exp() + bias)
    plain = model(spoken, Head(), {}).scores
    assert plain is not None
    assert apart(got, plain) > 1e-3
    found = grads(model, spoken, adapter, tensors)
    assert bool((found["text.words/tokens"].abs().sum(1) > 0).all())
    assert model.frozen_blocks(adapter) == 3  # images can be kept


@pytest.mark.parametrize("texts", [("a photo of a cat.", "a dog"), ("a", "a")])
def test_learned_words_stand_in_place_of_common_ones(network: Make, batch: Batch, texts: tuple[str, ...]) -> None:
    model, adapter = Adaptable(network("clip", ("text",))), Context(4)
    with pytest.raises(AdapterError, match=r"the same 4 words, .* as in 'X X X X \{\}.'"):
        model(replace(batch, candidates=texts), adapter, drawn(model, adapter))
    with pytest.raises(AdapterError, match="finds no place"):
        Adaptable(network()).init(adapter, 0)


@pytest.mark.parametrize("adapter", [Prompt(2), IA3(), Attention()], ids=str)
def test_what_is_recomputed_is_recomputed_under_the_same_adapter(network: Make, batch: Batch, adapter: Any) -> None:
    plain, checkpointed = (Adaptable(network("clip", BOTH), again) for again in (False, True))
    tensors = drawn(plain, adapter)
    torch.testing.assert_close(
        grads(checkpointed, batch, adapter, tensors), grads(plain, batch, adapter, tensors), rtol=1e-4, atol=1e-6
    )


def test_one_adapter_leaves_no_trace_for_the_next(network: Make, batch: Batch) -> None:
    model = Adaptable(network())
    alone = Adaptable(network())(batch, LoRA(), drawn(model, LoRA())).pooled
    for adapter in (Prompt(2), IA3(), Attention()):
        model(batch, adapter, drawn(model, adapter))
    assert torch.equal(model(batch, LoRA(), drawn(model, LoRA())).pooled, alone)


@pytest.fixture(scope="module")
def vilt() -> Adaptable:
    from transformers import BertTokenizer, ViltConfig, ViltModel, ViTImageProcessorPil

    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "is", "shown", "?")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = ViltModel(ViltConfig(**sizes, vocab_size=9, max_position_embeddings=12, image_size=32, patch_size=8))
        for parameter in module.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=12)
    return Adaptable(ViLT(module, (ViTImageProcessorPil(size={"height": 32, "width": 32}), tokenizer)))


@pytest.mark.parametrize("adapter", [Prompt(3), IA3()], ids=str)
def test_they_go_into_vilt_and_padding_changes_nothing(
    vilt: Adaptable, images: Callable[..., Tensor], adapter: Any
) -> None:
    tensors = drawn(vilt, adapter)
    both = Batch(torch.zeros(2), images=images(2), texts=("what is shown ?", "what"))
    second = Batch(torch.zeros(1), images=images(2)[1:], texts=("what",))
    together = vilt(both, adapter, tensors).pooled
    torch.testing.assert_close(together[1:], vilt(second, adapter, tensors).pooled, rtol=1e-4, atol=1e-5)
    assert apart(together, vilt(both, Head(), {}).pooled) > 1e-3
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    found = torch.autograd.grad(vilt(both, adapter, leaves).pooled.square().sum(), list(leaves.values()))
    assert all(bool(g.abs().sum() > 0) for g in found)
