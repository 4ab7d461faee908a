"""BERT (Devlin et al., 2019, arXiv 1810.04805) and its kind: RoBERTa, XLM-RoBERTa, ELECTRA, DistilBERT.

One tower, `text`. Linear places are each block's q_proj, k_proj, v_proj, out_proj, fc1, fc2. Block places are the
block's output, which in these post-norm encoders has been normalised: y = x + adapter(x) with x after the layer norm.

`pooled` is the mean of the last states over all tokens that are not padding, [CLS] and [SEP] included. The pooler of
the checkpoint is left out: RoBERTa and DistilBERT were pre-trained without one, BERT's was trained to tell whether two
sentences follow each other, and the mean is defined for all of them.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

import torch
from PIL import Image
from torch import Tensor, nn

from fedloom.backbones.batches import Batch, Features
from fedloom.errors import BackboneError, DataError
from fedloom.places import Place
from fedloom.tensors import Tensors

BATCHES_KEPT = 8  # batches whose tokens are kept: a mask is asked for at each place

BERT: Mapping[str, str] = {
    "q_proj": "attention.self.query",
    "k_proj": "attention.self.key",
    "v_proj": "attention.self.value",
    "out_proj": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "block": "output",
}
DISTILBERT: Mapping[str, str] = {
    "q_proj": "attention.q_lin",
    "k_proj": "attention.k_lin",
    "v_proj": "attention.v_lin",
    "out_proj": "attention.out_lin",
    "fc1": "ffn.lin1",
    "fc2": "ffn.lin2",
    "block": "output_layer_norm",
}


@dataclass(frozen=True, eq=False)
class Stack:
    """A tower's blocks, and where in each of them the places are; all blocks attend under one mask."""

    tower: str
    blocks: Sequence[nn.Module]
    layers: Mapping[str, str]  # a place's last part -> the module in a block; "block": the one that returns its output

    def __len__(self) -> int:
        return len(self.blocks)

    def places(self, width: int) -> dict[Place, nn.Module]:
        """Its places, of a residual stream of this width."""
        places: dict[Place, nn.Module] = {}
        for i, block in enumerate(self.blocks):
            for name, path in self.layers.items():
                layer = block.get_submodule(path)
                ends = (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else (width, width)
                kind = "linear" if isinstance(layer, nn.Linear) else "block"
                places[Place(f"{self.tower}.{i}.{name}", kind, *ends, len(self) - i)] = layer  # type: ignore[arg-type]
        return places

    def sequences(self, places: Mapping[Place, nn.Module]) -> dict[Place, nn.Module]:
        """The whole blocks, by their block places."""
        own = [place for place in places if place.kind == "block" and place.tower == self.tower]
        return dict(zip(own, self.blocks, strict=True))

    def __call__(self, hidden: Tensor, mask: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """States (n, positions, d) after the blocks `first` to `last`; mask (n, positions), False in the padding."""
        # What an attention adds to its scores: nothing, or the least number there is.
        added = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, torch.finfo(hidden.dtype).min)
        # A graph that is being exported has one path, and takes the longer.
        whole = not torch.compiler.is_exporting() and bool(mask.all())
        scores = None if whole else added[:, None, None, :].expand(-1, -1, mask.shape[1], -1)
        for block in self.blocks[first:last]:
            out = block(hidden, scores)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden

    def prefix(self, hidden: Tensor, mask: Tensor, blocks: int) -> Tensors:
        """The states after the first blocks, and the mask that belongs to them."""
        return {f"{self.tower}.{blocks}": self(hidden, mask, 0, blocks), f"{self.tower}.mask": mask}

    def resume(self, prefix: Tensors) -> tuple[Tensor, Tensor, int]:
        """What `prefix` made, less the positions that are padding in every example, and how many blocks are done."""
        mask = prefix[f"{self.tower}.mask"]
        ((name, hidden),) = ((name, t) for name, t in prefix.items() if name != f"{self.tower}.mask")
        used = mask.any(0)
        return hidden[:, used], mask[:, used], int(name.rpartition(".")[2])


class Tokens:
    """A tokenizer that knows how long a text its model takes; what is longer is cut."""

    def __init__(self, tokenizer: Any, longest: int, device: torch.device):
        self.tokenizer = tokenizer
        self.device = device
        self.longest = min(longest, tokenizer.model_max_length)
        self._encoded = lru_cache(BATCHES_KEPT)(self._encode)
        self._given: tuple[Tensor, Tensor] | None = None

    def __call__(self, texts: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """Ids and mask, (n, tokens) each, padded to the longest text."""
        return self._given or self._encoded(texts)

    @contextlib.contextmanager
    def reading(self, ids: Tensor, mask: Tensor) -> Iterator[None]:
        """Meanwhile these ids and this mask stand for whatever texts there are: what a graph has for an input."""
        before, self._given = self._given, (ids, mask)
        try:
            yield
        finally:
            self._given = before

    def _encode(self, texts: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        encoded = self.tokenizer(
            list(texts), padding=True, max_length=self.longest, truncation=True, return_tensors="pt"
        )
        return encoded["input_ids"].to(self.device), encoded["attention_mask"].bool().to(self.device)


def written(texts: Sequence[str]) -> tuple[str, ...]:
    """The texts, none of them empty; raises DataError."""
    if blank := [i for i, text in enumerate(texts) if not text.strip()]:
        raise DataError(
            f"text {blank[0] + 1} of {len(texts)} is empty; every example needs a question, report or sentence."
        )
    return tuple(texts)


class Text:
    """A Hugging Face encoder of BERT's kind as a `Network`."""

    fuses = short = False
    trunk = "text"

    def __init__(self, module: Any, tokenizer: Any, towers: Sequence[str] = ("text",)):
        if tuple(towers) != ("text",):
            raise BackboneError(f"towers {list(towers)} were asked for; a text encoder has 'text' alone.")
        if getattr(module, "pooler", None) is not None:
            module.pooler = None
        self.module = module
        self.processor: Sequence[Any] = (tokenizer,)
        config = module.config
        self.dim: int = config.hidden_size
        distil = config.model_type == "distilbert"
        self.stack = (
            Stack("text", module.transformer.layer, DISTILBERT) if distil else Stack("text", module.encoder.layer, BERT)
        )
        self.blocks = len(self.stack)
        self.places: Mapping[Place, nn.Module] = self.stack.places(self.dim)
        self.sequences: Mapping[Place, nn.Module] = self.stack.sequences(self.places)
        self.adapted: Sequence[nn.Module] = [module]
        # RoBERTa numbers positions from the one after its padding token.
        first = config.pad_token_id + 1 if "roberta" in config.model_type else 0
        self.tokens = Tokens(tokenizer, config.max_position_embeddings - first, module.device)

    def decode(self, image: Image.Image) -> NoReturn:
        raise DataError('this backbone reads texts alone; set image = "none" in [data.columns].')

    def features(self, batch: Batch, live: Collection[str]) -> Features:
        hidden, mask, done = self.stack.resume(batch.prefix) if batch.prefix else (*self._embed(batch), 0)
        hidden = self.stack(hidden, mask, done)
        shown = mask[..., None].to(hidden.dtype)
        return Features(((hidden * shown).sum(1) / shown.sum(1)).float())

    def mask(self, place: Place, batch: Batch, h: Tensor) -> Tensor:
        return self.stack.resume(batch.prefix)[1] if batch.prefix else self.tokens(self._texts(batch))[1]

    def prefix(self, batch: Batch, blocks: int) -> Tensors:
        return self.stack.prefix(*self._embed(batch), blocks)

    def _embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        ids, mask = self.tokens(self._texts(batch))
        hidden = self.module.embeddings(input_ids=ids)
        # ELECTRA's small models embed in fewer dimensions than they think in.
        widen = getattr(self.module, "embeddings_project", None)
        return hidden if widen is None else widen(hidden), mask

    def _texts(self, batch: Batch) -> tuple[str, ...]:
        if batch.texts is None:
            raise DataError("the examples have no text; name their column in [data.columns].")
        return written(batch.texts)
