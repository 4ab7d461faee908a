"""The stages of a wire: what rounds stays within its bound, what does not loses no bit, and no frame is believed."""

import math
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedloom import coding
from fedloom.errors import UpdateError
from fedloom.tensors import Tensors, from_bytes, generator, to_bytes

SHAPES = st.sampled_from([(32,), (4, 100), (100, 4), (33, 1), (8, 8), (3, 5, 7), (1, 64), (500,)])
SCALES = st.sampled_from([1e-30, 1e-8, 1.0, 3e4, 1e30])


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Normal numbers of any scale, some rows zero, one number far from the rest."""
    shape, seed = draw(SHAPES), draw(st.integers(0, 10**6))
    tensor = torch.randn(shape, generator=generator(seed)) * draw(SCALES)
    tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] *= draw(st.sampled_from([0.0, 1.0, 1e3]))
    return torch.zeros(shape) if draw(st.integers(0, 9)) == 0 else tensor


@given(tensors())
def test_rows_are_the_longer_lines_and_can_be_put_back(tensor: Tensor) -> None:
    matrix = coding.rows(tensor)
    assert matrix.dim() == 2
    assert matrix.shape[0] <= matrix.shape[1]
    assert torch.equal(coding.unrowed(matrix, tensor.shape), tensor)


def test_a_low_rank_pair_has_a_row_a_rank() -> None:
    a, b = torch.randn(8, 64), torch.randn(96, 8)
    assert torch.equal(coding.rows(a), a)
    assert torch.equal(coding.rows(b), b.T)
    assert coding.rows(torch.randn(40)).shape == (1, 40)


@given(tensors())
def test_int8_is_within_half_a_step_of_each_row(tensor: Tensor) -> None:
    packed = coding.int8({"a/x": tensor})
    assert packed["wire/int8/a/x"].dtype == torch.int8
    apart = coding.rows((coding.unrounded(packed)["a/x"].double() - tensor.double()).abs())
    most = coding.rows(tensor.double().abs()).amax(1, keepdim=True)
    assert bool((apart <= most / 254 * (1 + 1e-4)).all())


@given(tensors())
def test_bf16_is_within_half_a_step_of_each_number(tensor: Tensor) -> None:
    packed = coding.bf16({"a/x": tensor})
    assert packed["wire/bf16/a/x"].dtype == torch.bfloat16
    assert bool(((coding.unrounded(packed)["a/x"] - tensor).abs() <= tensor.abs() * 2**-8).all())


@pytest.mark.parametrize("stage", [coding.bf16, coding.int8])
def test_what_is_small_or_of_other_numbers_is_not_rounded(stage: Callable[[Tensors], dict[str, Tensor]]) -> None:
    whole = {
        "a/gate": torch.randn(31),
        "a/scalar": torch.tensor(1 / 3),
        "b/count": torch.arange(100),
        "b/flag": torch.tensor(True),
        "c/half": torch.randn(64).half(),
        "c/double": torch.randn(64).double(),
        "c/native": torch.randn(64).bfloat16(),
    }
    packed = stage({**whole, "d/large": torch.randn(32)})
    back = coding.unrounded(from_bytes(to_bytes(packed)))
    assert back.keys() == {*whole, "d/large"}
    assert back["d/large"].dtype == torch.float32
    for name, tensor in whole.items():
        assert torch.equal(back[name], tensor)
        assert back[name].dtype == tensor.dtype


@given(st.integers(0, 70), st.sampled_from([2, 4]), st.integers(0, 9))
def test_a_shuffle_is_a_transposition_and_loses_nothing(n: int, size: int, seed: int) -> None:
    body = np.random.default_rng(seed).integers(0, 256, n, dtype=np.uint8)
    frame = (3).to_bytes(8, "little") + b"abc" + body.tobytes()
    whole = n // size * size
    turned = body[:whole].reshape(-1, size).T.tobytes() + body[whole:].tobytes()
    assert coding.shuffled(frame, size) == frame[:11] + turned
    assert coding.unshuffled(coding.shuffled(frame, size), size) == frame


def test_a_shuffle_helps_zstd() -> None:
    frame = to_bytes({"a/x": torch.randn(1000, 200, generator=generator(0))})
    assert len(coding.compressed(coding.shuffled(frame, 4))) < 0.95 * len(coding.compressed(frame))


@given(st.binary(max_size=500))
def test_zstd_loses_nothing_and_gives_no_more_than_it_may(content: bytes) -> None:
    frame = coding.compressed(content)
    assert coding.decompressed(frame, len(content)) == content
    if content:
        with pytest.raises(UpdateError, match="more than"):
            coding.decompressed(frame, len(content) - 1)


def test_a_bomb_is_not_unpacked() -> None:
    bomb = coding.compressed(bytes(1 << 28))
    assert len(bomb) < 1 << 15
    tracemalloc.start()
    with pytest.raises(UpdateError, match="more than 1000 bytes, unpacked"):
        coding.decompressed(bomb, 1000)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("frame", "found"),
    [
        (b"", "half of a zstd frame"),
        (b"no zstd at all", "not zstd"),
        (coding.compressed(b"abc" * 50)[:-3], "half of a zstd frame"),
        (coding.compressed(b"abc") + b"d", "behind"),
    ],
)
def test_what_is_not_one_zstd_frame_is_named(frame: bytes, found: str) -> None:
    with pytest.raises(UpdateError, match=found):
        coding.decompressed(frame, 10**6)


PACKED = coding.int8({"a/x": torch.randn(4, 50), "b/y": torch.randn(60)})


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"wire/scales": torch.ones(4)}, "another number of scales"),
        ({"wire/scales": torch.ones(5).double()}, "another number of scales"),
        ({"wire/scales": torch.full((5,), math.inf)}, "not finite"),
        ({"wire/scales": torch.tensor([1, 1, math.nan, 1, 1])}, "not finite"),
        ({"wire/int8/a/x": torch.ones(4, 50)}, "other numbers than int8"),
        ({"wire/int8/a/x": torch.ones(5, 50, dtype=torch.int8)}, "another number of scales"),
        ({"wire/bf16/c/z": torch.ones(50)}, "other numbers than bf16"),
        ({"wire/bf16/a/x": torch.ones(4, 50).bfloat16()}, "twice"),
        ({"a/x": torch.ones(4, 50)}, "twice"),
        ({"wire/other/x": torch.ones(4)}, "unknown names"),
    ],
)
def test_what_no_stage_made_is_named(changed: Tensors, found: str) -> None:
    with pytest.raises(UpdateError, match=found):
        coding.unrounded({**PACKED, **changed})
