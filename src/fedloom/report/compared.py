"""comparison.html, one page that needs nothing else, made from comparison.json alone."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedloom.errors import RunError
from fedloom.report import charts
from fedloom.report.figures import counted, duration, listed, loses, one_line, size
from fedloom.report.page import VIEWS, templates
from fedloom.report.result import NAMES, OWN_LABELS, STATISTICS
from fedloom.store import write

FILE = "comparison.json"
ALONE = "local"  # what a site would have without the others; a row may be judged against another (`judge`)
MANY = 12  # rows of which no table tells every difference
MARKS = {
    "pooled": "the data of all sites at one place, which no federation may do",
    "feddat": "a site's head takes two steps a batch, one under each of its adapters",
}
COLOURS = 7  # then they come again, dashed
Content = Mapping[str, Any]  # of comparison.json
Estimate = Mapping[str, Any]  # a mean over seeds and its interval


def read(folder: Path) -> dict[str, Any]:
    """What comparison.json of a folder holds.

    raises RunError: it is damaged
    """
    path = folder / FILE
    try:
        content: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if absent := {"recipe", "rows", "seeds", "differences"} - content.keys():
            raise KeyError(*sorted(absent))
        for place, own, kind in _typed(content):
            if not isinstance(own, kind):
                raise TypeError(f"{place} is {own!r}")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
        raise RunError(
            f"'{path}' is no whole comparison ({type(e).__name__}: {e}); remove it and compare its rows again with "
            "--resume: what was run is kept beside it."
        ) from None
    return content


def _typed(content: Content) -> Iterator[tuple[str, Any, Any]]:
    """What is read of a comparison before it is gone on with, and what each has to be."""
    yield from (("rows", content["rows"], dict), ("seeds", content["seeds"], list))
    yield from ((f"rows.{row}", own, dict) for row, own in content["rows"].items())
    yield "tuning", content.get("tuning"), dict | None
    yield "target", content.get("target"), int | float | str | None


def write_comparison(folder: Path) -> None:
    """Write comparison.html beside the comparison.json that it is made from.

    raises StoreError: the folder cannot be written
    """
    content = read(folder)
    write(folder / "comparison.html", compared_page(content, folder.name.removeprefix("compare-")).encode())


def compared_page(content: Content, name: str) -> str:
    """The comparison as HTML."""
    kinds = {row: f"r{i % COLOURS} d{i // COLOURS % 3}" for i, row in enumerate(content["rows"])}
    return (
        templates()
        .get_template("comparison.html.j2")
        .render(
            title=f"{one_line(name)}: {counted(len(kinds), 'row')} compared",
            said=list(_said(content)),
            rows=content["rows"],
            kinds=kinds,
            names=NAMES,
            blocks=[_block(content, figure) for figure in means(content)],
            traces={
                (task, axis): [charts.traces(_lines(content, kinds, task, axis), width) for width in (720, 360)]
                for task in _tasks(content)
                for axis in ("round", "bytes")
            },
            sites=_sites(content),
            alone=better_alone(content),
            costs=costs(content),
            target=content.get("target"),
            missing=missing(content),
            endpoints=content.get("endpoints") or [],
            tuning=content.get("tuning"),
            lineage=_lineage(content),
        )
    )


def means(content: Content) -> list[str]:
    """The figures that are means over sites, VIEW.TASK.mean and .own_labels, in the order of the views."""
    over = (".mean", f".{OWN_LABELS}")
    names = dict.fromkeys(name for row in content["rows"].values() for name in row["summary"] if name.endswith(over))
    order = list(VIEWS)
    return sorted(names, key=lambda name: order.index(view) if (view := name.partition(".")[0]) in order else 99)


def difference(content: Content, of: str, minus: str, figure: str) -> Estimate | None:
    """The paired difference of two rows, whichever way round comparison.json has it."""
    for own in content["differences"]:
        if own["figure"] != figure:
            continue
        if (own["of"], own["minus"]) == (of, minus):
            return dict(own)
        if (own["of"], own["minus"]) == (minus, of):
            low, high = (None, None) if own["low"] is None else (-own["high"], -own["low"])
            return {**own, "of": of, "minus": minus, "mean": -own["mean"], "low": low, "high": high}
    return None


def judge(content: Content, row: str) -> str:
    """The row that a row is judged against: local-only, where comparison.json names no other."""
    return content["rows"].get(row, {}).get("alone") or ALONE


def told(content: Content) -> list[Estimate]:
    """The differences that fit into a table: of every two rows; where there are many, of each minus training alone, and
    of the best in a view minus each."""
    if len(content["rows"]) <= MANY:
        return list(content["differences"])
    rows, ahead = content["rows"], means(content)
    pairs: dict[tuple[str, str, str], None] = {}
    for name in dict.fromkeys(own["figure"] for own in content["differences"]):
        pairs |= {(row, judge(content, row), name): None for row in rows}
        if name in ahead:
            scores = {row: own["summary"][name]["mean"] for row, own in rows.items() if name in own["summary"]}
            best = max(scores, key=lambda row: scores[row])
            pairs |= {(best, row, name): None for row in rows}
    return [own for pair in pairs if (own := difference(content, *pair)) is not None]


def marked(content: Content) -> list[str]:
    """What has to be said of some rows."""
    ran = {row: one for row, one in content["rows"].items() if one["summary"]}
    marks = [f"{row}: {note}" for row, note in MARKS.items() if row in ran]
    notes: dict[tuple[str, bool], list[str]] = {}
    for row, one in ran.items():
        alone = one.get("alone")
        if alone in ran and alone != row and one["adapter"] is not None:
            notes.setdefault((alone, one["adapter"] == ran[alone]["adapter"]), []).append(row)
    for (alone, same), rows in notes.items():
        if not same:
            marks.append(f"judged against {alone}, which trains another adapter: {listed(rows)}")
        elif alone != ALONE:
            marks.append(f"judged against {alone}, which trains the same adapter alone: {listed(rows)}")
    fewer: dict[int, list[str]] = {}
    for row, one in ran.items():
        fewer.setdefault(len(one["cells"]), []).append(row)
    for n, rows in sorted(fewer.items()):
        if n < len(content["seeds"]):
            marks.append(f"{n} of the {counted(len(content['seeds']), 'seed')}, and paired on those: {listed(rows)}")
    return marks


def federates(content: Content, row: str) -> bool:
    """Whether the sites of a row send anything that those which train alone do not."""
    sent = {name: one["summary"].get("bytes_up", {}).get("mean", 0.0) for name, one in content["rows"].items()}
    return bool(sent[row] > sent.get(judge(content, row), 0.0))


def better_alone(content: Content) -> dict[str, list[str]]:
    """By row that federates: the sites that lose by it on their own test split, mean over seeds, as it is shown."""
    found = {}
    for row, one in content["rows"].items():
        sites = one.get("sites", {}).get("personal", {})
        losing = [one_line(site) for site, own in sites.items() if own["gain"] and loses(own["gain"]["mean"])]
        if losing and federates(content, row):
            found[row] = losing
    return found


def missing(content: Content) -> dict[str, dict[str, list[str]]]:
    """By row: every reason for which a cell is not there, and the seeds that have it."""
    found: dict[str, dict[str, list[str]]] = {}
    for row, one in content["rows"].items():
        for seed, reason in one["missing"].items():
            found.setdefault(row, {}).setdefault(one_line(reason), []).append(seed)
    return found


def _said(content: Content) -> Iterator[str]:
    seeds = len(content["seeds"])
    yield (
        f"{listed(content['rows'])}, on the same sites and splits at {counted(seeds, 'seed')}. "
        "An interval is the 95 % t interval over seeds; sites are fixed, so it does not speak for others."
    )
    yield from (f"{said}." for said in marked(content))
    if gone := missing(content):
        yield f"Not all could run: {listed(gone)}; the reasons are below."


def _block(content: Content, figure: str) -> dict[str, Any]:
    """A view and task: each row's statistics, and the matrix of paired differences."""
    view, _, rest = figure.partition(".")
    task, _, over = rest.rpartition(".")  # a group of sites may have a dot in its name
    known = over == OWN_LABELS
    columns = {over: "mean"} if known else STATISTICS
    rows = {row: one["summary"] for row, one in content["rows"].items() if figure in one["summary"]}
    numbers = [x for own in rows.values() for x in (own[figure]["mean"], own[figure]["high"]) if x is not None]
    return {
        "view": view,
        "task": task,
        "known": known,
        "meaning": f"{VIEWS.get(view, '')}{', of labels that it knows' if known else ''}",
        "columns": list(columns.values()),
        "scale": charts.bars(numbers),
        "rows": {
            row: {
                "own": own[figure],
                "statistics": {key: own.get(f"{view}.{task}.{key}", {}).get("mean") for key in columns},
                "gain": difference(content, row, judge(content, row), figure),
            }
            for row, own in rows.items()
        },
        "matrix": {of: {minus: difference(content, of, minus, figure) for minus in rows} for of in rows},
    }


