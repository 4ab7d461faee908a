"""The card of an export: README.md, for people and for the Hugging Face hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fedloom.backbones import locate
from fedloom.export.about import About
from fedloom.export.uses import uses
from fedloom.report.figures import counted, measured, one_line
from fedloom.report.figures import rounds as in_words
from fedloom.runs import Run
from fedloom.tables import plain

TEMPLATES = Path(__file__).parent.parent / "assets" / "export"
LIBRARY = {"peft": "peft", "merged": "transformers", "onnx": "onnx"}  # of the first form
NAMED = {"local": "local-only"}
SHOWN = 50  # labels


def card(run: Run, about: About, model_type: str, adapted: bool) -> str:
    """The Markdown of a site's card.

    model_type: of the backbone
    adapted: whether there is an adapter to load
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=False,  # it is no HTML
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["counted"] = counted
    said = _licence(about.backbone.name)
    labels = [_cell(label) for label in about.task.labels]
    result, metric, examples = _result(run, about)
    stage = f"{counted(about.round, 'round')}{' and fine-tuning of its own' if about.tuned else ''}"
    text: str = environment.get_template("card.md.j2").render(
        header=_header(about, said),
        site=_cell(about.site),
        sites=[_cell(site) for site in run.sites],
        method=_cell(about.method),
        backbone=_cell(about.backbone.name),
        dtype=about.backbone.dtype,
        rule=about.rule,
        parts=", ".join(about.parts),
        stage=stage,
        unfinished=about.round < about.rounds,
        round=about.round,
        rounds=about.rounds,
        results=result,
        metric=metric,
        examples=examples,
        roster=_roster(run, about.round),
        uses=list(uses(about, model_type, adapted)),
        task=str(plain(about.task)["kind"]),
        labels=", ".join(labels[:SHOWN]) + (f" and {len(labels) - SHOWN} more" if len(labels) > SHOWN else ""),
        licence=_licensed(about.backbone.name, said),
        tuned=about.tuned,
        recipe=about.recipe,
        weights=about.weights,
        versions=[("fedloom", about.fedloom), *sorted(about.versions.items())],
    )
    return text


def _header(about: About, licence: str | None) -> str:
    from huggingface_hub import ModelCardData

    name = about.backbone.name
    return ModelCardData(
        license=licence,
        base_model=None if Path(locate(name)).exists() else name,
        library_name=LIBRARY[about.forms[0]],
        tags=["fedloom", "federated-learning", about.method],
    ).to_yaml()


def _licence(backbone: str) -> str | None:
    """What the backbone's own card says, where it is at hand."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    folder = Path(locate(backbone))
    path = folder / "README.md" if folder.is_dir() else try_to_load_from_cache(backbone, "README.md")
    if not (isinstance(path, str | Path) and Path(path).is_file()):
        return None
    try:
        found: Any = ModelCard.load(path).data.to_dict().get("license")
    except (OSError, ValueError):
        return None
    return str(found) if found else None


def _licensed(backbone: str, licence: str | None) -> str:
    if licence is None:
        return f"That of the backbone `{_cell(backbone)}`, which does not say it here: look at where it comes from."
    return f"The backbone's is {licence}, and holds for what is made of it."


def _result(run: Run, about: About) -> tuple[list[tuple[str, str]], str, int | None]:
    """The site's figure beside its references; of an unfinished run, or a round asked for, on its held-out examples."""
    if run.round is not None or not run.finished:
        line = run.rounds[about.round - 1]["sites"].get(about.site, {})
        value = line.get("metric")
        metric = f"{about.task.metric.capitalize()} on this site's held-out examples"
        return ([(_cell(about.method), measured(about.task.metric, value))] if value is not None else []), metric, None
    row = _measured(run.summary["views"], about.site)
    if not row:
        return [], "", None
    found = [(_cell(about.method), measured(row["metric"], row["value"]))]
    for name, views in run.summary["references"].items():
        if beside := _measured(views, about.site):
            found.append((NAMED.get(name, name), measured(row["metric"], beside["value"])))
    return found, f"{row['metric'].capitalize()} on this site's own test examples", row["examples"]


def _measured(views: Mapping[str, Any], site: str) -> Mapping[str, Any]:
    """On the site's own test examples: of one that took part, or of a newcomer."""
    found = ((views[view] or {}).get("sites", {}).get(site) for view in ("personal", "newcomer"))
    return next(filter(None, found), {})


def _roster(run: Run, last: int) -> list[tuple[str, ...]]:
    """By site, the rounds in which it answered and those in which it was asked and did not."""
    rows = []
    for site in run.sites:
        asked = {line["round"]: line["sites"][site]["answered"] for line in run.rounds[:last] if site in line["sites"]}
        kinds = ([n for n, answered in asked.items() if answered is kind] for kind in (True, False))
        rows.append((_cell(site), *(in_words(numbers) if numbers else "" for numbers in kinds)))
    return rows


def _cell(text: str) -> str:
    """A name as it can stand in a table."""
    return one_line(text).replace("|", "\\|")
