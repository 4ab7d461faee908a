"""Transport between hidden units: exact where it says so, blind to order, deterministic, never along other axes."""

import math
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import Tensor

from fedloom import alignment
from fedloom.adapters import Bottleneck, LoRA
from fedloom.alignment import Matching, Side
from fedloom.errors import AdapterError
from fedloom.places import Place
from fedloom.tensors import generator
from fedloom.transport import Coupling, Order, carried, identity, told, units, width
from fedloom.transport import shuffled as at_random

PLACE = Place("0.block", "block", 20, 20, 1)
BOTTLENECK, LORA = Bottleneck(8, std=0.5), LoRA(6, start="normal")
seeds = st.integers(0, 2**31)


def drawn(adapter: Any, seed: int, *key: object) -> dict[str, Tensor]:
    """An adapter none of whose tensors is zero."""
    rng = generator("drawn", seed, *key)
    return {leaf: torch.randn(t.shape, generator=rng) for leaf, t in adapter.init(PLACE, rng).items()}


def shuffled(leaves: dict[str, Tensor], adapter: Any, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """The same function in another order, and the order, computed without the code under test."""
    order = torch.randperm(width(leaves, adapter.symmetry), generator=generator("order", seed))
    moved = {}
    for leaf, tensor in leaves.items():
        axes = adapter.symmetry.get(leaf, ())
        moved[leaf] = tensor if "hidden" not in axes else (tensor[order] if axes[0] else tensor[:, order])
    return moved, order


def plan(source: dict[str, Tensor], target: dict[str, Tensor], adapter: Any, of: Any = "in+out", **how: Any) -> Any:
    a, b = (alignment.by_weights(side, adapter.symmetry, of) for side in (source, target))
    matching = Matching(how.pop("distance", alignment.squared), **{"accept": "always", **how})
    return matching(a, b, torch.arange(a.features.shape[1]) % 2 == 0, "key")


@given(seeds, st.sampled_from([BOTTLENECK, LORA, LoRA(6, gated=True)]), st.sampled_from(["in", "in+bias", "in+out"]))
@settings(max_examples=30, deadline=None)
def test_a_permuted_copy_is_recovered_to_the_bit(seed: int, adapter: Any, of: Any) -> None:
    leaves = drawn(adapter, seed)
    copy, order = shuffled(leaves, adapter, seed)
    for distance in (alignment.squared, alignment.euclidean):
        for accept in ("always", "gain", "split-half"):
            found, gained = plan(copy, leaves, adapter, of, distance=distance, accept=accept)
            back = found.moved(copy, adapter.symmetry)
            assert all(torch.equal(back[leaf], tensor) for leaf, tensor in leaves.items())
            assert gained == pytest.approx(0 if torch.equal(order, torch.arange(len(order))) else 1, abs=1e-6)


@given(seeds, st.integers(1, 12), st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_transport_moves_hidden_axes_alone(seed: int, m: int, n: int) -> None:
    source, target = drawn(Bottleneck(m), seed, "a"), drawn(Bottleneck(n), seed, "b")
    found, gained = plan(source, target, BOTTLENECK)
    assert m == n or gained == 0  # unlike widths have no identity to gain over
    moved = found.moved(source, BOTTLENECK.symmetry)
    assert torch.equal(moved["up_bias"], source["up_bias"])
    assert {leaf: t.shape for leaf, t in moved.items()} == {leaf: t.shape for leaf, t in target.items()}
    assert all(t.dtype is torch.float32 and t.is_contiguous() and t.isfinite().all() for t in moved.values())


@given(seeds, st.integers(1, 16))
@settings(max_examples=40, deadline=None)
def test_the_assignment_is_the_exact_transport(seed: int, n: int) -> None:
    cost = torch.rand(n, n, generator=generator(seed), dtype=torch.float64)
    rows, columns = linear_sum_assignment(cost.numpy())
    order = alignment.assigned(cost)
    assert sorted(order.index.tolist()) == list(range(n))
    total = float(cost[order.index, torch.arange(n)].sum())
    assert total == pytest.approx(cost.numpy()[rows, columns].sum(), rel=1e-12)
    even = torch.full((n,), 1 / n, dtype=torch.float64)
    assert total / n == pytest.approx(ot.emd2(even.numpy(), even.numpy(), cost.numpy()), rel=1e-9)
    emd = alignment.moved_earth(cost, even, even)
    assert torch.equal(emd.units(), order.units())
    assert total <= float(cost.diagonal().sum()) + 1e-12  # never worse than the identity


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_distances_are_those_of_the_definition(seed: int) -> None:
    rng = generator(seed)
    a, b = (torch.randn(n, 7, generator=rng, dtype=torch.float64) for n in (4, 6))
    expected = torch.stack([torch.stack([(x - y).square().sum() for y in b]) for x in a])
    torch.testing.assert_close(alignment.squared(a, b), expected)
    torch.testing.assert_close(alignment.euclidean(a, b), expected.sqrt())
    pearson = torch.corrcoef(torch.cat([a, b]))[:4, 4:]
    torch.testing.assert_close(alignment.decorrelation(a, b), 1 - pearson)


def test_a_constant_unit_correlates_with_none() -> None:
    rows = torch.randn(3, 50, generator=generator(0), dtype=torch.float64)
    constant = torch.stack([torch.zeros(50), torch.full((50,), 1e6) / 3, torch.full((50,), 1e-9)]).double()
    assert torch.equal(alignment.decorrelation(rows, constant), torch.ones(3, 3, dtype=torch.float64))
    assert torch.equal(alignment.decorrelation(constant, constant), torch.ones(3, 3, dtype=torch.float64))
    rounded = torch.full((1, 49), 1e5 / 3, dtype=torch.float64)
    assert (rounded - rounded.mean()).norm() > 0  # the mean of equal numbers is not always that number
    assert torch.equal(alignment.decorrelation(rows[:, :49], rounded), torch.ones(3, 1, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["ties", "zeros", "one zero row"])
def test_ties_and_zeros_are_settled_alike_each_time(kind: str) -> None:
    leaves = drawn(BOTTLENECK, 3)
    if kind == "ties":
        leaves = {leaf: torch.ones_like(t) for leaf, t in leaves.items()}
    elif kind == "zeros":
        leaves = {leaf: torch.zeros_like(t) for leaf, t in leaves.items()}
    else:
        leaves = {**leaves, "down": leaves["down"].index_fill(0, torch.tensor([2]), 0.0)}
    other = drawn(Bottleneck(5), 4)
    for target in (leaves, other):
        first, second = (plan(leaves, target, BOTTLENECK)[0] for _ in range(2))
        assert torch.equal(first.units(), second.units())
        moved = first.moved(leaves, BOTTLENECK.symmetry)
        assert all(tensor.isfinite().all() for tensor in moved.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_solved_in_double(dtype: torch.dtype) -> None:
    """At weights of 1e-4, squares of half precision underflow, and all units would look alike."""
    leaves = {leaf: (t * 1e-4).to(dtype) for leaf, t in drawn(BOTTLENECK, 5).items()}
    copy, _ = shuffled(leaves, BOTTLENECK, 5)
    found, _ = plan(copy, leaves, BOTTLENECK)
    back = found.moved(copy, BOTTLENECK.symmetry)
    assert all(torch.equal(back[leaf], t) and back[leaf].dtype is dtype for leaf, t in leaves.items())


def computed(leaves: dict[str, Tensor]) -> Tensor:
    h = torch.randn(64, 20, generator=generator("inputs"))
    return BOTTLENECK(h, leaves)


def test_a_unit_split_in_two_and_a_duplicate_lose_nothing() -> None:
    """Incoming weights are averaged and outgoing ones divided: with one map on both sides the function would change."""
    leaves = drawn(BOTTLENECK, 7)
    twice = {
        "down": leaves["down"].repeat_interleave(2, 0),
        "down_bias": leaves["down_bias"].repeat_interleave(2),
        "up": leaves["up"].repeat_interleave(2, 1) / 2,
        "up_bias": leaves["up_bias"],
    }
    wider, _ = plan(leaves, twice, BOTTLENECK, "in+bias")
    narrower, _ = plan(twice, leaves, BOTTLENECK, "in+bias")
    assert isinstance(wider, Coupling)
    for moved in (wider.moved(leaves, BOTTLENECK.symmetry), narrower.moved(twice, BOTTLENECK.symmetry)):
        torch.testing.assert_close(computed(moved), computed(leaves), rtol=1e-4, atol=1e-4)


def test_mass_is_what_a_unit_carries() -> None:
    leaves = drawn(BOTTLENECK, 8)
    rows = torch.cat([leaves["down"], leaves["down_bias"][:, None]], 1).double().norm(dim=1)
    expected = rows * leaves["up"].double().norm(dim=0)
    torch.testing.assert_close(alignment.mass(leaves, BOTTLENECK.symmetry), expected / expected.sum())
    small = {leaf: 1e-4 * t.double() for leaf, t in leaves.items()}
    torch.testing.assert_close(alignment.mass(small, BOTTLENECK.symmetry), expected / expected.sum())
    zero = {leaf: torch.zeros_like(t) for leaf, t in leaves.items()}
    assert torch.equal(alignment.mass(zero, BOTTLENECK.symmetry), torch.full((8,), 0.125, dtype=torch.float64))
    dead = {**leaves, "up": leaves["up"].index_fill(1, torch.tensor([0]), 0.0)}
    assert 0 < float(alignment.mass(dead, BOTTLENECK.symmetry)[0]) < 1e-11


def test_features_are_the_weights_of_a_unit() -> None:
    leaves = drawn(BOTTLENECK, 9)
    unit = [leaves["down"][3], leaves["down_bias"][3:4], leaves["up"][:, 3]]
    for of, parts in (("in", 1), ("in+bias", 2), ("in+out", 3)):
        rows = alignment.weights(leaves, BOTTLENECK.symmetry, of)  # type: ignore[arg-type]
        assert rows.dtype is torch.float64
        assert torch.equal(rows[3].sort().values, torch.cat(unit[:parts]).double().sort().values)


def test_sinkhorn_is_near_the_exact_plan() -> None:
    a = torch.randn(12, 30, generator=generator(1), dtype=torch.float64)
    b = a[torch.randperm(12, generator=generator(2))] + 0.3 * torch.randn(12, 30, generator=generator(3))
    cost = alignment.squared(a, b)
    even = torch.full((12,), 1 / 12, dtype=torch.float64)
    soft = alignment.sinkhorn(cost, even, even)
    assert torch.equal(soft.units(), alignment.assigned(cost).units())
    torch.testing.assert_close(soft.plan.sum(0), even, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(soft.plan.sum(1), even, rtol=1e-4, atol=1e-6)
    exact = alignment.moved_earth(cost, even, even)
    assert float((soft.plan * cost).sum()) == pytest.approx(float((exact.plan * cost).sum()), rel=0.1)


def test_sinkhorn_knows_no_scale() -> None:
    cost = torch.rand(6, 6, generator=generator(4), dtype=torch.float64)
    even = torch.full((6,), 1 / 6, dtype=torch.float64)
    plain = alignment.sinkhorn(cost, even, even)
    for scale in (1e-4, 1e4):
        torch.testing.assert_close(alignment.sinkhorn(cost * scale, even, even).plan, plain.plan)
    alike = alignment.sinkhorn(torch.zeros_like(cost), even, even)
    torch.testing.assert_close(alike.plan, torch.full_like(cost, 1 / 36))


@pytest.mark.parametrize("solver", ["exact", "emd", "sinkhorn"])
@pytest.mark.parametrize("accept", ["always", "gain", "split-half"])
def test_every_solver_finds_a_permuted_copy(solver: Any, accept: Any) -> None:
    leaves = drawn(BOTTLENECK, 14)
    copy, order = shuffled(leaves, BOTTLENECK, 14)
    found, gained = plan(copy, leaves, BOTTLENECK, solver=solver, accept=accept)
    assert torch.equal(found.units(), order.argsort())
    assert gained == pytest.approx(1)
    if isinstance(found, Coupling):  # it moves a mass of one, alike from every unit
        torch.testing.assert_close(found.plan.sum(1), torch.full((8,), 0.125, dtype=torch.float64))


def test_a_transport_that_cannot_be_solved_is_an_error() -> None:
    even = torch.full((2,), 0.5, dtype=torch.float64)
    with pytest.raises(AdapterError, match="no transport of 2 to 2 units"):
        alignment.moved_earth(torch.full((2, 2), torch.nan, dtype=torch.float64), even, even)


# When a match is believed.


def halves(n: int) -> Tensor:
    return torch.arange(n) % 2 == 0


def test_a_gain_is_a_share_of_the_cost_of_staying() -> None:
    """Counted by numpy, at any scale, also where the match was made on the other half."""
    a, b = (torch.randn(9, 40, generator=generator(side, 1), dtype=torch.float64) for side in "ab")
    first, shares = halves(40), []
    for made, measured in ((first, first), (first, ~first), (~first, first)):
        costs = [cdist(a[:, half], b[:, half], "sqeuclidean") for half in (made, measured)]
        rows, columns = linear_sum_assignment(costs[0])
        shares.append(1 - costs[1][rows, columns].sum() / costs[1].trace())
    for scale in (1e-3, 1.0, 1e3):
        cost = alignment.squared(scale * a[:, first], scale * b[:, first])
        assert alignment.gain(cost, alignment.assigned(cost)) == pytest.approx(shares[0])
        assert alignment.split_gain(scale * a, scale * b, alignment.squared, first) == pytest.approx(
            sum(shares[1:]) / 2
        )
    assert alignment.gain(torch.zeros_like(cost), Order(torch.arange(9))) == 0


def test_weights_are_halved_by_every_other_one() -> None:
    believed = []
    for seed in range(40):
        source, target = (drawn(BOTTLENECK, seed, side) for side in "ab")
        a, b = (np.hstack([t["down"], t["down_bias"][:, None], t["up"].T]) for t in (source, target))
        worth = 0.0
        for made, measured in ((0, 1), (1, 0)):
            rows, columns = linear_sum_assignment(cdist(a[:, made::2], b[:, made::2], "sqeuclidean"))
            cost = cdist(a[:, measured::2], b[:, measured::2], "sqeuclidean")
            worth += 1 - cost[rows, columns].sum() / cost.trace()
        whole = [{f"x/{leaf}": t for leaf, t in side.items()} for side in (source, target)]
        found = alignment.matched(*whole, BOTTLENECK.symmetry, "in+out", Matching(alignment.squared))["x"][0]
        believed.append(bool((found.units() != torch.arange(8)).any()))
        assert believed[-1] is bool(worth > 0)
    assert 5 < sum(believed) < 35


def test_a_match_that_gains_nothing_moves_nothing() -> None:
    alike = {leaf: torch.ones_like(t) for leaf, t in drawn(BOTTLENECK, 1).items()}
    for other in (alike, {leaf: 2 * t for leaf, t in alike.items()}):
        assert (plan(other, alike, BOTTLENECK, solver="random")[0].units() != torch.arange(8)).any()
        found, gained = plan(other, alike, BOTTLENECK, solver="random", accept="gain")
        assert torch.equal(found.units(), torch.arange(8))
        assert gained == 0


@pytest.mark.parametrize("width", [4, 24, 48])
def test_noise_gains_where_it_was_matched_and_nothing_where_it_was_not(width: int) -> None:
    """Two unrelated adapters: every matching gains over the identity, on the features it was made on."""
    plain, crossed = [], []
    for seed in range(20):
        a, b = (torch.randn(width, 60, generator=generator(seed, side), dtype=torch.float64) for side in "ab")
        cost = alignment.squared(a, b)
        plain.append(alignment.gain(cost, alignment.assigned(cost)))
        crossed.append(alignment.split_gain(a, b, alignment.squared, halves(60)))
    assert min(plain) > 0.02
    assert abs(sum(crossed) / 20) < 3 * 0.12 / math.sqrt(20 * width)


def test_units_that_only_drifted_stay_where_they_are() -> None:
    """Units in their places, under noise so strong that the assignment moves some."""
    moved = dict.fromkeys(("always", "gain", "split-half"), 0)
    for seed in range(20):
        a = torch.randn(16, 40, generator=generator("a", seed), dtype=torch.float64) * 0.25
        b = a + torch.randn(16, 40, generator=generator("b", seed), dtype=torch.float64)
        even = partial(torch.full, (16,), 1 / 16, dtype=torch.float64)
        for accept in moved:
            matching = Matching(alignment.squared, accept=accept)  # type: ignore[arg-type]
            found, gained = matching(Side(a, even), Side(b, even), halves(40))
            moved[accept] += not torch.equal(found.units(), torch.arange(16))
            assert (gained == 0) is torch.equal(found.units(), torch.arange(16))
    assert moved["always"] == moved["gain"] > 10
    assert moved["split-half"] < 5


def test_a_match_under_which_all_stay_is_what_it_would_be_were_its_worth_asked() -> None:
    a = torch.randn(12, 40, generator=generator("a"), dtype=torch.float64)
    b = a + 0.1 * torch.randn(12, 40, generator=generator("b"), dtype=torch.float64)
    even = partial(torch.full, (12,), 1 / 12, dtype=torch.float64)
    cost = alignment.squared(a, b)
    assert torch.equal(alignment.assigned(cost).units(), torch.arange(12))
    worth = {
        "always": math.inf,
        "gain": alignment.gain(cost, alignment.assigned(cost)),
        "split-half": alignment.split_gain(a, b, alignment.squared, halves(40)),
    }
    for accept, least in product(worth, (-1.0, 0.0, 0.5)):
        plain = alignment.assigned(cost) if worth[accept] > least else identity(12)
        found, gained = Matching(alignment.squared, accept=accept, least=least)(  # type: ignore[arg-type]
            Side(a, even), Side(b, even), halves(40)
        )
        assert torch.equal(found.units(), plain.units())
        assert gained == alignment.gain(cost, plain)
    for accept, kept in (("always", Coupling), ("gain", Order)):  # a plan that moves parts of units is none that stays
        soft, _ = Matching(alignment.squared, "sinkhorn", accept)(Side(a, even), Side(b, even), halves(40))  # type: ignore[arg-type]
        assert isinstance(soft, kept)


def test_a_threshold_on_the_gain() -> None:
    leaves = drawn(BOTTLENECK, 11)
    copy, _ = shuffled(leaves, BOTTLENECK, 11)
    noisy = {leaf: t + 0.8 * drawn(BOTTLENECK, 12)[leaf] for leaf, t in copy.items()}
    _, gained = plan(noisy, leaves, BOTTLENECK)
    assert 0.1 < gained < 0.9
    for least, stays in ((gained - 0.01, False), (gained + 0.01, True)):
        found, _ = plan(noisy, leaves, BOTTLENECK, accept="gain", least=least)
        assert torch.equal(found.units(), torch.arange(8)) is stays


def test_a_random_order_is_a_function_of_its_key() -> None:
    leaves = drawn(BOTTLENECK, 13)
    first, again = (plan(leaves, leaves, BOTTLENECK, solver="random")[0] for _ in range(2))
    assert torch.equal(first.units(), again.units())
    assert sorted(first.units().tolist()) == list(range(8))
    assert not torch.equal(first.units(), at_random(8, "another").units())


def test_a_place_without_a_plan_stays() -> None:
    leaves = {f"{place}/{leaf}": t for place in "ab" for leaf, t in drawn(BOTTLENECK, 1).items()}
    order = Order(torch.arange(8).flip(0))
    moved = carried(leaves, {"a": (order, 0.0)}, BOTTLENECK.symmetry)
    assert all(torch.equal(moved[name], t) for name, t in leaves.items() if name.startswith("b/"))
    assert torch.equal(moved["a/up"], leaves["a/up"].flip(1))
    assert torch.equal(moved["a/down_bias"], leaves["a/down_bias"].flip(0))


def test_what_is_told_of_a_match() -> None:
    plans = {"a": (Order(torch.tensor([1, 2, 0, 3])), 0.25)}
    assert units(plans)["a"].dtype is torch.int16
    moved = {"server/moved/a": 0.75, "server/gain/a": 0.25}
    assert told("server", plans, {}) == moved
    assert told("server", plans, {"a": torch.tensor([1, 0, 2, 3])}) == {**moved, "server/rematched/a": 0.5}
    assert told("server", plans, {"a": torch.tensor([1, 0, 2])}) == moved  # a match of another width says nothing
