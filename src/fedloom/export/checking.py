"""Whether an export still answers as the federation did: every form is loaded and asked, by the library it is for."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fedloom.backbones import Attention, load, reason
from fedloom.backbones.adaptable import Adaptable
from fedloom.backbones.batches import Batch
from fedloom.errors import ExportError, FedloomError, StoreError
from fedloom.export import about
from fedloom.export.about import About
from fedloom.export.fingerprint import FILE, apart, tolerance
from fedloom.export.onnx import FILE as GRAPH
from fedloom.export.onnx import inputs, run_onnx
from fedloom.peft_folder import CONFIG, WEIGHTS
from fedloom.sections import Backbone
from fedloom.tensors import digest, from_bytes

HEAD, MERGED = "head.safetensors", "merged"


@dataclass(frozen=True)
class Check:
    """One form of one site's export, beside the federation's own logits."""

    site: str
    form: str
    part: str  # of a blend, else empty
    apart: float  # the largest difference, as a part of 1 + the largest |logit|; infinite where it cannot be asked
    tolerance: float
    why: str = ""  # it cannot be asked

    @property
    def equal(self) -> bool:
        return self.apart <= self.tolerance

    @property
    def told(self) -> str:
        """A sentence."""
        form = f"{self.form} ({self.part})" if self.part else self.form
        if self.why:
            return f"site '{self.site}', {form}: {self.why}"
        found = f"{self.apart:.1e} apart from the federation's own, of {self.tolerance:.0e} allowed"
        return f"site '{self.site}', {form}: logits {'equal' if self.equal else 'differ'}, {found}."


def checked(folder: Path) -> Iterator[Check]:
    """Every form of an export, or of all exports beneath a folder.

    One that cannot be asked is told with why: a file is missing or damaged, or the backbone is not the one that was
    trained on. Raises ExportError where there is no export.
    """
    found = sorted(path.parent for path in folder.rglob(about.FILE))
    if not found:
        raise ExportError(f"'{folder}' holds no export; name a folder that fedloom export wrote.")
    base = lru_cache(1)(_base)
    for site in found:
        try:
            said = about.read(site)
        except FedloomError as e:
            yield Check(site.name, about.FILE, "", math.inf, 0.0, str(e))
            continue
        for form in said.forms:
            for part in said.parts or ("",) if form == "peft" else ("",):
                within = tolerance(form, said.backbone.dtype)
                try:
                    model = base(said.backbone, said.weights)
                    batch = said.inputs.batch(model.network, said.task)
                    expected = _tensors(site / part / FILE)["logits"]
                    difference = apart(_logits(form, site / part, said, model, batch), expected)
                except FedloomError as e:
                    yield Check(said.site, form, part, math.inf, within, str(e))
                else:
                    yield Check(said.site, form, part, difference, within)


@torch.no_grad()
def _logits(form: str, folder: Path, said: About, model: Adaptable, batch: Batch) -> Tensor:
    if form == "onnx":
        return run_onnx(folder / GRAPH, inputs(model.network, batch))
    if form == "merged":
        return _answer(load(str(folder / MERGED), said.backbone.towers), folder, said, batch)
    if not (folder / CONFIG).exists():  # the adapter changes nothing
        return _answer(model, folder, said, batch)
    peft = in_peft(model.network.module, folder)
    try:
        return _answer(model, folder, said, batch)
    finally:
        peft.unload()


def in_peft(module: Any, folder: Path) -> Any:
    """The model with the adapter of a folder in it, by PEFT."""
    try:
        from peft import PeftModel

        import fedloom.peft_bottleneck  # noqa: F401  (PEFT learns of it)
    except ImportError:
        raise ExportError("a PEFT folder is checked by PEFT, which is missing: pip install 'fedloom[peft]'.") from None
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ExportError(f"'{folder / name}' is missing; export the run again.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it says of its own future is no concern of the user
            return PeftModel.from_pretrained(module, folder).eval()
    except Exception as e:  # a damaged folder can fail in any way
        raise ExportError(
            f"PEFT cannot load '{folder}', whose {CONFIG} or {WEIGHTS} is damaged ({type(e).__name__}: {reason(e)}); "
            "export the run again."
        ) from e


def _answer(model: Adaptable, folder: Path, said: About, batch: Batch) -> Tensor:
    head = _tensors(folder / HEAD) if (folder / HEAD).exists() else {}
    # Named as live, towers give up what they keep of other weights.
    features = model.network.features(batch, {place.tower for place in model.places})
    return said.task.logits(features, head)


def _base(named: Backbone, weights: str) -> Adaptable:
    model = load(named.name, named.towers, getattr(torch, named.dtype), cast(Attention, named.attention))
    if digest(model.network.module.state_dict()) != weights:
        raise ExportError(
            f"the backbone '{named.name}' here has other weights than the one that was trained on (SHA-256 "
            f"{weights[:12]}...); get that one."
        )
    return model


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return from_bytes(path.read_bytes())
    except (OSError, StoreError) as e:
        raise ExportError(f"'{path}' is missing or damaged ({reason(e)}); export the run again.") from e
