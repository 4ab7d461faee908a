r"""An adapter as a folder of Hugging Face PEFT: LoRA, (IA)³ and bottlenecks are written, LoRA is read.

    adapter_config.json          ranks, α, and the modules of the model by their full paths
    adapter_model.safetensors    base_model.model.MODULE.lora_A.weight (r, in), .lora_B.weight (out, r); .ia3_l (out, 1)

PEFT scales by α over the rank of each module, where ours is a constant s of the federation: a module of m ranks is
written with α = s m. PEFT knows no gates: they are folded into A, and a rank that adds nothing is left out. A module
without a rank is no target. PEFT knows no bottleneck either: `fedloom.peft_bottleneck` tells it of one, whose tensors
are MODULE.bottleneck_down.weight (b, d), .bias (b), MODULE.bottleneck_up.weight (d, b), .bias (d).
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import mode
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from fedloom import lowrank
from fedloom.adapters import IA3, Bottleneck, LoRA
from fedloom.backbones.adaptable import Adaptable
from fedloom.errors import AdapterError, StoreError
from fedloom.lowrank import Factors
from fedloom.places import Adapter
from fedloom.tensors import Tensors, by_place, from_bytes, of_model, without

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
BOTTLENECK = "BOTTLENECK"  # a method that `fedloom.peft_bottleneck` adds to PEFT's
# Starts that change the frozen weights too, so that the adapter fits no other copy of the backbone.
REBASED = ("corda", "loftq", "lora_ga", "olora", "pissa")


def files(model: Adaptable, adapter: Adapter, tensors: Tensors, base: str) -> dict[str, bytes]:
    """The two files of an adapter, by name; none where it changes nothing.

    base: the backbone's name, which PEFT keeps
    raises AdapterError: an adapter of a kind that PEFT does not have
    """
    own = without("head", of_model(tensors))
    match adapter:
        case LoRA():
            config, weights = _lora(model, alive(own), adapter.scale)
        case IA3():
            config, weights = _ia3(model, own)
        case Bottleneck():
            config, weights = _bottleneck(model, adapter, own)
        case _ if not own:
            return {}
        case _:
            raise AdapterError(f"PEFT has no adapter of the kind {type(adapter).__name__}.")
    if not weights:
        return {}
    common = {"base_model_name_or_path": base, "inference_mode": True, "task_type": None}
    content = json.dumps({**common, **config}, indent=2, sort_keys=True) + "\n"
    return {CONFIG: content.encode(), WEIGHTS: save(weights, {"format": "pt"})}


def alive(tensors: Tensors) -> dict[str, Factors]:
    """The plain factors of a LoRA, unscaled, gates folded, without ranks that add nothing; float64."""
    found = {}
    for place, (B, A) in lowrank.products(tensors).items():
        kept = A.ne(0).any(1) & B.ne(0).any(0)
        if kept.any():
            found[place] = (B[:, kept], A[kept])
    return found


def _lora(model: Adaptable, factors: Mapping[str, Factors], scale: float) -> tuple[dict[str, Any], dict[str, Tensor]]:
    ranks = {model.modules[place]: len(A) for place, (_, A) in sorted(factors.items())}
    usual = mode(ranks.values()) if ranks else 1
    unusual = {module: rank for module, rank in ranks.items() if rank != usual}
    config = {
        "peft_type": "LORA",
        "r": usual,
        "lora_alpha": scale * usual,
        "rank_pattern": unusual,
        "alpha_pattern": {module: scale * rank for module, rank in unusual.items()},
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
    }
    weights = {}
    for place, (B, A) in factors.items():
        weights[f"{PREFIX}{model.modules[place]}.lora_A.weight"] = A.float().contiguous()
        weights[f"{PREFIX}{model.modules[place]}.lora_B.weight"] = B.float().contiguous()
    return config, weights


def _ia3(model: Adaptable, tensors: Tensors) -> tuple[dict[str, Any], dict[str, Tensor]]:
    factors = {model.modules[place]: leaves["l"] for place, leaves in by_place(tensors).items()}
    config = {"peft_type": "IA3", "target_modules": sorted(factors), "feedforward_modules": []}
    return config, {f"{PREFIX}{module}.ia3_l": factor[:, None].contiguous() for module, factor in factors.items()}


def _bottleneck(model: Adaptable, adapter: Bottleneck, tensors: Tensors) -> tuple[dict[str, Any], dict[str, Tensor]]:
    shapes, weights = {}, {}
    for place, leaves in sorted(by_place(tensors).items()):
        module = model.modules[place]
        width, dim = leaves["down"].shape
        shapes[module] = [dim, width]
        for part in ("down", "up"):
            weights[f"{PREFIX}{module}.bottleneck_{part}.weight"] = leaves[part].contiguous()
            weights[f"{PREFIX}{module}.bottleneck_{part}.bias"] = leaves[f"{part}_bias"].contiguous()
    config = {"peft_type": BOTTLENECK, "target_modules": sorted(shapes), "shapes": shapes}
    return {**config, "activation": adapter.activation}, weights


def import_peft(folder: Path, model: Adaptable, adapter: LoRA, base: str) -> dict[str, Tensor]:
    """A LoRA that PEFT has trained, as tensors of `adapter`, whose scale they take.

    base: the name of the federation's backbone; only its last part counts, since a copy may lie anywhere
    raises AdapterError: it is no plain LoRA, of another backbone, or at other places than `adapter`
    """
    config, weights = _read(folder)
    _plain(folder, config)
    theirs = str(config.get("base_model_name_or_path") or "")
    if theirs and Path(theirs).name != Path(base).name:
        raise AdapterError(
            f"the LoRA in '{folder}' was trained on '{theirs}', and the backbone here is '{base}'; if that is the same "
            f"model, say so in its {CONFIG} (base_model_name_or_path)."
        )
    expected = {model.modules[place.name]: place for place in model.places if adapter.at(place)}
    found = _modules(folder, weights, f"{getattr(model.network.module, 'base_model_prefix', '')}.")
    if other := sorted(found.keys() ^ expected.keys()):
        where = "has a LoRA" if other[0] in found else "has none"
        raise AdapterError(
            f"'{folder}' {where} at the module '{other[0]}', other than [method.adapter] here ({len(found)} modules "
            f"against {len(expected)}); set its targets and last, and [backbone] towers, as the LoRA was trained."
        )
    tensors = {}
    for module, place in expected.items():
        A, B = found[module]["A"], found[module]["B"]
        rank, scale = _scale(config, module)
        shapes = ((rank, place.in_dim), (place.out_dim, rank))
        if (A.shape, B.shape) != shapes:
            raise AdapterError(
                f"the LoRA in '{folder}' has factors of {tuple(A.shape)} and {tuple(B.shape)} at '{module}', expected "
                f"{shapes[0]} and {shapes[1]}: it is of another backbone, or its {CONFIG} of another adapter."
            )
        tensors[f"{place.name}/A"] = A.float()
        tensors[f"{place.name}/B"] = B.float() * (scale / adapter.scale)
        if adapter.gated:
            tensors[f"{place.name}/gate"] = torch.ones(rank)
    return tensors


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
        weights = from_bytes((folder / WEIGHTS).read_bytes())
    except (OSError, ValueError, StoreError) as e:
        raise AdapterError(f"'{folder}' is no PEFT folder with {CONFIG} and {WEIGHTS}: {e}") from e
    if not isinstance(config, dict):
        raise AdapterError(f"'{folder / CONFIG}' is no configuration of PEFT: it is no table.")
    return config, weights


def _plain(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises AdapterError for what is more than W + s B A on the weights that the backbone came with."""
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"'{folder}' holds a {config.get('peft_type')} of PEFT; only a LORA can be brought in.")
    changed = [key for key, on in config.items() if key.startswith("use_") and key != "use_rslora" and on is True]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(REBASED):
        changed.append(f"init_lora_weights = '{start}'")
    if config.get("bias", "none") != "none":
        changed.append(f"bias = '{config['bias']}'")
    changed += [key for key in ("layer_replication", "modules_to_save", "target_parameters") if config.get(key)]
    if changed:
        raise AdapterError(
            f"the LoRA in '{folder}' is no plain one ({', '.join(changed)}); merge it into a model of its own and "
            "train a plain one, or convert it with PEFT."
        )


