r"""Numbers as fewer bytes: the stages of a wire, each with its inverse.

`bf16` and `int8` take named tensors to named tensors and round; `shuffled` and `compressed` take bytes to bytes and
lose nothing. Only tensors that are `large` are rounded: a gate, a weight or a count has little to save and much to
steer. What was rounded stands under wire/ in the frame, so that a frame says by itself how to read it.

Nothing in a frame is trusted: an inverse raises UpdateError where one cannot be what its stage made.
"""

import sys

import torch
from torch import Tensor

from fedloom.errors import UpdateError
from fedloom.tensors import Tensors, at, under, without

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

SMALL = 32  # elements; fewer are not rounded
LEVEL = 1  # of zstd: trained numbers do not repeat, and higher ones find hardly more in them
SCALES = "wire/scales"


def large(tensor: Tensor) -> bool:
    """Whether a tensor is worth rounding."""
    return tensor.dtype == torch.float32 and tensor.numel() >= SMALL


def rows(tensor: Tensor) -> Tensor:
    """A tensor as a matrix whose rows are its longer lines: (d_out, r) as (r, d_out), (n,) as (1, n).

    A LoRA's factors both have a row a rank so, and few scales for many numbers.
    """
    matrix = tensor.reshape(_split(tensor.shape))
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


def unrowed(matrix: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `rows`."""
    first, second = _split(shape)
    return (matrix.T if first > second else matrix).reshape(shape)


def bf16(tensors: Tensors) -> dict[str, Tensor]:
    r"""Large tensors in bfloat16, to nearest: :math:`|x - q(x)| \le 2^{-8} |x|`."""
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items() if large(tensor)}
    return {**{name: tensor for name, tensor in tensors.items() if name not in rounded}, **at("wire/bf16", rounded)}


def int8(tensors: Tensors) -> dict[str, Tensor]:
    r"""Large tensors in 8 bits, each row x of `rows` with a scale of its own, to nearest:

    .. math:: s = \max_i |x_i| / 127, \qquad q_i = \mathrm{round}(x_i / s) \in \{-127, \dots, 127\}, \qquad
              |x_i - s q_i| \le \max_j |x_j| / 254

    to the rounding of float32, for rows whose largest number is above 1e-36. All scales stand in one tensor, in the
    order of the names.
    """
    rounded, scales = {}, [torch.zeros(0)]
    for name in sorted(name for name, tensor in tensors.items() if large(tensor)):
        matrix = rows(tensors[name])
        scale = matrix.abs().amax(1, keepdim=True) / 127
        steps = torch.where(scale > 0, matrix / scale, 0.0).round().clamp(-127, 127)
        rounded[name] = unrowed(steps.to(torch.int8), tensors[name].shape)
        scales.append(scale.flatten())
    whole = {name: tensor for name, tensor in tensors.items() if name not in rounded}
    return {**whole, **at("wire/int8", rounded), SCALES: torch.cat(scales)}


def unrounded(packed: Tensors) -> dict[str, Tensor]:
    """The inverse of `bf16` and of `int8`, as far as there is one: float32 again."""
    halves, bytes_, scales = under("wire/bf16", packed), under("wire/int8", packed), packed.get(SCALES, torch.zeros(0))
    whole = without("wire", packed)
    _expect(len(whole) + len(halves) + len(bytes_) + (SCALES in packed) == len(packed), "unknown names under wire/")
    _expect(not (whole.keys() & {*halves, *bytes_} or halves.keys() & bytes_.keys()), "one name twice")
    _expect(all(tensor.dtype == torch.bfloat16 for tensor in halves.values()), "other numbers than bf16 where bf16 is")
    _expect(all(tensor.dtype == torch.int8 for tensor in bytes_.values()), "other numbers than int8 where int8 is")
    counts = [min(_split(bytes_[name].shape)) for name in sorted(bytes_)]
    _expect(scales.dtype == torch.float32 and scales.shape == (sum(counts),), "another number of scales than of rows")
    _expect(bool(torch.isfinite(scales).all()), "scales that are not finite")
    whole |= {name: tensor.to(torch.float32) for name, tensor in halves.items()}
    for name, scale in zip(sorted(bytes_), torch.split(scales, counts), strict=True):
        whole[name] = unrowed(rows(bytes_[name]).to(torch.float32) * scale[:, None], bytes_[name].shape)
    return whole


def shuffled(frame: bytes, size: int) -> bytes:
    """A safetensors frame with the first bytes of all its numbers side by side, then the second ones, and so on: bytes
    of one significance are alike, which a compressor sees only so.

    size: bytes of a number. The frame's header, and what is left after its last whole number, stay where they are.
    """
    return _transposed(frame, size, forth=True)


def unshuffled(frame: bytes, size: int) -> bytes:
    """The inverse of `shuffled`."""
    return _transposed(frame, size, forth=False)


def compressed(frame: bytes) -> bytes:
    """By zstd."""
    return zstd.compress(frame, LEVEL)


def decompressed(frame: bytes, most: int) -> bytes:
    """The inverse of `compressed`. A frame that would become longer than `most` bytes is never unpacked as a whole."""
    reader = zstd.ZstdDecompressor()
    try:
        content = reader.decompress(frame, max_length=most + 1)
    except zstd.ZstdError:
        raise UpdateError(f"{len(frame)} bytes that are not zstd") from None
    _expect(len(content) <= most, f"more than {most} bytes, unpacked")
    _expect(reader.eof, "half of a zstd frame")
    _expect(not reader.unused_data, "something behind its zstd frame")
    return content


def _split(shape: torch.Size) -> tuple[int, int]:
    """A shape as that of a matrix, by its first axis; a vector is one row."""
    first = shape[0] if len(shape) > 1 else 1
    return first, shape.numel() // max(first, 1)


def _transposed(frame: bytes, size: int, forth: bool) -> bytes:
    begin = 8 + int.from_bytes(frame[:8], "little")  # of safetensors: the header's length, the header, the numbers
    _expect(begin <= len(frame), "a header that is longer than all of it")
    numbers = (len(frame) - begin) // size
    if not numbers:
        return frame
    body = torch.frombuffer(bytearray(frame[begin : begin + numbers * size]), dtype=torch.uint8)
    turned = body.view(numbers, size).T if forth else body.view(size, numbers).T
    return frame[:begin] + turned.contiguous().numpy().tobytes() + frame[begin + numbers * size :]


def _expect(held: bool, found: str) -> None:
    if not held:
        raise UpdateError(found)
