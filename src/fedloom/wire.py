r"""The wire between a method and an engine: what crosses, and as how many bytes. Methods do not know of it.

    [wire]
    up = ["delta", "int8", "zstd"]       # from a site to the server
    down = ["bf16", "shuffle", "zstd"]   # from the server to a site
    budget = "200 kB"                    # of what a site sends in a round

A chain is of these stages, always in this order; an empty one is safetensors as it is. The server gives and receives, a
site is given and sends (both in `federation.site_round`): an engine carries bytes.

    delta     up: the difference to what the site was given, and what the rounds before left out
    bf16      16 bits a number, or
    int8      8 bits a number, with a scale for each row
    shuffle   bytes of one significance side by side, for zstd to see that they are alike
    zstd      compressed

**Feedback** (Seide et al., 2014, Interspeech; Karimireddy et al., 2019, arXiv 1901.09847). Of the change d that a site
means to send it sends what the chain C leaves of it, and keeps the rest e for the next round:

.. math:: c_t = C(d_t + e_t), \qquad e_{t+1} = d_t + e_t - c_t, \qquad \sum_{t \le T} c_t = \sum_{t \le T} d_t - e_{T+1}

so that what was sent tracks what was meant, and steps smaller than the rounding arrive in time. e is kept under wire/
in the file of the site's private state. The server adds c to the `shared` that it holds, unrounded, so that rounding on
the way down moves where sites start and never stays in the model. Hence a chain that rounds, either way, needs `delta`.

**Budget.** Of the rows of all differences (`coding.rows`) those of the greatest norm are sent, as many as the frame has
room for; the others are zero in it, and stay in the feedback. A site whose frame is too long without any row refuses.

No difference is taken of a tensor of another shape than the one that was given (a rank or a width of the site's own),
which is rounded and has no feedback; nor of one that has fewer than 32 elements or other numbers than float32, which is
not rounded either. What stands under control/ is a change already. A method that makes its adapter anew each round, and
does not go on from what it was given, gains nothing by `delta`; under a tight budget its feedback is of an adapter that
is gone.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from fedloom.coding import bf16, compressed, decompressed, int8, large, rows, shuffled, unrounded, unrowed, unshuffled
from fedloom.errors import RecipeError, StoreError, UpdateError
from fedloom.tensors import Shared, Tensors, from_bytes, not_finite, to_bytes
from fedloom.training import Positive

Stage: TypeAlias = Literal["delta", "bf16", "int8", "shuffle", "zstd"]
STAGES: tuple[Stage, ...] = get_args(Stage)
UNITS = {"bytes": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}
LEAST_ROOM, ROOM = 1 << 26, 256  # what a frame of the server may unpack to: 64 MiB, or so many times its own length


@dataclass(frozen=True)
class Wire:
    """[wire]: a chain each way, and how much a site may send."""

    up: tuple[Stage, ...] = ()
    down: tuple[Stage, ...] = ()
    budget: Positive | str | None = None  # bytes that a site sends in a round, at most: 200000, or "200 kB"

    def __post_init__(self) -> None:
        for way, chain in (("up", self.up), ("down", self.down)):
            if list(chain) != [stage for stage in STAGES if stage in chain]:
                order = [stage for stage in STAGES if stage in chain]
                raise RecipeError(f"{way} = {list(chain)}; each stage stands once, in this order: {order}.")
            if {"bf16", "int8"} <= {*chain}:
                raise RecipeError(f"{way} = {list(chain)} rounds twice; take bf16 or int8.")
            if "shuffle" in chain and ("int8" in chain or "zstd" not in chain):
                raise RecipeError(
                    f"{way} = {list(chain)}: shuffle is for what zstd sees of numbers of several bytes; leave it out."
                )
        if "delta" in self.down:
            raise RecipeError("down has 'delta'; sites may sit out, and know different things: leave it out.")
        if {"bf16", "int8"} & {*self.up, *self.down} and "delta" not in self.up:
            raise RecipeError(
                f"up = {list(self.up)}, down = {list(self.down)} round what crosses, and steps smaller than the "
                "rounding would be lost round after round; let up begin with 'delta', which keeps them."
            )
        if self.most is not None and not {"delta", "zstd"} <= {*self.up}:
            raise RecipeError(
                f"a budget is kept by leaving out differences, which zstd packs to nothing: up = {list(self.up)} needs "
                "'delta' and 'zstd'."
            )

    @property
    def most(self) -> int | None:
        """The budget in bytes."""
        if not isinstance(self.budget, str):
            return self.budget
        said = re.fullmatch(r"(\d+(?:\.\d+)?) ?(bytes|kB|MB|GB)", self.budget)
        if said is None or (most := int(float(said[1]) * UNITS[said[2]])) < 1:
            raise RecipeError(f'budget = \'{self.budget}\'; expected bytes, as in 200000, "200 kB" or "1.5 MB".')
        return most

    @property
    def feeds_back(self) -> bool:
        """Whether a site keeps what did not cross."""
        return self.most is not None or not {"bf16", "int8"}.isdisjoint(self.up)

    # Down

    def give(self, shared: Tensors) -> bytes:
        """The server's frame, which is the same for every site."""
        return _packed(self.down, shared)

    def given(self, frame: bytes) -> Shared:
        """What a site reads in the server's frame; raises UpdateError where it cannot be one.

        Its shapes are the method's affair: a site cannot know them beforehand.
        """
        shared = _unpacked(self.down, frame, max(LEAST_ROOM, ROOM * len(frame)), "the server")
        own = (name for name in shared if name.partition("/")[0] in ("server", "wire"))
        if (name := next(own, not_finite(shared))) is not None:
            raise UpdateError(f"the server sent '{name}', which is its own or is not finite; take up an older round.")
        return Shared(shared)

    # Up

    def send(self, site: str, tensors: Tensors, given: Tensors, left: Tensors) -> tuple[bytes, dict[str, Tensor]]:
        """A site's frame, and what is left for the next round.

        given: what the site was given in this round; left: what the round before left
        raises UpdateError: the update is not finite, or has no room in the budget
        """
        meant = self.meant(tensors, given, left)
        if not self.feeds_back:
            return _packed(self.up, meant), {}
        if (name := not_finite(meant)) is not None:
            raise UpdateError(f"site '{site}' has '{name}' with values that are not finite; lower [training] lr.")
        changes = [name for name in meant if _changes(name, tensors, given)]
        frame, kept = self._fitting(site, meant, changes)
        sent = unrounded(_rounded(self.up, kept))
        return frame, {name: meant[name] - sent[name] for name in changes}

    def receive(self, site: str, frame: bytes, shared: Tensors, most: int) -> Shared:
        """What the server reads in a site's frame.

        shared: what the server gave, unrounded; most: bytes to which the frame may unpack
        raises UpdateError: the frame cannot be one of this wire, is longer than the budget, or unpacks to more
        """
        if self.most is not None and len(frame) > self.most:
            raise UpdateError(
                f"site '{site}' sent {len(frame)} bytes, more than the budget of {self.most}; let it run the recipe of "
                "this federation."
            )
        sent = _unpacked(self.up, frame, most, f"site '{site}'")
        return Shared(_moved(sent, shared, 1) if "delta" in self.up else sent)

    def meant(self, tensors: Tensors, given: Tensors, left: Tensors) -> dict[str, Tensor]:
        """What a site would send if it were free: differences d + e, and the rest as it is."""
        if "delta" not in self.up:
            return dict(tensors)
        moved = _moved(tensors, given, -1)
        kept = {name: e for name, e in left.items() if _changes(name, tensors, given) and e.shape == moved[name].shape}
        return {name: tensor + kept[name] if name in kept else tensor for name, tensor in moved.items()}

    def _fitting(self, site: str, meant: Tensors, changes: Sequence[str]) -> tuple[bytes, Tensors]:
        """The frame with as many rows of the changes as the budget has room for, and what is in it."""
        frame = _packed(self.up, meant)
        if self.most is None or len(frame) <= self.most:
            return frame, meant
        few, many = 0, sum(len(rows(meant[name])) for name in changes)
        frame = _packed(self.up, best := _greatest(few, meant, changes))
        if len(frame) > self.most:
            raise UpdateError(
                f"site '{site}' has to send {len(frame)} bytes at the least, and [wire] budget is {self.most}; raise "
                "it, or take a smaller adapter."
            )
        while many - few > 1:
            middle = (few + many) // 2
            tried = _packed(self.up, kept := _greatest(middle, meant, changes))
            if len(tried) <= self.most:
                few, frame, best = middle, tried, kept
            else:
                many = middle
        return frame, best


