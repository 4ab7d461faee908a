"""Exports: what the sites of a run serve, for whoever has no fedloom.

    TO/SITE/
        README.md                   the card
        fedloom.json                lineage, task, labels
        adapter_config.json, adapter_model.safetensors      for PEFT
        head.safetensors            the site's head, where the task has one
        fingerprint.safetensors     the federation's own logits for inputs that never change
        ...                         the processor
        merged/                     a model of Hugging Face (--merged)
        model.onnx                  a graph (--onnx)

A method that serves a blend leaves a folder for each part, with an adapter, a head and a fingerprint of its own. Every
form is loaded again and asked before a folder gets its name. Two exports of one run are equal to the byte.
"""

import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedloom import __version__
from fedloom.assembly import site_folder
from fedloom.errors import AdapterError, ExportError, RunError
from fedloom.export.about import FILE as ABOUT
from fedloom.export.about import About, Form, versions
from fedloom.export.card import card
from fedloom.export.checking import HEAD, MERGED, Check, checked
from fedloom.export.fingerprint import FILE as FINGERPRINT
from fedloom.export.fingerprint import Inputs
from fedloom.export.folded import parameters
from fedloom.export.merged import write_merged, write_processor
from fedloom.export.onnx import FILE as GRAPH
from fedloom.export.onnx import widened, write_onnx
from fedloom.export.push import named, push
from fedloom.federation import visible
from fedloom.peft_folder import CONFIG, files
from fedloom.runs import Run
from fedloom.serving import Blend, Served
from fedloom.store import holds_anything, write
from fedloom.tables import plain
from fedloom.tensors import digest, part, to_bytes

BESIDE: tuple[Form, ...] = ("merged", "onnx")  # what may be asked for beside a PEFT folder

__all__ = ["Check", "Form", "checked", "export", "named", "push"]


