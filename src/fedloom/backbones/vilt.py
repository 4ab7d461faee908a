"""ViLT (Kim et al., 2021, arXiv 2102.03334): text and image patches through one encoder.

One tower, `joint`, over the text's tokens and then the image's [CLS] and patches. Linear places are each block's
q_proj, k_proj, v_proj, out_proj, fc1, fc2; block places are the residual stream after each block's feed-forward, where
FedDAT and FedPIA put their adapters. `pooled` is the pooler's output, or the text's [CLS] state in a checkpoint
without one.

Deviation: Hugging Face puts the patches in random order, and where an image has more than `max_image_length` draws that
many of them; here all patches are kept, in order, so that the same example always gives the same features. Its
attention is Hugging Face's own, which has no faster kernel to choose.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from fedloom.backbones.batches import Batch, Features
from fedloom.backbones.text import Stack, Tokens, written
from fedloom.errors import BackboneError, DataError
from fedloom.places import Place
from fedloom.tensors import Tensors

LAYERS: Mapping[str, str] = {
    "q_proj": "attention.attention.query",
    "k_proj": "attention.attention.key",
    "v_proj": "attention.attention.value",
    "out_proj": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "block": "output",
}


class ViLT:
    """A Hugging Face ViltModel as a `Network`.

    Every example has an image and a text; of a data set without any text, such as one for image classification, each
    text is empty. A text is cut to the model's number of positions (40 in the published models).
    """

    fuses, short = True, False
    trunk = "joint"

    def __init__(self, module: Any, processor: Any, towers: Sequence[str] = ("joint",)):
        if tuple(towers) != ("joint",):
            raise BackboneError(f"towers {list(towers)} were asked for; ViLT has 'joint' alone.")
        self.module = module
        self.processor: Sequence[Any] = processor
        self.image_processor, tokenizer = processor
        config = module.config
        self.dim: int = config.hidden_size
        self.stack = Stack("joint", module.encoder.layer, LAYERS)
        self.blocks = len(self.stack)
        self.places: Mapping[Place, nn.Module] = self.stack.places(self.dim)
        self.sequences: Mapping[Place, nn.Module] = self.stack.sequences(self.places)
        self.adapted: Sequence[nn.Module] = [module]
        self.tokens = Tokens(tokenizer, config.max_position_embeddings, module.device)
        self._mean, self._std = (
            torch.tensor(getattr(self.image_processor, name)).view(1, 3, 1, 1).to(module.device)
            for name in ("image_mean", "image_std")
        )

    def decode(self, image: Image.Image) -> Tensor:
        """At the processor's size: a square, or the published models' shorter side of 384 and longer of at most 640."""
        pixels = self.image_processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
        return pixels[0].round().clamp(0, 255).to(torch.uint8)  # type: ignore[no-any-return]

    def features(self, batch: Batch, live: Collection[str]) -> Features:
        hidden, mask, done = self.stack.resume(batch.prefix) if batch.prefix else (*self._embed(batch), 0)
        states = self.module.layernorm(self.stack(hidden, mask, done))
        pooled = states[:, 0] if self.module.pooler is None else self.module.pooler(states)
        return Features(pooled.float())

    def mask(self, place: Place, batch: Batch, h: Tensor) -> Tensor:
        if batch.prefix:
            return self.stack.resume(batch.prefix)[1]
        texts, patches = self.tokens(_texts(batch))[1], _packing(self._shown(_images(batch)))[1]
        return torch.cat([texts, torch.ones_like(texts[:, :1]), patches], dim=1)

    def prefix(self, batch: Batch, blocks: int) -> Tensors:
        return self.stack.prefix(*self._embed(batch), blocks)

    def _embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """States before the first block, (n, positions, d), and which of them are not padding."""
        parts = self.module.embeddings
        ids, written = self.tokens(_texts(batch))
        patches, shown = self._patches(_images(batch))
        texts, images = parts.token_type_embeddings.weight[:2]
        hidden = torch.cat([parts.text_embeddings(input_ids=ids) + texts, patches + images], dim=1)
        return hidden, torch.cat([written, shown], dim=1)

    def _patches(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[CLS] and embedded patches, each image's own first, (n, 1 + most, d), and which of them are not padding."""
        parts = self.module.embeddings
        grid = parts.patch_embeddings((images[:, :3].float() / 255 - self._mean) / self._std)
        if images.shape[1] == 3:
            patches = (grid + self._positions(*grid.shape[2:])).flatten(2).transpose(1, 2)
            mask = torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device)
        else:
            shown = self._shown(images)
            grid = grid + torch.stack([self._positions_of(cells) for cells in shown])
            order, mask = _packing(shown)
            patches = grid.flatten(2).transpose(1, 2).gather(1, order[..., None].expand(-1, -1, self.dim))
        first = (parts.cls_token + parts.position_embeddings[:, :1]).expand(len(images), -1, -1)
        return torch.cat([first, patches], dim=1), F.pad(mask, (1, 0), value=True)

    def _positions(self, rows: int, columns: int) -> Tensor:
        """The square of position embeddings, stretched to a grid, (d, rows, columns)."""
        side = self.module.config.image_size // self.module.config.patch_size
        square = self.module.embeddings.position_embeddings[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        return F.interpolate(square, (rows, columns), mode="bilinear", align_corners=True)[0]

    def _positions_of(self, shown: Tensor) -> Tensor:
        """The same for the part of a grid that is shown, zeros elsewhere."""
        rows, columns = int(shown[:, 0].sum()), int(shown[0].sum())
        return F.pad(self._positions(rows, columns), (0, shown.shape[1] - columns, 0, shown.shape[0] - rows))

    def _shown(self, images: Tensor) -> Tensor:
        """Which patches an image fills, (n, rows, columns)."""
        size = self.module.config.patch_size
        corners = images[:, -1, size - 1 :: size, size - 1 :: size]
        return corners > 0 if images.shape[1] > 3 else torch.ones_like(corners, dtype=torch.bool)


def _packing(shown: Tensor) -> tuple[Tensor, Tensor]:
    """The order in which each image's own patches come first, cut to the most that one has, and which of those are."""
    mask, order = shown.flatten(1).sort(dim=1, descending=True, stable=True)
    most = int(mask.sum(1).max())
    return order[:, :most], mask[:, :most]


def _images(batch: Batch) -> Tensor:
    if batch.images is None:
        raise DataError("ViLT reads an image with each text, and these examples have none; name [data.columns] image.")
    return batch.images


def _texts(batch: Batch) -> tuple[str, ...]:
    return ("",) * len(batch) if batch.texts is None else written(batch.texts)
