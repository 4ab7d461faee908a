"""Adapters: pure functions of a hidden state and a few named tensors.

An adapter has no module and no memory. Its tensors are a value: initialised, trained, sent, aligned, averaged and
thrown away like any other, at whatever width they happen to have. What an adapter has to be, `fedloom.places` says.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, TypeAlias

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import Generator, Tensor, nn

from fedloom.places import Added, Place, Symmetry
from fedloom.tensors import Tensors, at, under

Width: TypeAlias = Annotated[int, Ge(1)]
Blocks: TypeAlias = Annotated[int, Ge(0)]
Deviation: TypeAlias = Annotated[float, Ge(0)]


@dataclass(frozen=True)
class Bottleneck:
    r"""Bottleneck adapter (Houlsby et al., 2019, arXiv 1902.00751), as FedDAT and FedPIA place it: after a block.

    .. math:: y = x + W_u\,\sigma(W_d x + b_d) + b_u

    down (b, d), down_bias (b), up (d, b), up_bias (d). Both projections start at N(0, std), biases at zero;
    `std_up = 0` starts from the frozen model.
    """

    width: Width = 48  # b, hidden units: d/16 in a base model
    activation: Literal["relu", "gelu"] = "relu"  # σ
    std: Deviation = 0.02
    std_up: Deviation | None = None  # of W_u; None: the same as `std`
    last: Blocks | None = None  # only in the last blocks of a tower; None: in all

    symmetry: ClassVar[Symmetry] = {"down": ("hidden", None), "down_bias": ("hidden",), "up": (None, "hidden")}

    def at(self, place: Place) -> bool:
        return place.kind == "block" and place.within(self.last)

    def init(self, place: Place, rng: Generator) -> Tensors:
        std_up = self.std if self.std_up is None else self.std_up
        return {
            "down": torch.randn(self.width, place.in_dim, generator=rng) * self.std,
            "down_bias": torch.zeros(self.width),
            "up": torch.randn(place.out_dim, self.width, generator=rng) * std_up,
            "up_bias": torch.zeros(place.out_dim),
        }

    def pre(self, h: Tensor, tensors: Tensors) -> Tensor:
        return F.linear(h, tensors["down"], tensors["down_bias"])

    def post(self, units: Tensor) -> Tensor:
        """What hidden units pass on: σ."""
        return F.relu(units) if self.activation == "relu" else F.gelu(units)

    def __call__(self, h: Tensor, tensors: Tensors) -> Tensor:
        return F.linear(self.post(self.pre(h, tensors)), tensors["up"], tensors["up_bias"])


@dataclass(frozen=True)
class LoRA:
    r"""Low-rank adapter (Hu et al., 2021, arXiv 2106.09685), each rank behind a gate where `gated` (SoRA, Ding et al.,
    2023, arXiv 2311.11696).

    .. math:: y = W x + \tfrac{\alpha}{r} B\,(g \circ A x)

    A (r, in), B (out, r), gate (r). B starts at zero. `alpha / rank` is a constant of the federation and is never read
    off a tensor, whose rank may shrink. The starts are those of HF PEFT: `uniform` its default (Kaiming uniform,
    a = √5), `normal` its gaussian, A ~ N(0, 1/r).
    """

    rank: Width = 8
    alpha: Annotated[float, Gt(0)] = 16.0  # α
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    gated: bool = False
    start: Literal["uniform", "normal"] = "uniform"  # of A
    start_gate: Literal["ones", "normal"] = "ones"
    last: Blocks | None = None  # only in the last blocks of a tower; None: in all

    symmetry: ClassVar[Symmetry] = {"A": ("hidden", None), "gate": ("hidden",), "B": (None, "hidden")}

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def at(self, place: Place) -> bool:
        return place.kind == "linear" and place.layer in self.targets and place.within(self.last)

    def init(self, place: Place, rng: Generator) -> Tensors:
        shape = (self.rank, place.in_dim)
        if self.start == "uniform":
            A = (torch.rand(shape, generator=rng) * 2 - 1) / place.in_dim**0.5
        else:
            A = torch.randn(shape, generator=rng) / self.rank
        tensors = {"A": A, "B": torch.zeros(place.out_dim, self.rank)}
        if self.gated:
            ones = self.start_gate == "ones"
            tensors["gate"] = torch.ones(self.rank) if ones else torch.randn(self.rank, generator=rng)
        return tensors

    def pre(self, h: Tensor, tensors: Tensors) -> Tensor:
        units = F.linear(h, tensors["A"])
        return units * tensors["gate"] if "gate" in tensors else units

    def post(self, units: Tensor) -> Tensor:
        """What hidden units pass on: they are linear."""
        return units

    def __call__(self, h: Tensor, tensors: Tensors) -> Tensor:
        return F.linear(self.pre(h, tensors), tensors["B"]) * self.scale


@dataclass(frozen=True)
class Sum:
    """Two adapters at once; where both are, their tensors are named `a/...` and `b/...`."""

    a: Added
    b: Added

    symmetry: ClassVar[Symmetry] = {}  # the two keep their own hidden units: align them one by one

    def at(self, place: Place) -> bool:
        return self.a.at(place) or self.b.at(place)

    def init(self, place: Place, rng: Generator) -> Tensors:
        parts = (("a", self.a), ("b", self.b))
        return {k: t for name, part in parts if part.at(place) for k, t in at(name, part.init(place, rng)).items()}

    def _parts(self, tensors: Tensors) -> list[tuple[Added, Tensors]]:
        return [(part, own) for name, part in (("a", self.a), ("b", self.b)) if (own := under(name, tensors))]

    def pre(self, h: Tensor, tensors: Tensors) -> Tensor:
        return torch.cat([part.pre(h, own) for part, own in self._parts(tensors)], dim=-1)

    def __call__(self, h: Tensor, tensors: Tensors) -> Tensor:
        return torch.stack([part(h, own) for part, own in self._parts(tensors)]).sum(0)


@dataclass(frozen=True)
class Head:
    """The adapter that adds nothing: only the task's head is trained (a linear probe)."""

    symmetry: ClassVar[Symmetry] = {}

    def at(self, place: Place) -> bool:
        return False

    def init(self, place: Place, rng: Generator) -> Tensors:
        return {}

    def pre(self, h: Tensor, tensors: Tensors) -> Tensor:
        return h[..., :0]

    def __call__(self, h: Tensor, tensors: Tensors) -> Tensor:
        return torch.zeros_like(h)


