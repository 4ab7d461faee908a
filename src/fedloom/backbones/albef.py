"""ALBEF (Li et al., 2021, arXiv 2107.07651): the network, and the ranking of candidate answers by its decoder.

Three towers: `vision` (ViT blocks), `text` (text and fusion layers), `decoder` (answers). Linear places are each
block's q_proj, k_proj, v_proj, out_proj, fc1, fc2, and where it reads another sequence x_q_proj, x_k_proj, x_v_proj,
x_out_proj. Block places are the residual stream after a ViT block, and in a text or decoder layer the junction of
`albef_model.Layer`: the adapter reads the layer's normal output and adds to the feed-forward's, before the same norm
is taken once more. The base model has 12 + 12 + 6 = 30 of them.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from fedloom.backbones.batches import Batch, Features
from fedloom.backbones.text import Tokens, written
from fedloom.errors import BackboneError, DataError
from fedloom.places import Place
from fedloom.tensors import Tensors

if TYPE_CHECKING:
    from fedloom.backbones.albef_model import AlbefModel

TOWERS = ("vision", "text", "decoder")
VISION = {  # name of a place: its module in a block
    "q_proj": "attention.q_proj",
    "k_proj": "attention.k_proj",
    "v_proj": "attention.v_proj",
    "out_proj": "attention.o_proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    "block": "",
}
TEXT = {
    "q_proj": "attention.self.query",
    "k_proj": "attention.self.key",
    "v_proj": "attention.self.value",
    "out_proj": "attention.output.dense",
    "x_q_proj": "crossattention.self.query",
    "x_k_proj": "crossattention.self.key",
    "x_v_proj": "crossattention.self.value",
    "x_out_proj": "crossattention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "block": "junction",
}
AT_ONCE = 64  # candidates in one decoder pass
TREES_KEPT = 8  # sets of candidates


@dataclass(frozen=True)
class Tree:
    """Candidate answers as one tree of their shared beginnings.

    A node stands for the pieces from the root ([CLS]) to it. A step is the choice of one piece after one node; an
    answer is the steps down to its end. All nodes pass through the decoder together, each reading its ancestors, so
    that a beginning is decoded once for all answers that share it, and nothing is padded.
    """

    ids: Tensor  # (1, nodes) the node's last piece
    position: Tensor  # (1, nodes) its depth
    reads: Tensor  # (1, nodes, nodes) bool, whether the column is the row itself or an ancestor of it
    step: Tensor  # (3, steps): candidate, node, piece

    @staticmethod
    def of(pieces: Sequence[Sequence[int]]) -> "Tree":
        """Of candidates as word pieces, [CLS] first and [SEP] last."""
        number: dict[tuple[int, ...], int] = {}
        steps = []
        for candidate, ids in enumerate(pieces):
            for end in range(1, len(ids)):
                node = number.setdefault(tuple(ids[:end]), len(number))
                steps.append((candidate, node, ids[end]))
        reads = torch.eye(len(number), dtype=torch.bool)
        for path, node in number.items():  # parents come before their children
            if len(path) > 1:
                reads[node] |= reads[number[path[:-1]]]
        return Tree(
            torch.tensor([[path[-1] for path in number]]),
            torch.tensor([[len(path) - 1 for path in number]]),
            reads[None],
            torch.tensor(steps).T,
        )

    def to(self, device: torch.device) -> "Tree":
        return Tree(*(tensor.to(device) for tensor in (self.ids, self.position, self.reads, self.step)))


class Albef:
    """An AlbefModel as a `Network`.

    Features.pooled is the fused [CLS] of the pair. Features.scores, where the batch has candidates, is the decoder's
    log-likelihood of each answer, summed over its pieces and its end as in ALBEF's ranking; softmax over them is the
    probability of an answer given that it is one of the candidates. (ALBEF first keeps the candidates whose first piece
    is likeliest; here all are scored, and all have gradients.)

    Of a data set without any text, such as one for image classification, each text is empty. The cached prefix is the
    vision tower's; the text layers are run each time: a question is short.
    """

    fuses, short = True, False
    trunk = "vision"

    def __init__(self, module: "AlbefModel", processor: Any, towers: Sequence[str] = TOWERS):
        if not towers or not set(towers) <= set(TOWERS):
            raise BackboneError(f"towers {list(towers)} were asked for; ALBEF has {', '.join(TOWERS)}.")
        self.module: Any = module
        self.processor: Sequence[Any] = processor
        self.image_processor, tokenizer = processor
        text: Any = module.config.text_config
        self.dim: int = text.hidden_size
        self.blocks = len(module.vision.layers)
        self.tokens = Tokens(tokenizer, text.max_position_embeddings, module.device)
        layers = {
            "vision": (module.vision.layers, VISION),
            "text": (module.text.layers, TEXT),
            "decoder": (module.decoder, TEXT),
        }
        self.sequences: Mapping[Place, nn.Module] = {}
        self.places: Mapping[Place, nn.Module] = {
            place: part for tower in towers for place, part in _places(tower, *layers[tower], self.dim).items()
        }
        parts: Mapping[str, list[nn.Module]] = {
            "vision": [module.vision],
            "text": [module.text],
            "decoder": [module.decoder, module.head],
        }
        self.adapted: Sequence[nn.Module] = [part for tower in towers for part in parts[tower]]
        self._trees = lru_cache(TREES_KEPT)(self._grow)
        self._mean, self._std = (
            torch.tensor(getattr(self.image_processor, name)).view(1, 3, 1, 1).to(module.device)
            for name in ("image_mean", "image_std")
        )

    def decode(self, image: Image.Image) -> Tensor:
        pixels = self.image_processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
        return pixels[0].round().clamp(0, 255).to(torch.uint8)  # type: ignore[no-any-return]

    def features(self, batch: Batch, live: Collection[str]) -> Features:
        ids, mask = self.tokens(_texts(batch))
        fused = self.module.fuse(self.module.words(ids, mask), mask, self._image(batch))
        pooled = fused[:, 0].float()
        return Features(pooled) if batch.candidates is None else Features(pooled, self._scores(batch, fused, mask))

    def mask(self, place: Place, batch: Batch, h: Tensor) -> Tensor:
        reads_other = place.layer in ("x_k_proj", "x_v_proj")
        if place.tower == ("decoder" if reads_other else "text"):  # else patches, or a tree's nodes
            return self.tokens(_texts(batch))[1]
        return torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)

    def prefix(self, batch: Batch, blocks: int) -> Tensors:
        return {f"vision.{blocks}": self._blocks(self._embed(batch.images), 0, blocks)}

    def _embed(self, images: Tensor | None) -> Tensor:
        if images is None:
            raise DataError(
                "ALBEF reads an image with each text, and these examples have none; name [data.columns] image."
            )
        pixels = (images.float() / 255 - self._mean) / self._std
        embedded: Tensor = self.module.vision.embeddings(pixels.to(self.module.dtype))
        return embedded

    def _blocks(self, hidden: Tensor, first: int, last: int) -> Tensor:
        for block in self.module.vision.layers[first:last]:
            hidden = block(hidden)
        return hidden

    def _image(self, batch: Batch) -> Tensor:
        """Image states: `AlbefModel.image`, from wherever the cached prefix ends."""
        if batch.prefix:
            ((name, hidden),) = batch.prefix.items()
            done = int(name.rpartition(".")[2])
        else:
            hidden, done = self._embed(batch.images), 0
        states: Tensor = self.module.vision.layernorm(self._blocks(hidden, done, self.blocks))
        return states

    def _scores(self, batch: Batch, fused: Tensor, mask: Tensor) -> Tensor:
        """(n, candidates), float32."""
        parts = []
        for tree, count in self._trees(batch.candidates):
            logits = self.module.head(self.module.decode(tree.ids, tree.position, tree.reads, fused, mask)).float()
            candidate, node, piece = tree.step
            steps = logits[:, node, piece] - logits.logsumexp(-1)[:, node]
            parts.append(steps.new_zeros(fused.shape[0], count).index_add(1, candidate, steps))
        return torch.cat(parts, dim=1)

    def _grow(self, candidates: tuple[str, ...]) -> list[tuple[Tree, int]]:
        tokens = self.tokens
        pieces = tokens.tokenizer(list(candidates), truncation=True, max_length=tokens.longest)["input_ids"]
        parts = [pieces[first : first + AT_ONCE] for first in range(0, len(pieces), AT_ONCE)]
        return [(Tree.of(part).to(tokens.device), len(part)) for part in parts]


def _texts(batch: Batch) -> tuple[str, ...]:
    return ("",) * len(batch) if batch.texts is None else written(batch.texts)


def _places(tower: str, layers: nn.ModuleList, paths: Mapping[str, str], dim: int) -> dict[Place, nn.Module]:
    places: dict[Place, nn.Module] = {}
    for i, layer in enumerate(layers):
        parts, height = dict(layer.named_modules()), len(layers) - i
        for name, path in paths.items():
            match parts.get(path):
                case None:  # a text layer below fusion has no cross-attention
                    continue
                case nn.Linear() as part:
                    place = Place(f"{tower}.{i}.{name}", "linear", part.in_features, part.out_features, height)
                case part:
                    place = Place(f"{tower}.{i}.{name}", "block", dim, dim, height)
            places[place] = part
    return places
