"""CLIP and SigLIP, held against Hugging Face's own forward pass and processor; what is kept, and when it is not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from fedloom.adapters import BitFit, Bottleneck, Everything, Head, LoRA, Norms
from fedloom.backbones import Adaptable, Batch, load, reason
from fedloom.backbones.clip import CLIP
from fedloom.errors import BackboneError, DataError
from fedloom.places import Adapter, Place
from fedloom.site import Site
from fedloom.tasks import Classification
from fedloom.tensors import generator

FAMILIES = pytest.mark.parametrize("family", ["clip", "siglip"])
BOTH = ("vision", "text")
PROMPTS = ("a photo of a cat.", "a photo of a dog.", "the small bird sings")
NUMBERS = torch.arange(4) % 3

Network = Callable[..., CLIP]
Images = Callable[..., Tensor]


def tokens(network: CLIP, texts: tuple[str, ...]) -> Any:
    """As each family's own processor does it: SigLIP always to full length."""
    padding = "max_length" if network.siglip else "longest"
    encoded = network.tokenizer(list(texts), padding=padding, max_length=16, truncation=True, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


@FAMILIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_image_features_are_hugging_face_s_to_the_bit(
    network: Network, images: Images, family: str, dtype: torch.dtype
) -> None:
    ours = network(family, dtype=dtype)
    pixels = (images(4).float() / 255 - ours._mean) / ours._std
    theirs = ours.module.get_image_features(pixel_values=pixels.to(dtype)).pooler_output
    assert torch.equal(ours.features(Batch(NUMBERS, images=images(4)), live=()).pooled, theirs.float())


@FAMILIES
def test_scores_are_hugging_face_s_logits(network: Network, images: Images, family: str) -> None:
    ours = network(family)
    batch = Batch(NUMBERS, images=images(4), candidates=PROMPTS)
    pixels = (images(4).float() / 255 - ours._mean) / ours._std
    theirs = ours.module(pixel_values=pixels, **tokens(ours, PROMPTS)).logits_per_image
    torch.testing.assert_close(ours.features(batch, live=()).scores, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.features(batch, live=BOTH).scores, theirs, rtol=1e-5, atol=1e-5)


@FAMILIES
def test_texts_alone_give_text_features(network: Network, family: str) -> None:
    ours = network(family, ("text",))
    found = ours.features(Batch(torch.arange(3), texts=PROMPTS), live=("text",))
    theirs = ours.module.get_text_features(**tokens(ours, PROMPTS)).pooler_output
    assert torch.equal(found.pooled, theirs)
    assert found.scores is None


@FAMILIES
@pytest.mark.parametrize("size", [(32, 32), (40, 57), (57, 40), (20, 20), (300, 33)], ids=str)
def test_a_decoded_image_is_the_processor_s(network: Network, family: str, size: tuple[int, int]) -> None:
    ours = network(family)
    noise = torch.randint(0, 256, (*size, 3), generator=generator("image", size), dtype=torch.uint8)
    image = Image.fromarray(noise.numpy())
    pixels = ours.decode(image)
    assert pixels.dtype is torch.uint8
    theirs = ours.image_processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close((pixels[None].float() / 255 - ours._mean) / ours._std, theirs, rtol=0, atol=1e-6)


PREFIXES = [  # how many blocks an adapter leaves as they are
    (Head(), 3),
    (LoRA(rank=2, targets=("fc1", "q_proj")), 0),
    (LoRA(rank=2, last=2), 1),
    (LoRA(rank=2, last=1), 2),
    (Bottleneck(3), 0),
    (Bottleneck(3, last=1), 2),
]
ABOVE = ("clip", LoRA(rank=2, targets=("projection",)), 3)  # SigLIP has no projection above its blocks


@pytest.mark.parametrize(
    ("family", "adapter", "blocks"),
    [ABOVE, *((family, *case) for family in ("clip", "siglip") for case in PREFIXES)],
    ids=str,
)
def test_a_cached_prefix_changes_nothing(
    network: Network, images: Images, family: str, adapter: Adapter, blocks: int
) -> None:
    model = Adaptable(network(family, BOTH))
    assert model.frozen_blocks(adapter) == blocks
    rng = generator("drawn")
    tensors = {name: torch.randn(t.shape, generator=rng) * 0.1 for name, t in model.init(adapter, 0).items()}
    whole = Batch(NUMBERS, images=images(4), candidates=PROMPTS)
    parts = [Batch(NUMBERS[rows], images=images(4)[rows]) for rows in (slice(0, 3), slice(3, 4))]
    prefix = model.prefix(parts, blocks)
    assert {name: len(tensor) for name, tensor in prefix.items()} == {f"vision.{blocks}": 4}
    cached = model(Batch(NUMBERS, candidates=PROMPTS, prefix=prefix), adapter, tensors)
    plain = model(whole, adapter, tensors)
    torch.testing.assert_close(cached.scores, plain.scores, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cached.pooled, plain.pooled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("depth", range(4))
def test_a_prefix_of_every_depth_is_the_same_forward(network: Network, images: Images, depth: int) -> None:
    ours = network()
    whole = ours.features(Batch(NUMBERS, images=images(4)), live=()).pooled
    prefix = ours.prefix(Batch(NUMBERS, images=images(4)), depth)
    assert torch.equal(ours.features(Batch(NUMBERS, prefix=prefix), live=()).pooled, whole)


@pytest.mark.parametrize("adapter", [Everything(), BitFit(), Norms()], ids=str)
def test_under_replaced_parameters_nothing_is_kept(
    model: Adaptable, site: Callable[..., Site], adapter: Adapter
) -> None:
    assert model.frozen_blocks(adapter) is None
    oxford = site()
    assert oxford.cached(adapter).train is oxford.train


def test_a_cached_site_reads_no_image_and_predicts_the_same(site: Callable[..., Site], tmp_path: Path) -> None:
    oxford = site(task=Classification(("cat", "dog", "bird")))
    adapter = Bottleneck(3, last=1)
    tensors = oxford.model.init(adapter, 0)
    cached = oxford.cached(adapter)
    for plain, kept in zip(oxford.batches(2), cached.batches(2), strict=True):
        assert kept.images is None
        assert torch.equal(plain.targets, kept.targets)
        expected = oxford.logits(adapter, tensors, plain)
        torch.testing.assert_close(cached.logits(adapter, tensors, kept), expected, rtol=1e-5, atol=1e-5)
    deeper = cached.cached(Head())  # the cache of another adapter starts from the images again
    ((name, _),) = deeper.train.prefix.items()
    assert name == "vision.3"


def counted(network: CLIP) -> list[int]:
    """How many texts the text tower has read, call by call."""
    calls: list[int] = []
    network.module.text_model.register_forward_hook(lambda *given: calls.append(len(given[2].pooler_output)))
    return calls


def test_frozen_candidates_are_read_once(network: Network, images: Images) -> None:
    ours = network()
    calls, model = counted(ours), Adaptable(ours)
    tensors = model.init(LoRA(), 0)
    for candidates in (PROMPTS, PROMPTS, PROMPTS[:2], PROMPTS):
        model(Batch(NUMBERS, images=images(4), candidates=candidates), LoRA(), tensors)
    assert calls == [3, 2]


@pytest.mark.parametrize("adapter", [LoRA(), Bottleneck(3), Norms(), Everything()], ids=str)
def test_candidates_under_an_adapter_are_read_anew(network: Network, images: Images, adapter: Adapter) -> None:
    model = Adaptable(network(towers=BOTH))
    batch = Batch(NUMBERS, images=images(4), candidates=PROMPTS)
    bare = model(batch, Head(), {}).scores
    rng = generator("drawn")
    for _ in range(2):  # also after a frozen call has kept them
        tensors = {n: t + 0.1 * torch.randn(t.shape, generator=rng) for n, t in model.init(adapter, 0).items()}
        text_only = {n: t for n, t in tensors.items() if n.startswith("text")}
        assert text_only
        assert not torch.equal(model(batch, adapter, text_only).scores, bare)  # type: ignore[arg-type]
        leaves = {n: t.requires_grad_() for n, t in text_only.items()}
        scores = model(batch, adapter, leaves).scores
        assert scores is not None
        reached = torch.autograd.grad(scores.square().sum(), list(leaves.values()), allow_unused=True)
        assert sum(g is not None and bool(g.abs().sum() > 0) for g in reached) > len(reached) / 3
        assert torch.equal(model(batch, Head(), {}).scores, bare)  # type: ignore[arg-type]


def test_places(network: Network) -> None:
    clip, siglip = network("clip", BOTH), network("siglip", BOTH)
    layers = {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "block"}
    for family, top in ((clip, {"projection"}), (siglip, set())):
        for tower in BOTH:
            own = [place for place in family.places if place.tower == tower]
            above = top | {"features" if tower == "vision" else "words"}
            assert {place.layer for place in own} == layers | above
            assert len(own) == 3 * len(layers) + len(above)
    heights = {place.name: place.height for place in clip.places}
    assert heights["vision.0.q_proj"] == 3
    assert heights["vision.2.block"] == 1
    assert heights["vision.top.projection"] == 0
    assert Place("vision.top.features", "features", 24, 24, 0) in clip.places
    assert Place("vision.1.fc1", "linear", 32, 48, 2) in clip.places
    assert Place("text.top.projection", "linear", 32, 24, 0) in clip.places
    assert Place("text.words", "words", 32, 32, 4) in clip.places
    assert not any(place.tower == "text" for place in network().places)


def test_what_a_clip_cannot_do_is_said(network: Network, images: Images) -> None:
    with pytest.raises(BackboneError, match=r"\['joint'\] were asked for.*'vision' and 'text'"):
        network(towers=("joint",))
    with pytest.raises(BackboneError):
        network(towers=())
    with pytest.raises(DataError, match="neither an image nor a text"):
        network().features(Batch(NUMBERS), live=())


@FAMILIES
def test_a_saved_folder_loads_as_the_same_backbone(
    network: Network, images: Images, family: str, tmp_path: Path
) -> None:
    ours = network(family)
    ours.module.save_pretrained(tmp_path)
    ours.tokenizer.save_pretrained(tmp_path)
    ours.image_processor.save_pretrained(tmp_path)
    batch = Batch(NUMBERS, images=images(4), candidates=PROMPTS)
    loaded = load(str(tmp_path), attention="sdpa")
    assert torch.equal(loaded(batch, Head(), {}).scores, ours.features(batch, live=()).scores)  # type: ignore[arg-type]
    eager = load(str(tmp_path), attention="eager")(batch, Head(), {}).scores
    torch.testing.assert_close(eager, ours.features(batch, live=()).scores, rtol=1e-4, atol=1e-4)
    assert load(str(tmp_path), dtype=torch.bfloat16).dtype is torch.bfloat16


def test_an_exception_without_words_has_a_reason_too() -> None:
    assert reason(ValueError("\n no such\nkey")) == "no such"
    assert reason(ValueError()) == reason(ValueError("\n")) == "ValueError"


def test_what_is_no_backbone_is_said(network: Network, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"no backbone 'clip-smal'.*not a folder, not a hub name"):
        load("clip-smal")
    with pytest.raises(BackboneError, match=r"no backbone 'albef'.*made of ALBEF's checkpoint by .*albef_convert"):
        load("albef")
    for path in ("/nowhere/clip", "./clip-small", "../backbones/clip-small"):
        with pytest.raises(
            BackboneError, match=r"built in are \['albef-small', 'clip-small', 'text-small', 'vilt-small'"
        ):
            load(path)
    with pytest.raises(BackboneError, match=r"config.json' is not the config.json of a Hugging Face model"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(BackboneError, match=r"is a 'llama'; fedloom adapts .*clip"):
        load(str(tmp_path))
    ours = network()
    ours.module.save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="cannot be read"):
        load(str(tmp_path))  # no processor
