"""The models that a benchmark runs: shapes of published ones, weights drawn at random, no file but a tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fedloom import backbones
from fedloom.assembly import ATTENTION, KERNELS
from fedloom.backbones import Adaptable, Attention, Batch
from fedloom.backbones.adaptable import Kernels
from fedloom.backbones.clip import CLIP
from fedloom.backbones.network import Network
from fedloom.backbones.vilt import ViLT
from fedloom.data import Pixels
from fedloom.tensors import generator

Size = Literal["small", "base"]

NAMES = {"small": "CLIP of 4 layers, 256", "base": "CLIP ViT-B/32"}
VILT_NAMES = {"small": "ViLT of 4 layers, 256", "base": "ViLT-B/32"}
SIDE = 224  # pixels of a CLIP's image
VILT_SIDE = 384
SMALL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
QUESTION = "is there something wrong in the picture?"


def clip_module(size: Size, attention: Attention = "sdpa") -> Any:
    """A Hugging Face CLIPModel in float32; the same weights at each call."""
    from transformers import CLIPConfig, CLIPModel

    # The tokenizer of the small backbone that comes with fedloom: its end token is 1.
    text = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, **(SMALL if size == "small" else {})}
    config = CLIPConfig(text_config=text, vision_config=SMALL if size == "small" else {})
    return _drawn(CLIPModel, config, attention)


def clip(
    size: Size, dtype: str = "float32", kernels: Kernels | None = None, attention: Attention | None = None
) -> Adaptable:
    """A CLIP that takes adapters in its image tower, by the numerical plan of a recipe in this dtype."""
    from transformers import AutoTokenizer, CLIPImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(backbones.locate("clip-small"))
    module = clip_module(size, attention or ATTENTION[dtype]).to(getattr(torch, dtype))
    model = Adaptable(CLIP(module, (CLIPImageProcessorPil(), tokenizer)))
    model.use(kernels or cast(Kernels, KERNELS[dtype]))
    return model


def vilt_module(size: Size) -> Any:
    """A Hugging Face ViltModel in float32; the same weights at each call."""
    from transformers import ViltConfig, ViltModel

    return _drawn(ViltModel, ViltConfig(**(SMALL if size == "small" else {})), "eager")


def vilt(size: Size, dtype: str = "float32") -> Adaptable:
    """A ViLT that takes adapters."""
    from transformers import AutoTokenizer, ViltImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(backbones.locate("vilt-small"))
    model = Adaptable(ViLT(vilt_module(size).to(getattr(torch, dtype)), (ViltImageProcessorPil(), tokenizer)))
    model.use(cast(Kernels, KERNELS[dtype]))
    return model


def noise(network: Network, names: Sequence[str], side: int) -> Pixels:
    """Images of noise by name, decoded already, as after a first round."""
    pixels = Pixels(Path(), network.decode)
    for name in names:
        pixels._decoded[name] = torch.randint(0, 256, (3, side, side), generator=generator(name), dtype=torch.uint8)
    return pixels


def batch(n: int, side: int = SIDE, candidates: Sequence[str] | None = None, texts: bool = False) -> Batch:
    """n images of noise, of as many classes as there are candidates (or two)."""
    rng = generator("bench", n)
    return Batch(
        targets=torch.randint(0, len(candidates or "ab"), (n,), generator=rng),
        images=torch.randint(0, 256, (n, 3, side, side), generator=rng, dtype=torch.uint8),
        candidates=None if candidates is None else tuple(candidates),
        texts=(QUESTION,) * n if texts else None,
    )


def prompts(classes: int) -> tuple[str, ...]:
    """A prompt for each of so many classes."""
    return tuple(f"a photo of a thing of kind {i}." for i in range(classes))


def normalised(model: Adaptable, images: Tensor) -> Tensor:
    """Pixels as a Hugging Face model takes them."""
    network: Any = model.network
    return (images.float() / 255 - network._mean) / network._std  # type: ignore[no-any-return]


def _drawn(cls: Any, config: Any, attention: Attention) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # Hugging Face draws its weights from the global generator
        torch.manual_seed(0)
        module: nn.Module = cls._from_config(config, attn_implementation=attention)
    return module.eval()