def _tasks(content: Content) -> list[str]:
    return list(dict.fromkeys(task for row in content["rows"].values() for task in row.get("held_out", {})))


def _lines(
    content: Content, kinds: Mapping[str, str], task: str, axis: str
) -> list[tuple[str, str, Sequence[tuple[float, float]]]]:
    return [
        (kinds[row], NAMES.get(row, row), [(at[axis], at["mean"]) for at in one.get("held_out", {}).get(task, ())])
        for row, one in content["rows"].items()
    ]


def _sites(content: Content) -> dict[str, Any]:
    """Each row that federates: its sites on their own test split, beside training alone; one scale for all."""
    personal = {row: one.get("sites", {}).get("personal", {}) for row, one in content["rows"].items()}
    rows = {
        row: [
            {
                "name": one_line(site),
                "own": own,
                "alone": personal.get(judge(content, row), {}).get(site, {}).get("mean"),
                "gain": own["gain"],
            }
            for site, own in sites.items()
        ]
        for row, sites in personal.items()
        if sites and federates(content, row)
    }
    numbers = [x for own in rows.values() for site in own for x in (site["own"]["mean"], site["alone"])]
    return {
        "rows": rows,
        "scale": charts.bars([x for x in numbers if x]),
        "others": {row: alone for row in rows if (alone := judge(content, row)) != ALONE},
        "judged": any(site["gain"] for own in rows.values() for site in own),
    }