def _changes(name: str, tensors: Tensors, given: Tensors) -> bool:
    """Whether a tensor crosses as a change: what was given is like it."""
    alike = name in given and given[name].shape == tensors[name].shape
    return alike and large(tensors[name]) and large(given[name])


def _moved(tensors: Tensors, given: Tensors, sign: int) -> dict[str, Tensor]:
    """Tensors less what was given (-1), or with it again (+1), where they cross as a change of it."""
    based = {name for name in tensors if _changes(name, tensors, given) and not name.startswith("control/")}
    return {name: t + sign * given[name] if name in based else t for name, t in tensors.items()}


def _greatest(n: int, tensors: Tensors, names: Sequence[str]) -> dict[str, Tensor]:
    """The n rows of greatest norm among those of the named tensors, their others zero; other tensors as they are."""
    matrices = [rows(tensors[name]) for name in names]
    norms = torch.cat([torch.zeros(0), *(matrix.norm(dim=1) for matrix in matrices)])
    kept = torch.zeros(len(norms), dtype=torch.bool)
    kept[norms.argsort(descending=True, stable=True)[:n]] = True
    masks = torch.split(kept, [len(matrix) for matrix in matrices])
    left = (torch.where(mask[:, None], matrix, 0.0) for mask, matrix in zip(masks, matrices, strict=True))
    return {**tensors, **{name: unrowed(m, tensors[name].shape) for name, m in zip(names, left, strict=True)}}


def _rounded(chain: Sequence[Stage], tensors: Tensors) -> Tensors:
    return bf16(tensors) if "bf16" in chain else int8(tensors) if "int8" in chain else tensors


def _packed(chain: Sequence[Stage], tensors: Tensors) -> bytes:
    frame = to_bytes(_rounded(chain, tensors))
    frame = shuffled(frame, _size(chain)) if "shuffle" in chain else frame
    return compressed(frame) if "zstd" in chain else frame


def _unpacked(chain: Sequence[Stage], frame: bytes, most: int, who: str) -> dict[str, Tensor]:
    try:
        frame = decompressed(frame, most) if "zstd" in chain else frame
        frame = unshuffled(frame, _size(chain)) if "shuffle" in chain else frame
        tensors = from_bytes(frame)
        return tensors if {"bf16", "int8"}.isdisjoint(chain) else unrounded(tensors)
    except (UpdateError, StoreError) as e:
        raise UpdateError(
            f"{who} sent a frame that is not of [wire] {list(chain)}: {str(e).rstrip('.')}; let both run one recipe."
        ) from None


def _size(chain: Sequence[Stage]) -> int:
    """Bytes of most numbers in a frame."""
    return 2 if "bf16" in chain else 4
