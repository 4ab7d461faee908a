"""A device that is not the CPU, on machines that have none: tensors that say they are elsewhere, computed here.

As on an accelerator, tensors of two devices do not mix, save for single numbers, and numpy cannot read what is there.
Every operation is the CPU's own, so that results can be held equal to the bit.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

ELSEWHERE = torch.device("lazy")  # a name that torch knows, and has nothing for
CROSSES = ("aten::_to_copy", "aten::copy_")  # what may have its operands on two devices


class Held(Tensor):
    """A tensor elsewhere; `inner` has its values."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Held":
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=ELSEWHERE,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(op, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """Meanwhile tensors can be made there, and sent there."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(op, args, kwargs or {})


def computed(op: Any, args: Any, kwargs: Any) -> Any:
    """What an operation gives, on the device where it is done."""
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    there = any(isinstance(x, Held) for x in given)
    crosses = op.name().partition(".")[0] in CROSSES
    if there and not crosses and any(x.dim() for x in given if not isinstance(x, Held)):
        raise RuntimeError(f"{op}: expected all tensors to be on the same device, but found two")
    if (asked := kwargs.get("device")) is not None:
        there = torch.device(asked) == ELSEWHERE
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner_args, inner_kwargs = tree_map_only(Held, lambda x: x.inner, (args, kwargs))
    made = op(*inner_args, **inner_kwargs)
    if op.name().partition(".")[0] == "aten::copy_":
        return args[0]
    if not there:
        return made
    return return_and_correct_aliasing(op, args, kwargs, tree_map_only(Tensor, Held, made))