def costs(content: Content) -> dict[str, dict[str, Any]]:
    """By row that ran: bytes (sent, and private at all sites), ranks left, time of its rounds where it has any,
    FLOPs and trained parameters as people read them; and rounds to the target."""
    found: dict[str, dict[str, Any]] = {}
    for row, one in content["rows"].items():
        own, counts = one["summary"], one.get("costs", {})
        if own:
            found[row] = {
                "up": size(own["bytes_up"]["mean"]),
                "down": size(own["bytes_down"]["mean"]),
                "private": size(own["private_bytes"]["mean"]) if "private_bytes" in own else "",
                "ranks": f"{own['rank']['mean']:.2f}" if "rank" in own else "",
                "time": duration(spent) if (spent := (one.get("seconds") or {}).get("mean")) else "",
                "flops": f"{counts['flops'] / 1e12:.3g} T" if "flops" in counts else "",
                "trained": f"{counts['trained']:,}" if "trained" in counts else "",
                "reached": one.get("reached", {}),
                "uncounted": one_line(counts.get("uncounted", "")),
            }
    return found


def _lineage(content: Content) -> dict[str, str]:
    known = {
        "recipe": content["recipe"],
        "seeds": ", ".join(map(str, content["seeds"])),
        "protocol": ", ".join(content.get("protocols", ())),
        "fedloom": content["fedloom"],
    }
    return {key: one_line(str(value)) for key, value in known.items() if value}