def _modules(folder: Path, weights: Mapping[str, Tensor], root: str) -> dict[str, dict[str, Tensor]]:
    """The factors by module; `root`: what the modules of a model with a head have before their names."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(?:{re.escape(root)})?(.+)\.lora_([AB])\.weight", name)
        if match is None or not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise AdapterError(
                f"'{folder / WEIGHTS}' holds '{name}', expected finite factors lora_A and lora_B of linear layers only."
            )
        found.setdefault(match[1], {})[match[2]] = tensor
    if half := [module for module, factors in found.items() if len(factors) < 2]:
        raise AdapterError(f"'{folder / WEIGHTS}' holds one factor of two at '{half[0]}'.")
    return found


def _scale(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """The rank and the scale of a module, as PEFT reads them."""

    def of(pattern: str, usual: str) -> Any:
        for key, own in (config.get(pattern) or {}).items():
            try:
                if re.fullmatch(rf"(.*\.)?({key})", module):
                    return own
            except re.error as e:
                raise AdapterError(f"{pattern} of {CONFIG} has '{key}', which is no regular expression: {e}.") from e
        return config.get(usual, 8)

    rank, alpha = of("rank_pattern", "r"), of("alpha_pattern", "lora_alpha")
    if not (isinstance(rank, int) and isinstance(alpha, int | float) and rank > 0 and math.isfinite(alpha)):
        raise AdapterError(f"the rank and α of '{module}' are {rank!r} and {alpha!r}; expected numbers, r above 0.")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
