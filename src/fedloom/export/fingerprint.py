"""What an export answers to inputs that never change: four pictures and four texts, the same everywhere.

The federation's own logits for them are kept with the export, so that whoever has it can tell whether it still is what
was trained, on another machine and under other versions of the libraries.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from fedloom.backbones.batches import Batch
from fedloom.backbones.network import Network
from fedloom.tasks import Task
from fedloom.tensors import generator

FILE = "fingerprint.safetensors"
SIDE, CELL = 256, 8  # of a picture, and of its squares of one colour, in pixels
TEXTS = (
    "what is shown?",
    "a photo of a small red boat on a lake",
    "is there anything unusual in the upper left part of the picture?",
    "none",
)
# By form, in float32: how far logits may be apart, absolute and beside the largest.
TOLERANCE: Mapping[str, float] = {"peft": 1e-5, "merged": 1e-5, "onnx": 1e-4}
COARSE = 2e-2  # of a backbone in bfloat16, whose products have 8 bits; what is merged or a graph computes in float32


@dataclass(frozen=True)
class Inputs:
    """What an example of a site has."""

    images: bool
    texts: bool

    def batch(self, network: Network, task: Task) -> Batch:
        """The fixed examples, as a backbone takes them."""
        pictures = torch.stack([network.decode(picture(i)) for i in range(len(TEXTS))]) if self.images else None
        targets = torch.zeros(len(TEXTS), dtype=torch.long)
        return Batch(targets, pictures, TEXTS if self.texts else None, task.candidates)


def picture(number: int) -> Image.Image:
    """A square picture of coloured cells."""
    cells = torch.randint(0, 256, (SIDE // CELL, SIDE // CELL, 3), generator=generator("fingerprint", number))
    pixels = cells.repeat_interleave(CELL, 0).repeat_interleave(CELL, 1)
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def tolerance(form: str, dtype: str) -> float:
    """How far the logits of a form may be from the federation's own; `dtype` of the backbone."""
    return TOLERANCE[form] if dtype == "float32" else COARSE


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a part of 1 + the largest |expected|: what a tolerance bounds. Infinite where shapes
    differ. Rounding is that of sums, whose summands a logit near zero has as large as any other."""
    if found.shape != expected.shape:
        return float("inf")
    return float(((found - expected).abs().max() / (1 + expected.abs().max())).nan_to_num(float("inf")))
