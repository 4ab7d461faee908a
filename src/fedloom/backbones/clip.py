"""CLIP (Radford et al., 2021, arXiv 2103.00020) and SigLIP (Zhai et al., 2023, arXiv 2303.15343).

Either tower can be adapted, or both. Images are scored against candidate texts; the features of candidates are kept
while the text tower is frozen. Linear places are each block's q_proj, k_proj, v_proj, out_proj, fc1, fc2, and above
the blocks `projection` (CLIP); block places are the residual stream after each block; the features place is the pooled
image features; the words place the embeddings of a text's words, after the token that begins it.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from fedloom.backbones.batches import Batch, Features
from fedloom.backbones.network import Junction
from fedloom.errors import BackboneError, DataError
from fedloom.places import Place
from fedloom.tensors import Tensors

TOWERS = ("vision", "text")
CANDIDATES_KEPT = 32  # sets of candidates whose features are kept


class CLIP:
    """A Hugging Face CLIPModel or SiglipModel as a `Network`."""

    def __init__(self, module: Any, processor: Any, towers: Sequence[str] = ("vision",)):
        if not towers or not set(towers) <= set(TOWERS):
            raise BackboneError(f"towers {list(towers)} were asked for; CLIP has 'vision' and 'text'.")
        self.module = module
        self.processor: Sequence[Any] = processor
        self.image_processor, self.tokenizer = processor
        self.towers = tuple(towers)
        config = self.module.config
        self.siglip: bool = config.model_type != "clip"
        self.dim: int = config.vision_config.hidden_size if self.siglip else config.projection_dim
        self.fuses = self.short = False
        self.trunk = "vision"
        self.blocks: int = config.vision_config.num_hidden_layers
        parts = {
            "vision": (self.module.vision_model, getattr(self.module, "visual_projection", None)),
            "text": (self.module.text_model, getattr(self.module, "text_projection", None)),
        }
        self.places: Mapping[Place, nn.Module] = {
            place: layer for tower in self.towers for place, layer in _places(tower, *parts[tower]).items()
        }
        self.sequences: Mapping[Place, nn.Module] = {
            place: block for place, block in self.places.items() if place.kind == "block"
        }
        self._pooled, self._words = Junction(), Junction()
        if "vision" in self.towers:
            top = Place("vision.top.features", "features", self.dim, self.dim, 0)
            self.places = {**self.places, top: self._pooled}
        if "text" in self.towers:
            text = self.module.text_model
            words = Place("text.words", "words", (d := text.config.hidden_size), d, len(text.encoder.layers) + 1)
            self.places, self.sequences = ({**known, words: self._words} for known in (self.places, self.sequences))
            text.embeddings.token_embedding.register_forward_hook(self._read)
        self.adapted: Sequence[nn.Module] = [part for tower in self.towers for part in parts[tower] if part is not None]
        self._tokens = lru_cache(CANDIDATES_KEPT)(self._tokenise)
        self._frozen_candidates = lru_cache(CANDIDATES_KEPT)(torch.no_grad()(self._text))
        self._mean, self._std = (
            torch.tensor(getattr(self.image_processor, name)).view(1, 3, 1, 1).to(module.device)
            for name in ("image_mean", "image_std")
        )

    def decode(self, image: Image.Image) -> Tensor:
        pixels = self.image_processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
        return pixels[0].round().clamp(0, 255).to(torch.uint8)  # type: ignore[no-any-return]

    def features(self, batch: Batch, live: Collection[str]) -> Features:
        if _texts_alone(batch):
            return Features(self._text(self._texts(batch)))
        pooled = self._vision(batch)
        if batch.candidates is None:
            return Features(pooled)
        texts = self._text(batch.candidates) if "text" in live else self._frozen_candidates(batch.candidates)
        scores = F.normalize(pooled, dim=-1) @ F.normalize(texts, dim=-1).T * self.module.logit_scale.float().exp()
        return Features(pooled, scores + self.module.logit_bias.float() if self.siglip else scores)

    def mask(self, place: Place, batch: Batch, h: Tensor) -> Tensor:
        if place.tower == "vision":
            return torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
        texts = batch.texts if _texts_alone(batch) else batch.candidates
        if h.dim() == 3:
            return self._tokens(texts)["attention_mask"].bool()
        return torch.ones(len(h), 1, dtype=torch.bool, device=h.device)

    def prefix(self, batch: Batch, blocks: int) -> Tensors:
        if batch.images is None:
            return {}
        return {f"vision.{blocks}": self._blocks(self._embed(batch.images), 0, blocks)}

    def _embed(self, images: Tensor | None) -> Tensor:
        if images is None:
            raise DataError("the examples have no image; name their column in [data.columns].")
        pixels = (images.float() / 255 - self._mean) / self._std
        vision = self.module.vision_model
        hidden = vision.embeddings(pixels.to(vision.post_layernorm.weight.dtype))
        return hidden if self.siglip else vision.pre_layrnorm(hidden)  # type: ignore[no-any-return]

    def _blocks(self, hidden: Tensor, first: int, last: int) -> Tensor:
        for block in self.module.vision_model.encoder.layers[first:last]:
            hidden = block(hidden, None)
        return hidden

    def _vision(self, batch: Batch) -> Tensor:
        """Pooled image features (n, dim): Hugging Face's `get_image_features`, from wherever the cached prefix ends."""
        vision = self.module.vision_model
        if batch.prefix:
            ((name, hidden),) = batch.prefix.items()
            done = int(name.rpartition(".")[2])
        else:
            hidden, done = self._embed(batch.images), 0
        short = self.short and done < self.blocks and not (self.siglip or torch.compiler.is_exporting())
        hidden = self._blocks(hidden, done, self.blocks - short)
        hidden = _top(vision.encoder.layers[-1], hidden) if short else hidden
        if self.siglip:
            pooled = vision.head(vision.post_layernorm(hidden)).float()
        else:
            pooled = self.module.visual_projection(vision.post_layernorm(hidden[:, 0])).float()
        return self._pooled(pooled, pooled)  # type: ignore[no-any-return]

    def _read(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        start = 0 if self.siglip else 1
        return torch.cat([out[:, :start], self._words(out[:, start:], out[:, start:])], 1)

    def _text(self, texts: tuple[str, ...]) -> Tensor:
        return self.module.get_text_features(**self._tokens(texts)).pooler_output.float()  # type: ignore[no-any-return]

    def _tokenise(self, texts: tuple[str, ...]) -> dict[str, Tensor]:
        # SigLIP was trained on padded texts and reads the last position; CLIP reads the end token wherever it stands.
        length = self.module.config.text_config.max_position_embeddings
        padding = "max_length" if self.siglip else "longest"
        encoded = self.tokenizer(list(texts), padding=padding, max_length=length, truncation=True, return_tensors="pt")
        kept = [name for name in ("input_ids", "attention_mask") if name in encoded]
        return {name: encoded[name].to(self.module.device) for name in kept}

    def _texts(self, batch: Batch) -> tuple[str, ...]:
        if batch.texts is None:
            raise DataError("the examples have neither an image nor a text; name their columns in [data.columns].")
        return batch.texts


def _top(block: Any, hidden: Tensor) -> Tensor:
    """The first position (n, 1, d) that the last block makes, the one that is pooled: keys and values are of all, and
    all else of this one. Adapters are put in as ever."""

    def forward(hidden: Tensor) -> Tensor:
        attention, read = block.self_attn, block.layer_norm1(hidden)
        q, k, v = attention.q_proj(read[:, :1]), attention.k_proj(read), attention.v_proj(read)
        q, k, v = (x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        weights = (q @ k.mT * attention.scale).softmax(-1, dtype=torch.float32).to(q.dtype)
        first = hidden[:, :1] + attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
        return first + block.mlp(block.layer_norm2(first))  # type: ignore[no-any-return]

    block.forward = forward  # rather than called, for the hooks of the block
    try:
        return block(hidden)  # type: ignore[no-any-return]
    finally:
        del block.forward


def _texts_alone(batch: Batch) -> bool:
    """Whether the examples are texts, rather than images scored against candidate texts."""
    return batch.images is None and not batch.prefix


def _places(tower: str, model: Any, projection: nn.Module | None) -> dict[Place, nn.Module]:
    places: dict[Place, nn.Module] = {}
    blocks = model.encoder.layers
    for i, block in enumerate(blocks):
        height = len(blocks) - i
        for name, layer in (*block.self_attn.named_children(), *block.mlp.named_children()):
            if isinstance(layer, nn.Linear):
                place = Place(f"{tower}.{i}.{name}", "linear", layer.in_features, layer.out_features, height)
                places[place] = layer
        places[Place(f"{tower}.{i}.block", "block", block.embed_dim, block.embed_dim, height)] = block
    if isinstance(projection, nn.Linear):
        place = Place(f"{tower}.top.projection", "linear", projection.in_features, projection.out_features, 0)
        places[place] = projection
    return places
