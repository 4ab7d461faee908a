"""Named tensors: everything that is sent, kept, trained or averaged is a flat mapping of them.

A name is a place, a slash and a leaf: `vision.3.q_proj/A`. These first parts are reserved:

    head     the task's head                    opt      optimiser moments a method keeps between rounds
    control  what steers training and is no     server   the server's own state: in its checkpoint, never sent
             part of the model                  wire     a wire's error feedback
    local    a private adapter                  choice   what a site chose for itself, on its held-out examples
    given    what the server tells every site, and no site sends back
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NewType

import torch
from safetensors import SafetensorError, TensorSpec, serialize
from safetensors.torch import load
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence

from fedloom.errors import StoreError, UpdateError

Tensors = Mapping[str, Tensor]
Shared = NewType("Shared", Tensors)  # known to the server and to every site
Private = NewType("Private", Tensors)  # never leaves its site

RESERVED = frozenset({"head", "opt", "control", "local", "choice", "given", "server", "wire"})

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BLOCK = 2**16  # elements of a long sum that are worked on at a time, so that they stay in the cache
SMALL = 2**14  # elements up to which a tensor is sooner copied beside others than looked at by itself


def by_place(tensors: Tensors) -> dict[str, dict[str, Tensor]]:
    """`{"3/A": a, "3/B": b}` as `{"3": {"A": a, "B": b}}`."""
    places: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        place, _, leaf = name.partition("/")
        places.setdefault(place, {})[leaf] = tensor
    return places


def at(place: str, leaves: Tensors) -> dict[str, Tensor]:
    """`{"A": a}` at `"3"` as `{"3/A": a}`: the inverse of `under`."""
    return {f"{place}/{leaf}": tensor for leaf, tensor in leaves.items()}


def under(place: str, tensors: Tensors) -> dict[str, Tensor]:
    """The tensors whose first part is `place`, without it."""
    return {name.removeprefix(f"{place}/"): t for name, t in tensors.items() if name.startswith(f"{place}/")}


def part(place: str, tensors: Tensors) -> dict[str, Tensor]:
    """The tensors whose first part is `place`, with it."""
    return {name: t for name, t in tensors.items() if name.startswith(f"{place}/")}


def without(place: str, tensors: Tensors) -> dict[str, Tensor]:
    """The tensors whose first part is not `place`."""
    return {name: t for name, t in tensors.items() if not name.startswith(f"{place}/")}


def of_model(tensors: Tensors) -> dict[str, Tensor]:
    """An adapter and a head: the tensors that are part of a model, and not reserved for something else."""
    others = RESERVED - {"head"}
    return {name: t for name, t in tensors.items() if name.partition("/")[0] not in others}


def only(names: Iterable[str], tensors: Tensors) -> dict[str, Tensor]:
    """The tensors of these names, in their order."""
    return {name: tensors[name] for name in names}


def shapes(tensors: Tensors) -> dict[str, torch.Size]:
    """By name."""
    return {name: tensor.shape for name, tensor in tensors.items()}


def same(a: Tensors, b: Tensors) -> bool:
    """Whether names, shapes and values are equal."""
    return shapes(a) == shapes(b) and all(torch.equal(a[name], b[name]) for name in a)


def mean(weighted: Iterable[tuple[Tensors, float]]) -> dict[str, Tensor]:
    r"""Weighted mean, name by name.

    .. math:: \bar t = \sum_k w_k t_k \big/ \sum_k w_k

    Folded in the order given, in float64, holding one sum: memory does not grow with the number of states. The mean of
    one state is that state, to the bit.

    weighted: pairs of a state and its weight w_k >= 0; the weights need not sum to one
    returns: tensors of the first state's names, shapes and dtypes
    raises UpdateError: no state, weights that sum to zero, or states of unlike names or shapes
    """
    sums: dict[str, Tensor] = {}
    first: Tensors | None = None
    total = 0.0
    for state, weight in weighted:
        if first is None:
            first, sums = state, {name: torch.zeros(t.shape, dtype=torch.float64) for name, t in state.items()}
        if state.keys() != sums.keys():
            differ = sorted(state.keys() ^ sums.keys())[:4]
            raise UpdateError(f"cannot average states of unlike names: {differ} differ.")
        for name, tensor in state.items():
            if tensor.shape != sums[name].shape:
                raise UpdateError(
                    f"cannot average '{name}' of shapes {tuple(sums[name].shape)} and {tuple(tensor.shape)}; "
                    "sites of unlike widths need a method that aligns them."
                )
            _add(sums[name], tensor, weight)
        total += weight
    if first is None or total <= 0:
        raise UpdateError("there is nothing to average: no site answered with a weight above zero.")
    return {name: (s / total).to(first[name].dtype) for name, s in sums.items()}


def padded(parts: Sequence[Tensor]) -> Tensor:
    """Tensors (n_i, positions_i, ...) as one, (sum of n_i, most positions, ...), with zeros after a shorter one."""
    return pad_sequence([row for part in parts for row in part], batch_first=True)


def squared_distance(a: Tensors, b: Tensors) -> Tensor:
    """Sum over all names of `a`, in sorted order, of the squared Euclidean distance to `b`; a scalar."""
    return torch.stack([(a[name] - b[name]).square().sum() for name in sorted(a)]).sum() if a else torch.zeros(())


def not_finite(tensors: Tensors) -> str | None:
    """The name of a tensor with a value that is not finite; None where all are."""
    looked_at = [tensor for tensor in tensors.values() if tensor.dtype in FLOATS]
    small = [tensor.flatten() for tensor in looked_at if tensor.numel() <= SMALL]
    large = [tensor for tensor in looked_at if tensor.numel() > SMALL]
    if all(map(_finite, [torch.cat(small), *large] if small else large)):
        return None
    return next(name for name, t in tensors.items() if t.dtype in FLOATS and not _finite(t))


def detached(tensors: Tensors) -> dict[str, Tensor]:
    """The same values, outside any graph."""
    return {name: tensor.detach() for name, tensor in tensors.items()}


def to_bytes(tensors: Tensors) -> bytes:
    """A safetensors frame: what crosses a wire. Two names may have one memory."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}  # alive while it is read
    return serialize(
        {
            name: TensorSpec(
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tensor.shape,
                data_ptr=tensor.data_ptr(),
                data_len=tensor.nbytes,
            )
            for name, tensor in whole.items()
        }
    )


