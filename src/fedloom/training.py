"""The one training step and the one training loop."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from torch.optim.adamw import adamw

from fedloom.adapters import Head
from fedloom.errors import TrainingError
from fedloom.tensors import Tensors, at, detached, under

if TYPE_CHECKING:
    from fedloom.backbones.batches import Batch
    from fedloom.site import Site

Count: TypeAlias = Annotated[int, Ge(0)]
Positive: TypeAlias = Annotated[int, Ge(1)]

BETAS = (0.9, 0.999)
EPSILON = 1e-8


@dataclass(frozen=True)
class Training:
    """How sites train."""

    lr: Annotated[float, Gt(0)] = 1e-3
    epochs: Positive = 1  # a round
    batch: Positive = 16
    optimiser: Literal["adamw", "sgd"] = "adamw"
    weight_decay: Annotated[float, Ge(0)] = 0.0  # of matrices; biases, norms and gates are left alone
    clip: Annotated[float, Gt(0)] | None = None  # the largest Euclidean norm of a step's gradient
    warmup_head: Count = 0  # epochs for a fresh private head, on the frozen model
    finetune: Count = 0  # epochs at each site after the last round; nothing is sent


@dataclass(frozen=True)
class State:
    """What a step changes: the tensors that are trained, and AdamW's moments of them."""

    tensors: Tensors
    moments: Tensors = field(default_factory=dict)  # m/NAME, v/NAME, t/NAME


def step(state: State, loss: Callable[[Tensors], Tensor], training: Training) -> tuple[State, float]:
    r"""One step of gradient descent: AdamW (Loshchilov & Hutter, 2019, arXiv 1711.05101) or plain SGD.

    loss: a scalar function of the tensors
    returns: the state after the step and the loss before it; `state` is left as it was
    raises TrainingError: the loss is not finite
    """
    free = leaves(state.tensors)
    slope, number = gradient(loss(free), free)
    return descend(state, slope, training), number


def leaves(tensors: Tensors) -> dict[str, Tensor]:
    """The same values, each the beginning of a graph."""
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}


def gradient(loss: Tensor, free: Tensors) -> tuple[dict[str, Tensor], float]:
    """The gradient of a scalar by these leaves, and the scalar; a leaf that the loss does not reach is left out.

    raises TrainingError: the loss is not finite
    """
    if not math.isfinite(number := float(loss.detach())):
        raise TrainingError(f"the loss is {number}")
    grads = torch.autograd.grad(loss, list(free.values()), allow_unused=True)
    return {name: g for name, g in zip(free, grads, strict=True) if g is not None}, number


def descend(state: State, slope: Tensors, training: Training) -> State:
    """The state after a step along a gradient, clipped as one; a tensor without one stays as it is."""
    if not slope:
        return state
    if training.clip is not None:
        norm = torch.nn.utils.get_total_norm([slope[name] for name in sorted(slope)])
        slope = {name: g * (training.clip / (norm + 1e-6)).clamp(max=1.0) for name, g in slope.items()}
    if training.optimiser == "sgd":
        moved = {
            name: state.tensors[name] - training.lr * (g + _decay(g, training) * state.tensors[name])
            for name, g in slope.items()
        }
        return State({**state.tensors, **detached(moved)}, state.moments)
    return _adamw(state, slope, training)


def fit(
    site: Site,
    tensors: Tensors,
    loss: Callable[[Tensors, Batch], Tensor],
    round: int | str,
    epochs: int | None = None,
) -> tuple[dict[str, Tensor], float]:
    """Train tensors at a site for a round: returns them and the mean loss over its steps (nan without a step).

    raises TrainingError: a loss is not finite; site, round and batch are named
    """
    state, losses = State(tensors), []
    if not tensors:  # a frozen model without a head: there is nothing to train
        return {}, math.nan
    for i, batch in enumerate(site.batches(round, epochs)):
        with placed(site, round, i):
            state, value = step(state, lambda t, batch=batch: loss(t, batch), site.training)  # type: ignore[misc]
        losses.append(value)
    return dict(state.tensors), sum(losses) / len(losses) if losses else math.nan


@contextlib.contextmanager
def placed(site: Site, round: int | str, batch: int) -> Iterator[None]:
    """Errors of training inside say where they happened; batches are counted from one."""
    try:
        yield
    except TrainingError as e:
        raise TrainingError(
            f"site '{site.name}', {stage(round)}, batch {batch + 1}: {e}. "
            "Lower [training] lr, or set [training] clip; look at the batch's examples if that does not help."
        ) from None


def stage(round: int | str) -> str:
    """What a user calls a round: counted from one."""
    return round if isinstance(round, str) else f"round {round + 1}"


def head(site: Site, private: Tensors, epochs: int | None = None) -> dict[str, Tensor]:
    """The site's private head: the one it has, or a fresh one, fitted to the frozen model.

    epochs: of fitting; None: [training] warmup_head
    """
    epochs = site.training.warmup_head if epochs is None else epochs
    if own := under("head", private):
        return at("head", own)
    fresh = dict(site.task.init(site.model.dim, site.seed))
    if not fresh or not epochs:
        return fresh
    frozen = site.cached(Head())
    fitted, _ = fit(frozen, fresh, lambda t, b: frozen.loss(Head(), t, b), "warm-up", epochs)
    return fitted


def _adamw(state: State, gradient: Mapping[str, Tensor], training: Training) -> State:
    # The fused kernel goes through each list in the order of memory, whatever the strides say: the gradient of what was
    # concatenated or turned is a view whose order is another's.
    new = {name: state.tensors[name].detach().clone(memory_format=torch.contiguous_format) for name in gradient}
    slope = {name: g.contiguous() for name, g in gradient.items()}
    moments: dict[str, Tensor] = dict(state.moments)
    for name, tensor in new.items():
        for key, fresh in (("m", torch.zeros_like(tensor)), ("v", torch.zeros_like(tensor)), ("t", torch.zeros(()))):
            before = state.moments.get(f"{key}/{name}")
            moments[f"{key}/{name}"] = fresh if before is None else before.clone(memory_format=torch.contiguous_format)
    for decayed in (True, False):
        names = [name for name, tensor in new.items() if (tensor.dim() >= 2) is decayed]
        m, v, t = ([moments[f"{key}/{name}"] for name in names] for key in ("m", "v", "t"))
        adamw(
            [new[name] for name in names],
            [slope[name] for name in names],
            m,
            v,
            [],
            t,
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=training.lr,
            weight_decay=training.weight_decay if decayed else 0.0,
            eps=EPSILON,
            maximize=False,
        )
    return State({**state.tensors, **new}, moments)


def _decay(tensor: Tensor, training: Training) -> float:
    return training.weight_decay if tensor.dim() >= 2 else 0.0
