"""Where a backbone computes: the processor, or an accelerator that torch finds here."""

import os

import torch

from fedloom.errors import BackboneError


def device(name: str) -> torch.device:
    """The device of a name: cpu, or an accelerator's (cuda, cuda:1, mps, xpu); raises BackboneError.

    On an accelerator, torch is asked for operations that give the same bits each time, and for products in full
    float32; it warns of what has no such operation.
    """
    have = available()
    try:
        found = torch.device(name)
    except RuntimeError:
        found = None
    # An index alone, as "1", is one of the accelerator's for torch; here a device is always called by its kind.
    if found is None or str(found) != name or name not in have:
        raise BackboneError(
            f"there is no device '{name}' here: torch {torch.__version__} finds {', '.join(have)}. Name one of these, "
            "or install a torch for it (pytorch.org/get-started)."
        )
    if found.type != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS asks for, to be deterministic
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return found


def available() -> tuple[str, ...]:
    """The names of this machine's devices, the processor first."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return ("cpu",)
    return ("cpu", kind.type, *(f"{kind.type}:{i}" for i in range(torch.accelerator.device_count())))


def has_bf16(name: str = "cpu") -> bool:
    """Whether a device multiplies bfloat16 in hardware."""
    if name == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    if not (name.startswith("cuda") and name in available()):
        return False
    with torch.cuda.device(name):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