def export(run: Run, to: Path, sites: Sequence[str] = (), forms: Collection[Form] = ()) -> dict[Path, list[Check]]:
    """A folder for each of these sites, or for all; what is written is checked before it is left there.

    run: finished, or looked at after a round (`Run.round`)
    forms: beside what PEFT loads, which is left out where PEFT has no adapter of this kind, and there is another form
    returns: by folder, how far each form is from the federation's own logits
    raises ExportError: what is served does not have this form, a folder is in the way, an extra is missing
    raises RunError: the run is not finished, or has no such site
    """
    if run.round is None and not run.finished:
        over, asked = run.last, run.recipe.federation.rounds
        raise RunError(
            f"the run in '{run.folder}' is not finished ({over} of {asked} rounds); go on with it (--resume), or "
            f"export what a round left: --round {over}."
        )
    if file := next((path for path in (to, *to.parents) if path.is_file()), None):
        raise ExportError(f"'{file}' is a file; name a folder with --to.")
    run = replace(run, device="cpu")  # on which whoever uses it may be
    folders = {site: to / site_folder(to, site).name for site in sites or run.sites}
    for folder in folders.values():
        if folder.is_file() or holds_anything(folder):
            raise ExportError(f"'{folder}' is not empty; name another folder with --to.")
    served = {site: _served(run, site) for site in folders}
    wanted = {site: _forms(run, site, predictor, forms) for site, predictor in served.items()}
    weights = digest(run.federation.model.network.module.state_dict())
    done: dict[Path, list[Check]] = {}
    for site, folder in folders.items():
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            _write(partial, run, served[site], _about(run, served[site], wanted[site], weights))
            done[folder] = list(checked(partial))
            for check in done[folder]:
                if not check.equal:
                    raise ExportError(f"{check.told} Nothing was left at '{folder}'.")
            shutil.rmtree(folder, ignore_errors=True)  # what a killed write left
            partial.replace(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return done


def _served(run: Run, name: str) -> Served | Blend:
    private = run.private(name)  # which refuses an unknown site
    site = run.participant(name).site
    predictor = run.federation.method.serve(site, visible(run.shared), private)
    if not isinstance(predictor, Served | Blend):
        raise ExportError(
            f"method '{run.recipe.method_name}' serves at site '{name}' neither an adapter nor a blend of some, and "
            "nothing else can be exported; of a method of your own, let `serve` return a fedloom.serving.Served."
        )
    return predictor


def _parts(predictor: Served | Blend) -> Mapping[str, Served]:
    """By folder."""
    return predictor.parts if isinstance(predictor, Blend) else {"": predictor}


def _forms(run: Run, name: str, predictor: Served | Blend, asked: Collection[Form]) -> tuple[Form, ...]:
    """The forms to write; raises ExportError for one that is asked for and does not exist."""
    if "merged" in asked and isinstance(predictor, Blend):
        raise ExportError(
            f"method '{run.recipe.method_name}' serves at site '{name}' a blend of {len(predictor.parts)} adapters "
            f"({predictor.rule}), which no merged model can be; run it with {predictor.alone} in [method], or leave "
            "out --merged and take the parts."
        )
    for served in _parts(predictor).values() if "merged" in asked else ():
        parameters(served.site.model, served.adapter, served.tensors)
    others = tuple(form for form in BESIDE if form in asked)
    try:
        for served in _parts(predictor).values():
            files(served.site.model, served.adapter, served.tensors, run.recipe.backbone.name)
    except AdapterError as e:
        if not others:
            raise ExportError(f"site '{name}': {e} {_remedy(predictor)}") from e
        return others
    return ("peft", *others)


def _remedy(predictor: Served | Blend) -> str:
    try:
        for served in _parts(predictor).values():
            parameters(served.site.model, served.adapter, served.tensors)
    except ExportError:
        return "Export a graph (--onnx)."
    return "Export a merged model (--merged), or a graph (--onnx)."


def _about(run: Run, predictor: Served | Blend, forms: tuple[Form, ...], weights: str) -> About:
    one = next(iter(_parts(predictor).values()))
    site, shown = one.site, one.site.train.examples
    images = any(example.image for example in shown)
    texts = any(example.text for example in shown) and (site.model.network.fuses or not images)
    return About(
        fedloom=__version__,
        site=site.name,
        method=run.recipe.method_name,
        round=run.last,
        rounds=run.recipe.federation.rounds,
        tuned=(run.round is None and run.recipe.training.finetune > 0) or site.name in run.federation.newcomers,
        recipe=run.recipe.id,
        backbone=run.recipe.backbone,
        weights=weights,
        task=site.task,
        inputs=Inputs(images, texts),
        forms=forms,
        adapter=str(plain(one.adapter)["kind"]),
        parts=tuple(predictor.parts) if isinstance(predictor, Blend) else (),
        rule=predictor.rule if isinstance(predictor, Blend) else None,
        versions=versions(),
    )


def _write(folder: Path, run: Run, predictor: Served | Blend, said: About) -> None:
    one = next(iter(_parts(predictor).values()))
    batch = said.inputs.batch(one.site.model.network, said.task)
    module: Any = one.site.model.network.module
    model_type, adapted = str(module.config.model_type), False
    for name, content in _contents(run, predictor, said):
        write(folder / name, content)
        adapted |= name.endswith(CONFIG)
    with torch.no_grad():
        write(folder / FINGERPRINT, to_bytes({"logits": predictor(batch)}))
    write(folder / ABOUT, said.dump())
    write_processor(folder, one)
    if "merged" in said.forms:
        write_merged(folder / MERGED, one)
    if "onnx" in said.forms:
        write_onnx(folder / GRAPH, widened(predictor, run.recipe), batch)
    write(folder / "README.md", card(run, said, model_type, adapted).encode())


def _contents(run: Run, predictor: Served | Blend, said: About) -> Iterator[tuple[str, bytes]]:
    """The files of each part, by their paths: the adapter's, the head, the fingerprint of a part of a blend."""
    for name, served in _parts(predictor).items():
        folder = f"{name}/" if name else ""
        found: dict[str, bytes] = {}
        if "peft" in said.forms:
            found |= files(served.site.model, served.adapter, served.tensors, said.backbone.name)
        if head := part("head", served.tensors):
            found[HEAD] = to_bytes(head)
        if name:
            batch = said.inputs.batch(served.site.model.network, said.task)
            with torch.no_grad():
                found[FINGERPRINT] = to_bytes({"logits": served(batch)})
        yield from ((f"{folder}{file}", content) for file, content in found.items())