@dataclass(frozen=True)
class IA3:
    r"""(IA)³ (Liu et al., 2022, arXiv 2205.05638): a factor for each output of a layer.

    .. math:: y = l \odot (W x + b)

    l (out), from one. Deviation: the paper scales keys, values, and what the feed-forward's non-linearity returns; here
    fc1 is scaled before it, so that all three are outputs of linear layers.
    """

    targets: tuple[str, ...] = ("k_proj", "v_proj", "fc1")
    last: Blocks | None = None  # only in the last blocks of a tower; None: in all

    def at(self, place: Place) -> bool:
        return place.kind == "linear" and place.layer in self.targets and place.within(self.last)

    def init(self, place: Place, rng: Generator) -> Tensors:
        return {"l": torch.ones(place.out_dim)}

    def factor(self, out: Tensor, tensors: Tensors) -> Tensor:
        return tensors["l"]


@dataclass(frozen=True)
class Attention:
    r"""FedCLIP's adapter (Lu et al., 2023, arXiv 2302.13485): attention over the dimensions of CLIP's image features.

    .. math:: y = x \odot \mathrm{softmax}(W_2 \tanh(W_1 x + b_1) + b_2)

    W1, W2 (d, d), b1, b2 (d): uniform within 1/√d, as torch starts a linear layer. Scores against texts do not see that
    the factors sum to one: they are of the normalised features. The towers are left as they are.

    FedAvg of it is FedCLIP (the row `fedclip`) with this deviation: its sites descend CLIP's symmetric contrastive loss
    within a batch, with Adam; here they descend the task's, the cross-entropy over all classes, with the recipe's
    optimiser, as every other row does.
    """

    def at(self, place: Place) -> bool:
        return place.kind == "features"

    def init(self, place: Place, rng: Generator) -> Tensors:
        d = place.in_dim
        shapes = {"W1": (d, d), "b1": (d,), "W2": (d, d), "b2": (d,)}
        return {leaf: (torch.rand(shape, generator=rng) * 2 - 1) / d**0.5 for leaf, shape in shapes.items()}

    def factor(self, out: Tensor, tensors: Tensors) -> Tensor:
        units = F.linear(out, tensors["W1"], tensors["b1"]).tanh()
        return F.linear(units, tensors["W2"], tensors["b2"]).softmax(-1)


