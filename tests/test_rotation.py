"""Rotations of low-rank factors: the product stays what it was, gates and all, and two bases of it come together."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes
from torch import Tensor

from fedloom import rotation
from fedloom.adapters import LoRA
from fedloom.places import Place
from fedloom.rotation import Rotation
from fedloom.tensors import Tensors, generator
from fedloom.transport import carried

PLACE = Place("0.block", "block", 20, 20, 1)
LORA = LoRA(6, start="normal")
seeds = st.integers(0, 2**31)


def drawn(adapter: Any, seed: int, *key: object) -> dict[str, Tensor]:
    """An adapter none of whose tensors is zero."""
    rng = generator("drawn", seed, *key)
    return {leaf: torch.randn(t.shape, generator=rng) for leaf, t in adapter.init(PLACE, rng).items()}


def product(leaves: dict[str, Tensor]) -> Tensor:
    gate = leaves.get("gate", torch.ones(leaves["A"].shape[0]))
    return leaves["B"].double() @ (gate.double()[:, None] * leaves["A"].double())


@given(seeds, st.booleans())
@settings(max_examples=20, deadline=None)
def test_balancing_keeps_the_update_and_shares_its_scale(seed: int, gated: bool) -> None:
    leaves = drawn(LoRA(6, gated=gated), seed)
    even = rotation.balanced(leaves)
    torch.testing.assert_close(product(even), product(leaves), rtol=1e-4, atol=1e-4)
    A, B = even["A"].double(), even["B"].double()
    torch.testing.assert_close(A @ A.T, B.T @ B, rtol=1e-3, atol=1e-4)
    assert not gated or torch.equal(even["gate"], torch.ones(6))
    assert {k: (t.shape, t.dtype) for k, t in even.items()} == {k: (t.shape, t.dtype) for k, t in leaves.items()}


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_one_update_in_two_bases_is_brought_together_by_rotation(seed: int) -> None:
    leaves = drawn(LORA, seed)
    M = torch.randn(6, 6, generator=generator(seed, "basis")) + 3 * torch.eye(6)
    other = {"A": M @ leaves["A"], "B": leaves["B"] @ torch.linalg.inv(M)}
    even = rotation.balanced(leaves)
    (found, _) = rotation.turned({f"p/{k}": t for k, t in other.items()}, {f"p/{k}": t for k, t in even.items()})["p"]
    assert isinstance(found, Rotation)
    torch.testing.assert_close(found.matrix @ found.matrix.T, torch.eye(6, dtype=torch.float64))
    back = found.moved(other, LORA.symmetry)
    for leaf in ("A", "B"):
        torch.testing.assert_close(back[leaf], even[leaf], rtol=1e-2, atol=2e-3)
    torch.testing.assert_close(product(back), product(leaves), rtol=1e-3, atol=1e-3)


@given(seeds, st.integers(2, 6))
@settings(max_examples=20, deadline=None)
def test_a_rotation_is_what_scipy_finds_towards_the_target_as_it_is(seed: int, rank: int) -> None:
    source, target = drawn(LORA, seed, 1), drawn(LoRA(rank, start="normal"), seed, 2)  # whose factors are not balanced

    def stacked(leaves: Tensors) -> Tensor:
        return torch.cat([leaves["A"].T, leaves["B"]]).double()

    plans = rotation.turned({f"p/{k}": t for k, t in source.items()}, {f"p/{k}": t for k, t in target.items()})
    own = rotation.balanced(source, rank)
    expected, _ = orthogonal_procrustes(stacked(own).numpy(), stacked(target).numpy())
    turned = plans["p"][0].moved(source, LORA.symmetry)
    torch.testing.assert_close(stacked(turned), stacked(own) @ torch.from_numpy(expected), rtol=1e-4, atol=1e-4)


def test_an_update_of_zero_can_be_turned() -> None:
    fresh = {"p/A": torch.randn(4, 20, generator=generator(1)), "p/B": torch.zeros(20, 4)}
    found, gained = rotation.turned(fresh, fresh)["p"]
    assert gained is None  # it is not measured
    moved = carried(fresh, {"p": (found, 0.0)}, LORA.symmetry)
    assert all(tensor.isfinite().all() for tensor in moved.values())


@pytest.mark.parametrize("gated", [False, True])
def test_turning_keeps_the_update(gated: bool) -> None:
    """Gates are folded in before the turn: turned with the factors, they would change the update."""
    adapter = LoRA(6, gated=gated)
    leaves, other = drawn(adapter, 1), drawn(adapter, 2)
    turned = rotation.rotated(leaves, rotation.balanced(other)).moved(leaves, adapter.symmetry)
    torch.testing.assert_close(product(turned), product(leaves), rtol=1e-4, atol=1e-4)
    assert not gated or torch.equal(turned["gate"], torch.ones(6))


def test_ranks_that_an_update_does_not_need_are_zeros() -> None:
    leaves = drawn(LORA, 3)
    leaves["B"][:, 2:] = 0
    even = rotation.balanced(leaves)
    torch.testing.assert_close(product(even), product(leaves), rtol=1e-4, atol=1e-4)
    assert not even["A"][2:].any()
    assert not even["B"][:, 2:].any()


@pytest.mark.parametrize("rank", [3, 6, 8])
def test_another_rank_comes_to_that_of_the_target(rank: int) -> None:
    leaves, target = drawn(LoRA(rank), 5), drawn(LORA, 6)
    turned = rotation.rotated(leaves, target).moved(leaves, LORA.symmetry)
    assert {leaf: t.shape for leaf, t in turned.items()} == {leaf: t.shape for leaf, t in target.items()}
    left, sizes, right = torch.linalg.svd(product(leaves))
    torch.testing.assert_close(product(turned), left[:, :6] * sizes[:6] @ right[:6], rtol=1e-4, atol=1e-4)
