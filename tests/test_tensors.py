"""Named tensors: the mean's laws, frames that come back as they went, randomness that depends on its key alone."""

import math
from pathlib import Path

import mypy.api
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from fedloom.errors import StoreError, UpdateError
from fedloom.tensors import (
    BLOCK,
    SMALL,
    at,
    by_place,
    detached,
    from_bytes,
    generator,
    mean,
    not_finite,
    only,
    padded,
    squared_distance,
    to_bytes,
    under,
    without,
)

weights = st.floats(1e-3, 1e3)
seeds = st.integers(0, 2**32)


def state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    rng = generator("state", seed)
    return {"3.q/A": torch.randn(2, 3, generator=rng).to(dtype), "head/bias": torch.randn(4, generator=rng).to(dtype)}


@given(st.lists(st.tuples(seeds, weights), min_size=1, max_size=6), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_mean_is_the_weighted_mean_in_any_order(parts, random) -> None:
    weighted = [(state(seed), w) for seed, w in parts]
    got = mean(weighted)
    total = math.fsum(w for _, w in weighted)
    for name in got:
        expected = torch.stack([s[name].double() * (w / total) for s, w in weighted]).sum(0).float()
        torch.testing.assert_close(got[name], expected, rtol=1e-6, atol=1e-6)
    random.shuffle(weighted)
    torch.testing.assert_close(mean(weighted), got, rtol=1e-6, atol=1e-6)


@given(seeds, weights, st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
@settings(max_examples=30, deadline=None)
def test_mean_of_one_state_is_that_state(seed, weight, dtype) -> None:
    one = state(seed, dtype)
    for name, tensor in mean([(one, weight)]).items():
        assert tensor.dtype is dtype
        torch.testing.assert_close(tensor, one[name], rtol=1e-6 if dtype is torch.float64 else 0, atol=0)


@given(st.lists(seeds, min_size=2, max_size=4), st.floats(1e-3, 1e3))
@settings(max_examples=20, deadline=None)
def test_only_proportions_of_weights_count(seeds, scale) -> None:
    once = mean([(state(seed), 1.0 + i) for i, seed in enumerate(seeds)])
    scaled = mean([(state(seed), scale * (1.0 + i)) for i, seed in enumerate(seeds)])
    torch.testing.assert_close(once, scaled, rtol=1e-6, atol=1e-6)


def test_a_weight_of_zero_counts_for_nothing() -> None:
    assert all(
        torch.equal(a, b)
        for a, b in zip(mean([(state(1), 3.0), (state(2), 0.0)]).values(), state(1).values(), strict=True)
    )


def test_mean_takes_a_stream_and_holds_one_sum() -> None:
    seen = []

    def stream():
        for seed in range(3):
            seen.append(seed)
            yield state(seed), 1.0

    mean(stream())
    assert seen == [0, 1, 2]


def test_the_mean_of_long_tensors_is_that_of_the_whole_to_the_bit() -> None:
    states = [torch.randn(2 * BLOCK + 7, 2, generator=generator("long", i)).T for i in range(3)]
    whole = torch.zeros(2, 2 * BLOCK + 7, dtype=torch.float64)
    for i, tensor in enumerate(states):
        whole.add_(tensor, alpha=0.3 + i)
    found = mean(({"a/A": tensor}, 0.3 + i) for i, tensor in enumerate(states))
    assert torch.equal(found["a/A"], (whole / (0.3 + 1.3 + 2.3)).float())


@pytest.mark.parametrize("at_fault", ["few/A", "many/A", "half/A"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_found_by_name(at_fault: str, value: float) -> None:
    tensors = {"few/A": torch.ones(3), "many/A": torch.ones(SMALL + 1), "half/A": torch.ones(2).bfloat16()}
    tensors |= {"empty/A": torch.ones(0), "whole/A": torch.ones(2).long()}
    assert not_finite(tensors) is None
    tensors[at_fault][-1] = value
    assert not_finite(tensors) == at_fault


@pytest.mark.parametrize(
    ("weighted", "message"),
    [
        ([], "nothing to average"),
        ([(state(1), 0.0)], "nothing to average"),
        ([(state(1), 1.0), ({"3.q/A": torch.zeros(2, 3)}, 1.0)], r"unlike names.*head/bias"),
        ([({"a/A": torch.zeros(2)}, 1.0), ({"a/A": torch.zeros(3)}, 1.0)], r"'a/A' of shapes \(2,\) and \(3,\)"),
    ],
)
def test_what_cannot_be_averaged_is_named(weighted, message) -> None:
    with pytest.raises(UpdateError, match=message):
        mean(weighted)


def test_names_are_a_place_and_a_leaf() -> None:
    tensors = {"head/a": torch.ones(1), "3.q/A": torch.zeros(1), "head/b/c": torch.ones(2)}
    assert by_place(tensors).keys() == {"head", "3.q"}
    assert by_place(tensors)["head"].keys() == {"a", "b/c"}
    assert under("head", tensors).keys() == {"a", "b/c"}
    assert without("head", tensors).keys() == {"3.q/A"}
    assert {**at("head", under("head", tensors)), **without("head", tensors)}.keys() == tensors.keys()
    assert list(only(["3.q/A", "head/a"], tensors)) == ["3.q/A", "head/a"]


def test_a_first_part_is_a_whole_part() -> None:
    tensors = {"header/a": torch.ones(1)}
    assert under("head", tensors) == {}
    assert without("head", tensors).keys() == tensors.keys()


def test_squared_distance() -> None:
    a, b = state(1), state(2)
    expected = sum(((a[name] - b[name]) ** 2).sum() for name in a)
    torch.testing.assert_close(squared_distance(a, b), expected)
    assert float(squared_distance(a, a)) == 0
    assert float(squared_distance({}, b)) == 0


@given(seeds, st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]))
@settings(max_examples=20, deadline=None)
def test_a_frame_comes_back_to_the_bit(seed, dtype) -> None:
    tensors = {name: (tensor * 4).to(dtype).T for name, tensor in state(seed).items() if tensor.dim() > 1}
    back = from_bytes(to_bytes({**tensors, "opt/t": torch.tensor(3.0)}))
    assert float(back["opt/t"]) == 3
    for name, tensor in tensors.items():
        assert back[name].dtype is dtype
        assert torch.equal(back[name], tensor)


def test_the_names_of_a_frame_come_in_one_order() -> None:
    frame = to_bytes({f"{i}/x": torch.ones(i) for i in range(1, 40)})
    assert {tuple(from_bytes(frame)) for _ in range(20)} == {tuple(sorted(f"{i}/x" for i in range(1, 40)))}


def test_a_frame_holds_no_graph_and_copes_with_shared_memory() -> None:
    tensor = torch.ones(3, requires_grad=True)
    back = from_bytes(to_bytes({"a/x": tensor * 2, "a/y": tensor, "a/z": tensor}))
    assert not any(t.requires_grad for t in back.values())
    assert torch.equal(back["a/y"], back["a/z"])
    assert not detached({"a/x": tensor * 2})["a/x"].requires_grad


FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
WHOLE = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


@pytest.mark.parametrize("kinds", [[*WHOLE, *FLOATS], [torch.float32], []])
def test_a_frame_is_that_of_safetensors(kinds: list[torch.dtype]) -> None:
    tensors = {f'{i}/é"\\\x01': torch.arange(6).reshape(2, 3).to(kind) for i, kind in enumerate(reversed(kinds))}
    tensors |= {f"{i}/s": torch.ones((), dtype=kind) for i, kind in enumerate(kinds)}
    tensors |= {f"{i}/none": torch.ones(0, 4, dtype=kind) for i, kind in enumerate(kinds)}
    assert to_bytes(tensors) == save(tensors)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_no_number_is_overlooked(kind: torch.dtype, number: float) -> None:
    sound = {"a": torch.ones(3, dtype=kind), "b": torch.ones(2, 2), "n": torch.tensor(7), "none": torch.ones(0)}
    assert not_finite(sound) is None
    for place in range(3):
        wrong = sound["a"].clone()
        wrong[place] = number
        assert not_finite({**sound, "z": wrong}) == "z"


@pytest.mark.parametrize("frame", [b"", b"no safetensors", to_bytes({"a/b": torch.ones(9)})[:-5]])
def test_anything_else_is_no_frame(frame) -> None:
    with pytest.raises(StoreError, match=f"{len(frame)} bytes"):
        from_bytes(frame)


def test_padded_keeps_every_row_and_fills_with_zeros() -> None:
    short, long = torch.ones(2, 3, 4), 2 * torch.ones(1, 5, 4)
    joined = padded([short, long])
    assert joined.shape == (3, 5, 4)
    assert torch.equal(joined[:2, :3], short)
    assert torch.equal(joined[2:], long)
    assert not joined[:2, 3:].any()


def test_randomness_is_a_function_of_its_key() -> None:
    def draw(*key: object) -> Tensor:
        return torch.rand(4, generator=generator(*key))

    torch.manual_seed(0)
    first = draw(1, "oxford", 2)
    torch.manual_seed(1)
    assert torch.equal(draw(1, "oxford", 2), first)
    keys = [(1, "oxford", 3), (1, "oxfor", "d2"), (1, "oxford", "2"), ("1", "oxford", 2), (1, "oxford")]
    assert not any(torch.equal(draw(*key), first) for key in keys)


@pytest.mark.slow
def test_private_tensors_in_an_update_are_an_error_of_types(tmp_path: Path) -> None:
    for what, said in (("shared", ""), ("private", 'incompatible type "Private"; expected "Shared"')):
        (tmp_path / "own.py").write_text(
            "from fedloom.site import Update\n"
            "from fedloom.tensors import Private, Shared\n"
            "def sent(shared: Shared, private: Private) -> Update:\n"
            f"    return Update({what}, 1.0, 1)\n"
        )
        out, _, code = mypy.api.run(["--strict", str(tmp_path / "own.py")])
        assert (code, said in out) == (bool(said), True), out