@dataclass(frozen=True)
class Prompt:
    r"""Prompts in every block (VPT-deep, Jia et al., 2022, arXiv 2203.12119) of a CLIP, a ViLT or a text encoder.

    .. math:: [\,\cdot\,, y] = \mathrm{block}([P, x])

    tokens (n, d), from N(0, std). They stand first, where every position sees them, under a causal mask too, and have
    no position embedding.
    """

    width: Width = 4  # n, positions
    std: Deviation = 0.02
    last: Blocks | None = None  # only in the last blocks of a tower; None: in all

    def at(self, place: Place) -> bool:
        return place.kind == "block" and place.within(self.last)

    def init(self, place: Place, rng: Generator) -> Tensors:
        return {"tokens": torch.randn(self.width, place.in_dim, generator=rng) * self.std}

    def positions(self, tensors: Tensors) -> Tensor:
        return tensors["tokens"]


@dataclass(frozen=True)
class Context:
    r"""Learned words (CoOp, Zhou et al., 2022, arXiv 2109.01134) of the texts that a CLIP holds images against.

    .. math:: [\mathrm{start}, V_1, \dots, V_n, \mathrm{class}, \dots]

    tokens (n, d), from N(0, std), stand in place of the first n words of every text, one context for all classes, and
    have their position embeddings. The task's template begins with as many words, whichever they are: `X X X X {}.`

    FedAvg of it is PromptFL (Guo et al., 2022, arXiv 2208.11625; the row `promptfl`) with these deviations: n is 4,
    where theirs is 16, for a text tower of 24 positions; the recipe's optimiser in place of SGD, as in every other row.
    """

    width: Width = 4  # n, words
    std: Deviation = 0.02

    def at(self, place: Place) -> bool:
        return place.kind == "words"

    def init(self, place: Place, rng: Generator) -> Tensors:
        return {"tokens": torch.randn(self.width, place.in_dim, generator=rng) * self.std}

    def positions(self, tensors: Tensors) -> Tensor:
        return tensors["tokens"]


@dataclass(frozen=True)
class BitFit:
    """Every bias (Ben Zaken et al., 2022, arXiv 2106.10199)."""

    def takes(self, module: nn.Module, leaf: str) -> bool:
        return leaf.endswith("bias")


@dataclass(frozen=True)
class Norms:
    """Scale and shift of every layer norm."""

    def takes(self, module: nn.Module, leaf: str) -> bool:
        return isinstance(module, nn.LayerNorm)


@dataclass(frozen=True)
class Everything:
    """Every parameter of the adapted towers: full fine-tuning."""

    def takes(self, module: nn.Module, leaf: str) -> bool:
        return True


ADAPTERS: Mapping[str, type] = {
    "attention": Attention,
    "bitfit": BitFit,
    "bottleneck": Bottleneck,
    "context": Context,
    "everything": Everything,
    "head": Head,
    "ia3": IA3,
    "lora": LoRA,
    "norms": Norms,
    "prompt": Prompt,
}
