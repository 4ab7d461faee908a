"""The one step and the one loop, held against torch.optim and against arithmetic."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedloom.adapters import LoRA
from fedloom.errors import TrainingError
from fedloom.site import Site
from fedloom.tensors import generator
from fedloom.training import State, Training, fit, head, step


def start() -> dict[str, Tensor]:
    rng = generator("start")
    return {"a/W": torch.randn(3, 4, generator=rng), "a/b": torch.randn(3, generator=rng), "head/g": torch.tensor(0.5)}


def quadratic(seed: int) -> Callable[[dict[str, Tensor]], Tensor]:
    """A loss that is another one at every step."""
    x = torch.randn(5, 4, generator=generator("x", seed))

    def loss(t: dict[str, Tensor]) -> Tensor:
        return ((x @ t["a/W"].T + t["a/b"]).tanh() * t["head/g"] - 1).square().mean() * (1 + seed)

    return loss


def run(training: Training, steps: int) -> State:
    state = State(start())
    for i in range(steps):
        state, _ = step(state, quadratic(i), training)
    return state


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_adamw_is_torch_s_on_the_same_leaves(weight_decay: float, clip: float | None) -> None:
    training = Training(lr=0.03, weight_decay=weight_decay, clip=clip)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in start().items()}
    matrices, others = ([t for t in leaves.values() if (t.dim() >= 2) is matrix] for matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=0.03)
    for i in range(5):
        optimiser.zero_grad()
        quadratic(i)(leaves).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(list(leaves.values()), clip)
        optimiser.step()
    for name, tensor in run(training, 5).tensors.items():
        torch.testing.assert_close(tensor, leaves[name].detach(), rtol=1e-6, atol=1e-7)
        assert not tensor.requires_grad


@pytest.mark.parametrize("turned", [False, True])
def test_adamw_steps_along_the_gradient_however_it_lies_in_memory(turned: bool) -> None:
    """Of what was concatenated along its second axis, or turned, the gradient is a view of another order."""
    beside, weight = torch.randn(5, 2, generator=generator("beside")), torch.randn(5, 6, generator=generator("weight"))
    first = torch.randn(4, 5, generator=generator("first")).T
    first = first if turned else first.contiguous()
    leaf = first.clone().requires_grad_()
    optimiser = torch.optim.AdamW([leaf], lr=0.03, weight_decay=0.0, fused=False)

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        return (torch.cat([tensors["B"], beside], 1) * weight).square().sum()

    state = State({"B": first})
    for _ in range(3):
        optimiser.zero_grad()
        loss({"B": leaf}).backward()
        optimiser.step()
        state, _ = step(state, loss, Training(lr=0.03))
    torch.testing.assert_close(state.tensors["B"], leaf.detach(), rtol=1e-6, atol=1e-7)


def test_sgd_is_arithmetic() -> None:
    training = Training(lr=0.1, optimiser="sgd", weight_decay=0.2)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in start().items()}
    loss = quadratic(0)(leaves)
    gradient = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    after, value = step(State(start()), quadratic(0), training)
    assert value == float(loss.detach())
    for name, tensor in start().items():
        decay = 0.2 if name == "a/W" else 0.0  # matrices alone
        torch.testing.assert_close(after.tensors[name], tensor - 0.1 * (gradient[name] + decay * tensor))


@given(st.floats(1e-3, 10), st.sampled_from(["sgd", "adamw"]))
def test_clipping_bounds_the_step_of_the_whole(clip: float, optimiser: str) -> None:
    if optimiser == "adamw":  # whose moments hold the clipped gradient
        moments = run(Training(clip=clip), 1).moments
        norm = math.sqrt(sum(float((m / (1 - 0.9)).square().sum()) for name, m in moments.items() if name[:2] == "m/"))
    else:
        after = run(Training(lr=1.0, optimiser="sgd", clip=clip), 1).tensors
        norm = math.sqrt(sum(float((after[name] - tensor).square().sum()) for name, tensor in start().items()))
    plain = run(Training(lr=1.0, optimiser="sgd"), 1).tensors
    free = math.sqrt(sum(float((plain[name] - tensor).square().sum()) for name, tensor in start().items()))
    assert norm == pytest.approx(min(clip, free), rel=1e-3)


def test_moments_go_on_where_they_stopped() -> None:
    straight = run(Training(lr=0.03), 4)
    state = State(start())
    for i in range(4):
        fresh = State(dict(state.tensors), {name: tensor.clone() for name, tensor in state.moments.items()})
        state, _ = step(fresh, quadratic(i), Training(lr=0.03))
    assert all(torch.equal(tensor, straight.tensors[name]) for name, tensor in state.tensors.items())
    assert {name[0] for name in straight.moments} == {"m", "v", "t"}
    forgotten = State(run(Training(lr=0.03), 3).tensors)
    assert not torch.equal(step(forgotten, quadratic(3), Training(lr=0.03))[0].tensors["a/W"], straight.tensors["a/W"])


def test_a_step_leaves_what_it_was_given() -> None:
    before = run(Training(), 1)
    tensors, moments = ({k: t.clone() for k, t in x.items()} for x in (before.tensors, before.moments))
    step(before, quadratic(1), Training())
    assert all(torch.equal(tensor, before.tensors[name]) for name, tensor in tensors.items())
    assert all(torch.equal(tensor, before.moments[name]) for name, tensor in moments.items())


@pytest.mark.parametrize("training", [Training(weight_decay=0.1), Training(optimiser="sgd", weight_decay=0.1)])
def test_what_the_loss_does_not_reach_stays(training: Training) -> None:
    state = State({**start(), "b/W": torch.ones(2, 2)})
    after, _ = step(state, quadratic(0), training)
    assert torch.equal(after.tensors["b/W"], torch.ones(2, 2))
    assert not torch.equal(after.tensors["a/W"], start()["a/W"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_site_round_and_batch(site: Callable[..., Site], bad: float) -> None:
    oxford, steps = site(n=5), []

    def loss(tensors: dict[str, Tensor], batch: object) -> Tensor:
        steps.append(batch)
        return tensors["a/W"].sum() * (bad if len(steps) == 2 else 1.0)

    with pytest.raises(TrainingError, match=rf"site 'oxford', round 8, batch 2: the loss is {bad}.*\[training\] lr"):
        fit(oxford, {"a/W": torch.ones(2, 2)}, loss, 7)


def test_the_loop_is_the_step_over_the_batches(site: Callable[..., Site]) -> None:
    oxford = site(training=Training(lr=0.02, batch=2, epochs=2))
    adapter = LoRA(rank=2)
    first = {**oxford.model.init(adapter, 0), **oxford.task.init(oxford.model.dim, 0)}
    state, losses = State(first), []
    for batch in oxford.batches(4):
        state, value = step(state, lambda t, batch=batch: oxford.loss(adapter, t, batch), oxford.training)
        losses.append(value)
    trained, mean = fit(oxford, first, lambda t, b: oxford.loss(adapter, t, b), 4)
    assert len(losses) == 6
    assert all(torch.equal(tensor, state.tensors[name]) for name, tensor in trained.items())
    assert mean == pytest.approx(sum(losses) / 6)


def test_training_lowers_the_loss(site: Callable[..., Site]) -> None:
    oxford, adapter = site(training=Training(lr=0.01, batch=6, epochs=15)), LoRA(rank=4)
    first = {**oxford.model.init(adapter, 0), **oxford.task.init(oxford.model.dim, 0)}
    trained, _ = fit(oxford, first, lambda t, b: oxford.loss(adapter, t, b), 0)
    (whole,) = oxford.passes(oxford.train)
    before, after = (float(oxford.loss(adapter, tensors, whole)) for tensors in (first, trained))
    assert after < 0.5 * before


def test_no_epoch_no_step(site: Callable[..., Site]) -> None:
    trained, mean = fit(site(), start(), lambda t, b: t["a/W"].sum(), 0, epochs=0)
    assert all(torch.equal(tensor, start()[name]) for name, tensor in trained.items())
    assert math.isnan(mean)


def test_a_head_is_kept_or_made_or_warmed_up(site: Callable[..., Site]) -> None:
    oxford = site(n=6)
    own = {"head/weight": torch.ones(3, 24), "head/bias": torch.ones(3)}
    assert head(oxford, {**own, "local/x": torch.ones(1)}).keys() == own.keys()
    fresh = head(oxford, {})
    assert not any(tensor.any() for tensor in fresh.values())
    eager = replace(oxford, training=replace(oxford.training, warmup_head=20))
    warm = head(eager, {})
    again = head(eager, {})
    assert all(torch.equal(tensor, again[name]) for name, tensor in warm.items())

    def loss(tensors: dict[str, Tensor]) -> float:
        return sum(float(oxford.loss(LoRA(), tensors, batch)) for batch in oxford.passes(oxford.train))

    assert loss(warm) < 0.8 * loss(fresh)
    assert torch.equal(head(eager, own)["head/weight"], own["head/weight"])  # warmed up once, not every round
