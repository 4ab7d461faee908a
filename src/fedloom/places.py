"""Where adapters may go, and the four things that one may do there.

A backbone says where one may go (`Place`), the adapter says where it wants to (`at`), and `backbones.adaptable` puts it
there. `Added` adapters add to what a layer returns, `Scaled` ones multiply it, `Inserted` ones are positions that stand
in a block's sequence while it runs, or in place of words; `Replaced` ones stand in for the model's own parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

from torch import Generator, Tensor, nn

from fedloom.tensors import Tensors

Symmetry: TypeAlias = Mapping[str, tuple[str | None, ...]]  # leaf -> what its axes run over, where they may be permuted


@dataclass(frozen=True)
class Place:
    """Where an adapter reads and where its result goes.

    A `linear` place reads a layer's input and adds to its output; a `block` place reads a residual stream and adds
    to it; a `features` place does so with a tower's pooled features. A `words` place is where words are embedded.
    """

    name: str
    kind: Literal["linear", "block", "features", "words"]
    in_dim: int
    out_dim: int
    height: int  # blocks of its tower from here up, this one counted: 1 in the last block, 0 above it

    @property
    def tower(self) -> str:
        return self.name.partition(".")[0]

    @property
    def layer(self) -> str:
        return self.name.rpartition(".")[2]

    def within(self, last: int | None) -> bool:
        """Whether it is in the last blocks of its tower, or above them; None: anywhere."""
        return last is None or self.height <= last


@runtime_checkable
class Added(Protocol):
    """What is added at a place: `out + adapter(h, tensors)`."""

    symmetry: ClassVar[Symmetry]

    def at(self, place: Place) -> bool:
        """Whether it goes there."""

    def init(self, place: Place, rng: Generator) -> Tensors:
        """Fresh tensors for one place, by leaf."""

    def pre(self, h: Tensor, tensors: Tensors) -> Tensor:
        """Hidden units before the non-linearity, (..., width)."""

    def __call__(self, h: Tensor, tensors: Tensors) -> Tensor:
        """What is added, (..., out_dim), of the input h (..., in_dim)."""


@runtime_checkable
class Scaled(Protocol):
    """What multiplies what a place returns: `out * factor(out, tensors)`."""

    def at(self, place: Place) -> bool:
        """Whether it goes there."""

    def init(self, place: Place, rng: Generator) -> Tensors:
        """Fresh tensors for one place, by leaf."""

    def factor(self, out: Tensor, tensors: Tensors) -> Tensor:
        """Of what a place returns, (..., out_dim): a tensor that broadcasts with it."""


@runtime_checkable
class Inserted(Protocol):
    """Positions that stand before all others in a block's sequence while it runs, and leave it after; at a `words`
    place, in place of the first words of every text."""

    def at(self, place: Place) -> bool:
        """Whether it goes there, a block or words."""

    def init(self, place: Place, rng: Generator) -> Tensors:
        """Fresh tensors for one place, by leaf."""

    def positions(self, tensors: Tensors) -> Tensor:
        """What is inserted, (positions, in_dim)."""


@runtime_checkable
class Replaced(Protocol):
    """Which of the model's own parameters are trained; their tensors are the parameters themselves."""

    def takes(self, module: nn.Module, leaf: str) -> bool:
        """Whether the parameter `leaf` of `module` is trained."""


Adapter: TypeAlias = Added | Scaled | Inserted | Replaced
