"""Backbones: frozen Hugging Face models that take adapters from outside."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from fedloom.backbones.adaptable import CPU, Adaptable
from fedloom.backbones.batches import Batch, Features
from fedloom.backbones.network import Network
from fedloom.errors import BackboneError
from fedloom.sources import suggestion

__all__ = ["Adaptable", "Batch", "Features", "Network", "load"]

Attention = Literal["eager", "sdpa"]


def load(
    name: str,
    towers: tuple[str, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    attention: Attention = "sdpa",
    checkpointing: bool = False,
    device: torch.device = CPU,
) -> Adaptable:
    """A frozen backbone by the name of a built-in one, by folder, or by its name on the Hugging Face hub.

    device: where it computes (`fedloom.backbones.devices`); what goes in and comes out is on the CPU
    towers: those that take an adapter; None: the family's own, which is `vision` for CLIP and SigLIP

    raises BackboneError: there is no such model, it cannot be read, it is of a family that fedloom does not adapt, or
    its weights are of another architecture than its config.json says
    """
    folder = locate(name)
    kind = _model_type(folder)
    if kind not in LOADERS:
        raise BackboneError(f"backbone '{name}' is a '{kind}'; fedloom adapts {', '.join(sorted(LOADERS))}.")
    return Adaptable(LOADERS[kind](Weights(folder, dtype, attention, device), towers), checkpointing)


def locate(name: str) -> str:
    """A built-in backbone's folder, a folder as it is, or else a name on the hub."""
    built_in = Path(str(files("fedloom"))) / "assets" / "backbones"
    have = sorted(path.name for path in built_in.glob("*") if path.is_dir())
    if name in have:
        return str(built_in / name)
    if Path(name).is_dir() or (name.count("/") == 1 and not name.startswith((".", "/"))):
        return name
    remedy = " The folder is made of ALBEF's checkpoint by fedloom.backbones.albef_convert." if "albef" in name else ""
    raise BackboneError(
        f"no backbone '{name}'{suggestion(name, have)}: not a folder, not a hub name (owner/model), and built in are "
        f"{have}.{remedy}"
    )


def _model_type(folder: str) -> str:
    from transformers import PretrainedConfig

    if Path(folder).is_dir():
        path = Path(folder) / "config.json"
        try:
            return str(json.loads(path.read_text())["model_type"])
        except (OSError, ValueError, KeyError) as e:
            raise BackboneError(f"'{path}' is not the config.json of a Hugging Face model: {e!r}.") from e
    try:
        return str(PretrainedConfig.get_config_dict(folder)[0]["model_type"])
    except (OSError, ValueError, KeyError) as e:
        raise BackboneError(
            f"backbone '{folder}' cannot be had from the hub ({reason(e)}); name a local folder."
        ) from e


@dataclass(frozen=True)
class Weights:
    """A folder, or a name on the hub, and how its model is loaded."""

    folder: str
    dtype: torch.dtype
    attention: Attention
    device: torch.device


def _module(weights: Weights) -> Any:
    """The model without any head for pre-training; its pooler is None where the checkpoint has none."""
    from transformers import AutoModel

    folder = weights.folder
    try:
        with quietly():  # what it reports is checked below
            module, read = AutoModel.from_pretrained(
                folder, dtype=weights.dtype, attn_implementation=weights.attention, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        raise BackboneError(f"backbone '{folder}' cannot be read: {reason(e)}") from e
    missing = sorted(read["missing_keys"])
    if other := [name for name in missing if not name.startswith("pooler.")]:
        raise BackboneError(
            f"backbone '{folder}' lacks {len(other)} weights that its config.json asks for ('{other[0]}' ...): "
            "they are of another architecture; take config.json and weights from one place."
        )
    if missing:
        module.pooler = None
    return module.to(weights.device)


_one_at_a_time = threading.Lock()


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Transformers reads and writes without its progress bar and its report, and in one thread at a time.

    While it loads it exchanges `PreTrainedModel.tie_weights` for the whole process. Where two threads load at once, the
    second puts the exchanged one back as the original, and from then on no model's weights are tied.
    """
    import transformers

    logging: Any = transformers.utils.logging
    with _one_at_a_time:
        verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bar:
                logging.enable_progress_bar()


def _processors(folder: str, *names: str) -> tuple[Any, ...]:
    """Of these classes of transformers, what the folder holds."""
    import transformers

    try:
        return tuple(getattr(transformers, name).from_pretrained(folder) for name in names)
    except (OSError, ValueError, RuntimeError) as e:
        raise BackboneError(f"backbone '{folder}' cannot be read: {reason(e)}") from e


def reason(e: Exception) -> str:
    """The first line of what an exception says; its name where it says nothing."""
    return next(iter(str(e).strip().splitlines()), type(e).__name__)


def _albef(weights: Weights, towers: tuple[str, ...] | None) -> Network:
    import fedloom.backbones.albef_model  # noqa: F401 (AutoModel learns of it)
    from fedloom.backbones.albef import TOWERS, Albef

    processor = _processors(weights.folder, "AutoImageProcessor", "AutoTokenizer")
    return Albef(_module(weights), processor, towers or TOWERS)


def _clip(weights: Weights, towers: tuple[str, ...] | None) -> Network:
    from fedloom.backbones.clip import CLIP

    processor = _processors(weights.folder, "AutoImageProcessor", "AutoTokenizer")
    return CLIP(_module(weights), processor, towers or ("vision",))


def _text(weights: Weights, towers: tuple[str, ...] | None) -> Network:
    from fedloom.backbones.text import Text

    (tokenizer,) = _processors(weights.folder, "AutoTokenizer")
    return Text(_module(weights), tokenizer, towers or ("text",))


def _vilt(weights: Weights, towers: tuple[str, ...] | None) -> Network:
    from fedloom.backbones.vilt import ViLT

    processor = _processors(weights.folder, "AutoImageProcessor", "AutoTokenizer")
    return ViLT(_module(replace(weights, attention="eager")), processor, towers or ("joint",))


Loader = Callable[[Weights, tuple[str, ...] | None], Network]

LOADERS: Mapping[str, Loader] = {  # by the model_type of config.json
    "albef": _albef,
    "bert": _text,
    "clip": _clip,
    "distilbert": _text,
    "electra": _text,
    "roberta": _text,
    "siglip": _clip,
    "vilt": _vilt,
    "xlm-roberta": _text,
}