def from_bytes(frame: bytes) -> dict[str, Tensor]:
    """Read a safetensors frame, its names sorted; raises StoreError if it is anything else."""
    try:
        # safetensors gives names in another order each time, and a sum over names has other last bits in each. Copies,
        # because a tensor that lies in the frame starts at any byte.
        return {name: tensor.clone() for name, tensor in sorted(load(frame).items())}
    except (SafetensorError, KeyError) as e:  # KeyError: a kind of number that torch does not have
        raise StoreError(f"a frame of {len(frame)} bytes is not safetensors: {e}.") from e


def digest(tensors: Tensors) -> str:
    """SHA-256 of names, shapes, dtypes and values, in the order of the names."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def generator(*key: object) -> Generator:
    """Randomness that is a function of the key alone, on every machine."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)


def _add(total: Tensor, tensor: Tensor, weight: float) -> None:
    """Add in place, to a sum in float64; of a long tensor torch would make one in float64 as a whole first."""
    if tensor.numel() <= BLOCK:
        total.add_(tensor, alpha=weight)
        return
    for into, block in zip(torch.split(total.view(-1), BLOCK), torch.split(tensor.reshape(-1), BLOCK), strict=True):
        into.add_(block, alpha=weight)


def _finite(tensor: Tensor) -> bool:
    """Whether all values are: the least and the greatest are, and neither is where one is nan."""
    return not tensor.numel() or all(bool(end.isfinite()) for end in torch.aminmax(tensor))
