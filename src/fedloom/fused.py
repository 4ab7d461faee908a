r"""The fast paths of adapters: what is added, its addition and its gradients as one function each.

The reference is the adapter's own `__call__`; tests hold the two equal. Here nothing of the size of a hidden state is
cast or kept twice: h stays in the dtype of the frozen weights, the small factors are cast to it, sums run in float32
inside each product, and gradients of the factors are float32 again.

In float32 both agree to rounding (1e-6 of the largest entry). In bfloat16, gradients of the factors at one place are
within 2 % of those of the reference, in norm: each factor and each product rounds to 8 bits. Through many layers the
roundings of both paths add up, and no bound is claimed.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fedloom.adapters import Bottleneck, LoRA
from fedloom.parted import Parted
from fedloom.tensors import Tensors

Fused = Callable[[Any, Tensor, Tensor, Tensors], Tensor]


class _LowRank(Function):
    r"""y = out + s (g ∘ h Aᵀ) Bᵀ, in the memory of `out`, which nobody needs after a linear layer.

    A (r, in), or (parts, r, in), where each of as many equal parts of the rows has factors of its own.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, h: Tensor, A: Tensor, B: Tensor, gate: Tensor | None, scale: float) -> Tensor:
        rows = _rows(h, A)
        down, up = A.to(h.dtype), (B if gate is None else B * gate[..., None, :]).to(h.dtype)
        units = rows @ down.mT
        ctx.save_for_backward(rows, units, down, up, B, gate)
        ctx.scale = scale
        ctx.mark_dirty(out)
        _add(_rows(out, A), units, up.mT, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (slope,) = grads
        rows, units, down, up, B, gate = ctx.saved_tensors
        dy = _rows(slope, down)
        du = (dy @ up) * ctx.scale
        dB = (dy.mT @ units).float() * ctx.scale  # of B ∘ g
        dh = (du @ down).view(*slope.shape[:-1], -1) if ctx.needs_input_grad[1] else None
        dgate = None if gate is None else (dB * B).sum(-2)
        return slope, dh, (du.mT @ rows).float(), dB if gate is None else dB * gate[..., None, :], dgate, None


class _Hidden(Function):
    r"""y = out + σ(h Wᵈᵀ + b_d) Wᵘᵀ + b_u, of a ReLU or a GELU; with parts as in `_LowRank`."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, h: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, relu: bool
    ) -> Tensor:
        rows = _rows(h, down)
        down, up = down.to(h.dtype), up.to(h.dtype)
        before = (rows @ down.mT).add_(down_bias[..., None, :])
        units = F.relu(before) if relu else F.gelu(before)
        ctx.save_for_backward(rows, before, units, down, up)
        ctx.relu = relu
        y = _rows(out, down) + up_bias[..., None, :].to(out.dtype)
        return _add(y, units, up.mT, 1.0).view(out.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (slope,) = grads
        rows, before, units, down, up = ctx.saved_tensors
        dy = _rows(slope, down)
        d_units = dy @ up
        d_before = d_units * (before > 0) if ctx.relu else torch.ops.aten.gelu_backward(d_units, before)
        dh = (d_before @ down).view(slope.shape) if ctx.needs_input_grad[1] else None
        d_down, d_up = (d_before.mT @ rows).float(), (dy.mT @ units).float()
        return slope, dh, d_down, d_before.float().sum(-2), d_up, dy.float().sum(-2), None


def _rows(h: Tensor, factor: Tensor) -> Tensor:
    """(..., d) as (rows, d), or as (parts, rows, d) where factors are (parts, ...)."""
    return h.reshape(*factor.shape[:-2], -1, h.shape[-1])


def _add(onto: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """onto + scale · a b, in its memory."""
    return (onto.addmm_ if onto.dim() == 2 else onto.baddbmm_)(a, b, alpha=scale)


def _lora(adapter: LoRA, h: Tensor, out: Tensor, leaves: Tensors) -> Tensor:
    y: Tensor = _LowRank.apply(out, h, leaves["A"], leaves["B"], leaves.get("gate"), adapter.scale)  # type: ignore[no-untyped-call]
    return y


def _bottleneck(adapter: Bottleneck, h: Tensor, out: Tensor, leaves: Tensors) -> Tensor:
    parts = (leaves[name] for name in ("down", "down_bias", "up", "up_bias"))
    y: Tensor = _Hidden.apply(out, h, *parts, adapter.activation == "relu")  # type: ignore[no-untyped-call]
    return y


def _parted(adapter: Parted, h: Tensor, out: Tensor, leaves: Tensors) -> Tensor:
    first = adapter.adapters[0]
    stacked = adapter.stacked(leaves)
    if stacked is None or not isinstance(first, LoRA | Bottleneck):
        return out + adapter(h.float(), leaves).to(out.dtype)
    return FUSED[type(first)](first, h, out, stacked)


FUSED: Mapping[type, Fused] = {  # (adapter, h, out, leaves) -> out + adapter(h)
    LoRA: _lora,
    Bottleneck: _bottleneck,
    Parted: _parted,
}
