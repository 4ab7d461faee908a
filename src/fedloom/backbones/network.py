"""What a family of models has to say of itself to take adapters."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from PIL import Image
from torch import Tensor, nn

from fedloom.backbones.batches import Batch, Features
from fedloom.places import Place
from fedloom.tensors import Tensors


class Network(Protocol):
    """A Hugging Face model, and what is particular about its family."""

    module: nn.Module
    processor: Sequence[Any]  # of pictures and of words, as transformers saves them
    dim: int  # of Features.pooled
    places: Mapping[Place, nn.Module]  # where added adapters may go, in the towers that are adapted
    sequences: Mapping[Place, nn.Module]  # where positions may be inserted: whole blocks, and the words of texts
    adapted: Sequence[nn.Module]  # the modules whose parameters replaced adapters may take
    fuses: bool  # whether it reads an image and a text together, or one of the two
    trunk: str  # the tower whose prefix can be cached
    blocks: int  # of that tower
    short: bool  # whether its last block runs only where the pooled features read it, if the family can

    def decode(self, image: Image.Image) -> Tensor:
        """A picture as the model sees it, before normalisation: (3, height, width) uint8."""

    def features(self, batch: Batch, live: Collection[str]) -> Features:
        """The forward pass. `live` names the towers under an adapter, whose results must not be reused."""

    def mask(self, place: Place, batch: Batch, h: Tensor) -> Tensor:
        """Which positions of the place's input `h` (m, positions, in_dim) are not padding: (m, positions) bool."""

    def prefix(self, batch: Batch, blocks: int) -> Tensors:
        """What the embeddings and the first `blocks` frozen blocks make of the batch, (n, ...) each."""


class Junction(nn.Module):
    """A block place inside a block, where what is read is not what is added to: LN(residual) and residual in BERT."""

    def forward(self, read: Tensor, onto: Tensor) -> Tensor:
        return onto
