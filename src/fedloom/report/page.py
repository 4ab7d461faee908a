"""report.html, one page that needs nothing else, and the picture of a result."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fedloom.report import charts, diagnostics, figures, probabilities, result
from fedloom.report.figures import counted, duration, listed, on_the_wire, one_line, percent, size
from fedloom.report.result import NAMES, Row, Summary, at
from fedloom.store import write

LABELS = {
    "majority": "the majority answer",
    "frozen": "the frozen model",
    "local": "local-only training",
    "pooled": "pooled training",
}
Lines = Sequence[Mapping[str, Any]]  # of rounds.jsonl
TEMPLATES = Path(__file__).parent.parent / "assets" / "report"
VIEWS = {
    "personal": "each site on its own test split",
    "global": "each site on the test splits of all, every class counting alike",
    "newcomer": "sites that came after the last round",
}


def write_report(folder: Path) -> None:
    """Write report.html beside the files of a run folder that it is made from.

    raises StoreError: the folder cannot be written
    """
    summary = json.loads((folder / "summary.json").read_text())
    local = _lines(folder / "references" / "local")
    html = page(summary, _lines(folder), local, (folder / "recipe.toml").read_text())
    write(folder / "report.html", html.encode())


def page(summary: Summary, lines: Lines = (), local: Lines = (), recipe: str = "") -> str:
    """The report as HTML. lines and local: those of rounds.jsonl of the method and of local-only."""
    rows = _worst_first(result.sites(summary))
    table = tomllib.loads(recipe)
    rounds = int(summary["rounds"])
    return (
        templates()
        .get_template("report.html.j2")
        .render(
            title=f"{result.method(summary)} on {_last(at(table, 'data', 'source'))}",
            said=[
                said.replace(" %", "\N{NO-BREAK SPACE}%")
                for said in (_done(summary, rows, table), *_reached(summary, rows))
            ],
            method=result.method(summary),
            references={name: NAMES.get(name, name) for name in result.references(summary)},
            metrics=list(dict.fromkeys(row.metric for row in rows)),
            rows=rows,
            scale=charts.bars([x for row in rows for x in row.numbers]),
            statistics=result.statistics(summary),
            unmeasured=result.unmeasured(summary),
            views=[
                (view, meaning, result.means(summary, view), result.why_left_out(summary, view))
                for view, meaning in VIEWS.items()
            ],
            curves=[_curves(summary, lines, local, width) for width in (720, 360)],
            rounds=rounds,
            maps=diagnostics.maps(lines),
            numbers=diagnostics.numbers(lines),
            errors=_in_order(probabilities.errors(summary), rows),
            diagrams=probabilities.diagrams(summary),
            detected=_in_order(probabilities.by_site(summary), rows),
            labels=probabilities.by_label(summary),
            labelwise={name: figures.NAMES.get(name, name) for name in probabilities.LABELWISE},
            roster=result.roster(summary),
            silences=result.silences(summary),
            sent=_sent(summary),
            lineage=_lineage(summary, table),
            recipe=recipe,
        )
    )


def picture(summary: Summary) -> str:
    """What each site gained as an SVG for a README, light or dark as its reader likes it."""
    rows = _worst_first(result.sites(summary))
    longest = max((len(row.label) for row in rows), default=0)
    left = min(220, 24 + 7.2 * longest)
    scale = charts.bars([x for row in rows for x in row.numbers], left, 640)
    return (
        templates()
        .get_template("picture.svg.j2")
        .render(
            method=result.method(summary),
            references={name: NAMES.get(name, name) for name in result.references(summary)},
            metrics=list(dict.fromkeys(row.metric for row in rows)),
            rows=rows,
            rounds=int(summary["rounds"]),
            scale=scale,
            letters=int((left - 24) / 7.2),
        )
    )


def _done(summary: Summary, rows: Sequence[Row], table: Mapping[str, Any]) -> str:
    who = counted(len(result.roster(summary)) or len(rows), "site")
    adapter = " ".join(_adapter(table)) or "its adapter"
    return (
        f"{who} fine-tuned {_last(at(table, 'backbone', 'name'))} together on {_last(at(table, 'data', 'source'))}: "
        f"{counted(int(summary['rounds']), 'round')} of {result.method(summary)} with {adapter} in "
        f"{duration(summary['seconds'])}, {size(summary['bytes_up'])} sent up and {size(summary['bytes_down'])} down."
    )


def _reached(summary: Summary, rows: Sequence[Row]) -> list[str]:
    """The second sentence; none where no site was measured, or where sites are measured differently."""
    means = [statistics[0] for statistics in result.statistics(summary).values()]
    if len(means) != 1 or means[0].value is None:
        return []
    mean, beside = means[0], []
    for name in mean.beside:
        if (gain := mean.gain(name)) is not None:
            away = f"{percent(abs(gain))} points {'below' if gain < 0 else 'above'}"
            label = LABELS.get(name, name)
            beside.append(f"{away if percent(abs(gain)) != '0.0' else 'level with'} {label}")
    sentence = f"On their own test data the mean {rows[0].metric} of the sites is {percent(mean.value)} %"
    sentence += f", {listed(beside)}" if beside else ""
    if worst := [row.label for row in rows if row.worst]:
        sentence += f"; the worst, {listed(worst)}, has {percent(rows[0].value)} %"
    if "local" in mean.beside:
        alone = sum(row.better_alone for row in rows)
        sentence += f", and {alone or 'none'} of {counted(len(rows), 'site')} would do better alone"
    return [sentence + "."]


def _curves(summary: Summary, lines: Lines, local: Lines, width: int) -> charts.Curves | None:
    sites: dict[str, dict[int, float]] = {}
    for line in lines:
        for name, row in line["sites"].items():
            if row.get("metric") is not None:
                sites.setdefault(name, {})[line["round"]] = row["metric"]
    federated, alone = _means(lines), _means(local)
    means = [
        *(("method", task if len(federated) > 1 else result.method(summary), own) for task, own in federated.items()),
        *(("local", NAMES["local"], own) for own in alone.values()),
    ]
    return charts.curves(means, list(sites.values()), width)


def _means(lines: Lines) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for line in lines:
        for task, mean in result.held_out_means(line).items():
            found.setdefault(one_line(task), {})[line["round"]] = mean
    return found


def _sent(summary: Summary) -> dict[str, str]:
    answers = sum(len(line["answered"]) for line in summary.get("roster") or ())
    ways = {
        way: size(n := summary[f"bytes_{way}"]) + (f", {size(n / answers)} an answer" if answers else "")
        for way in ("up", "down")
    }
    if summary.get("bytes_site"):
        ways["on the wire"] = f"{on_the_wire(summary['bytes_site'])}, for the site that moves most"
    if summary.get("memory"):
        ways["memory"] = f"{size(summary['memory'])} at most, of one process with all sites' data"
    return ways


def _lineage(summary: Summary, table: Mapping[str, Any]) -> dict[str, str]:
    partition = dict(at(table, "data", "partition") or {})
    known = {
        "method": str(summary["method"]),
        "adapter": " ".join(_adapter(table)),
        "backbone": _last(at(table, "backbone", "name")),
        "precision": at(table, "backbone", "dtype"),
        "wire": ", ".join(f"{way}: {' '.join(chain)}" for way in ("up", "down") if (chain := at(table, "wire", way))),
        "data": _last(at(table, "data", "source")),
        "sites": ", ".join([partition.pop("kind", ""), *(f"{key} {value}" for key, value in partition.items())]),
        "seed": str(summary["seed"]),
        "recipe hash": str(summary["recipe"]),
        "fedloom": str(summary["fedloom"]),
        "backbone hash": str(at(summary, "lineage", "backbone") or ""),
        "data hash": str(at(summary, "lineage", "data") or ""),
        "plan": str(at(summary, "lineage", "plan") or ""),
        "versions": ", ".join(f"{name} {own}" for name, own in (at(summary, "lineage", "versions") or {}).items()),
    }
    return {key: one_line(value) for key, value in known.items() if value}


def _adapter(table: Mapping[str, Any]) -> list[str]:
    adapter = at(table, "method", "adapter") or {}
    sizes = [f"of {key} {adapter[key]}" for key in ("rank", "width") if key in adapter]
    return [str(adapter["kind"]), *sizes] if "kind" in adapter else []


def _worst_first(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row.metric, row.value is None, row.value))


def _in_order(found: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """What is known by site, in the order of the rows."""
    ordered = dict.fromkeys([*(row.label for row in rows), *found])
    return {name: found[name] for name in ordered if name in found}


def _last(name: str | None) -> str:
    """A path's last part, a pack's name, a name on the hub as it is."""
    name = (name or "its data").removeprefix("pack:")
    return Path(name).name if Path(name).is_absolute() else name


def _lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "rounds.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def templates() -> Environment:
    """The templates of assets/report, and how they write figures."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,  # names and reasons come from sites
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=lambda x: "–" if x is None else percent(x).replace("-", "−"),
        points=lambda x: figures.points(x).replace("-", "−"),
        loses=figures.loses,
        between=lambda interval: figures.between(interval).replace("-", "−"),
        gained=lambda interval: figures.between(interval, signed=True).replace("-", "−"),
        listed=listed,
        rounds=lambda numbers: figures.rounds(numbers).replace("-", "–"),
        counted=counted,
        sentence=figures.sentence,
        size=size,
    )
    return environment
