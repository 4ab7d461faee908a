"""The tables that the command line prints: at most 80 columns, plain text where there is no terminal."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.table import Column, Table
from rich.text import Text

from fedloom.report import compared, result
from fedloom.report.figures import (
    COUNTED,
    between,
    counted,
    duration,
    listed,
    loses,
    measured,
    on_the_wire,
    one_line,
    percent,
    points,
    rounds,
    sentence,
    size,
)
from fedloom.report.result import Row, Summary

if TYPE_CHECKING:
    from fedloom.advise import Advice
    from fedloom.answers import Measured
    from fedloom.outcomes import Comparison

WIDTH = 80
MIN_NAME, MAX_HEAD = 17, 11
MANY = 8  # silent sites that get a line each
LOSS = "red"
HEADS = {"local": "local-\nonly", "majority": "major-\nity"}  # narrow, so that all of a line is seen
VIEWS = {"global": "mean, global view", "newcomer": "mean, newcomers"}


def table(summary: Summary) -> str:
    """What each site gained, the other views, what it cost, and who fell silent."""
    rows = result.sites(summary)
    references, rivals = result.references(summary), result.rivals(summary)
    metrics = list(dict.fromkeys(row.metric for row in rows))
    heads = [HEADS.get(name, name) for name in references]
    several = len(metrics) > 1
    grid = _grid(
        "site",
        *(["metric"] if several else []),
        "test",
        *heads,
        result.method(summary),
        *(f"vs\n{name}" for name in rivals),
        "",
    )

    def add(row: Row, marks: str = "", gains: bool = True) -> None:
        differences = [row.gain(name) if gains else None for name in rivals]
        grid.add_row(
            Text(row.label),
            *([Text(row.metric)] if several else []),
            str(row.examples or ""),
            *(percent(row.beside.get(name)) for name in references),
            Text(percent(row.value), style="bold"),
            *(Text(points(x), style=LOSS if loses(x) else "") for x in differences),
            Text(marks, style=LOSS if "!" in marks else ""),
        )

    for row in rows:
        add(row, "*" * row.worst + "!" * row.better_alone)
    for task, statistics in result.statistics(summary).items():
        grid.add_row()
        for row in statistics:
            add(row if not several else Row(f"{row.label}, {task}", row.value, row.beside), gains=row.label != "std")
    grid.add_row()
    for view, label in VIEWS.items():
        tasks = result.means(summary, view)
        for task, (mean, *own) in tasks.items():
            for row in (replace(mean, label=label), *own):
                add(row if len(tasks) == 1 else replace(row, label=f"{row.label}, {task}"))
    title = f"{sentence(listed(metrics))} in percent, on each site's own test split" if rows else "No site was measured"
    return _text([Text(title, style="bold"), Text(), grid, Text(), *map(Text, _below(summary, rows))])


def metrics_table(found: Mapping[str, Mapping[str, float]], mean: bool = True) -> str:
    """The metrics of each site, and their mean over the sites that have them."""
    if not found:
        return "No site has an example in this split."
    names = list(dict.fromkeys(name for values in found.values() for name in values))
    names.sort(key=lambda name: name not in COUNTED)
    grid = _grid("site", *(name if name in COUNTED | {"loss"} else f"{name} %" for name in names))
    for site, values in found.items():
        grid.add_row(Text(one_line(site)), *(measured(name, values.get(name)) for name in names))
    if mean and len(found) > 1:
        grid.add_row()
        columns = {name: [values[name] for values in found.values() if name in values] for name in names}
        means = ("" if name in COUNTED else measured(name, sum(x) / len(x)) for name, x in columns.items())
        grid.add_row("mean", *means)
    return _text([grid])


def measured_table(found: "Mapping[str, Measured]", mean: bool = True) -> str:
    """`metrics_table`, and below it what the metrics leave out.

    mean: False for parts of sites, which are of unlike sizes and no sites
    """
    notes = []
    for name, row in found.items():
        if row.unseen:
            of = f"{row.unseen} of {row.metrics['examples']:.0f}"
            notes.append(f"{one_line(name)}: {of} have an answer that it does not know, and count as wrong")
        if row.undefined:
            labels = listed(f"'{label}'" for label in row.undefined)
            notes.append(f"{one_line(name)}: never or always there, and in no mean over labels: {labels}")
    table = metrics_table({name: row.metrics for name, row in found.items()}, mean)
    return _text([Text(table), *([Text(), *map(Text, notes)] if notes else [])])


def advice_table(found: "Sequence[Advice]") -> str:
    """What each site may expect of federating, and how far that can be told."""
    grid = _grid("site", "held\nout", "alone", "together", "gain", "95 %", "")
    for one in found:
        interval = "" if one.low is None or one.high is None else between((one.low, one.high), signed=True)
        gain = Text(points(one.gain), style=LOSS if loses(one.gain) else "")
        grid.add_row(
            *(Text(one_line(one.site)), str(one.examples), percent(one.alone), percent(one.together), gain),
            *(interval, Text(one.verdict, style=LOSS if one.verdict == "stay" else "")),
        )
    metrics = sentence(listed(dict.fromkeys(one.metric for one in found)))
    said = [
        "join, stay: the interval is above zero, below it; unclear: it holds zero.",
        "A forecast from one round on held-out examples; more rounds may change it. Held against finished runs",
        "such forecasts did not tell who gains (docs/results/advise.md): run it to know.",
    ]
    title = Text(f"{metrics} in percent on held-out examples, after one round", style="bold")
    return _text([title, Text(), grid, Text(), *map(Text, said)])


def comparison_table(comparison: "Comparison") -> str:
    """Rows with their 95 % intervals over seeds, in points, and their paired differences; a view a block. Below it how
    sites differ, what it cost, who would do better alone, what is not there and why, and what was tuned."""
    content: Mapping[str, Any] = vars(comparison)
    lines = [f"{counted(len(comparison.seeds), 'seed')}; in points, with 95 % t intervals over seeds"]
    if any(one.get("p") is not None and one["n"] > 1 for one in compared.told(content)):
        lines.append("p: sign-flip test of one pair by itself, not corrected for how many there are")
    for name in compared.means(content):
        lines += ["", name.removesuffix(".mean")]
        lines += [
            f"  {row:<24}{_estimate(own['summary'][name])}"
            for row, own in comparison.rows.items()
            if name in own["summary"]
        ]
        for difference in compared.told(content):
            if difference["figure"] == name:
                label = f"{difference['of']} - {difference['minus']}"
                p = f"  p {difference['p']:.3f}" if difference.get("p") is not None and difference["n"] > 1 else ""
                lines.append(f"    {label:<40}{_estimate(difference)}{p}")
    if own := [name for name in compared.means(content) if name.startswith("personal.")]:
        lines += ["", _text([*(_spread(content, name) for name in own), Text(), _costs(content)]), ""]
    lines += [_text([Text(f"* {said}")]) for said in compared.marked(content)]
    for row, sites in compared.better_alone(content).items():
        lines.append(_text([Text(f"! better alone than under {row}: {'; '.join(sites)}", style=LOSS)]))
    for row, reasons in compared.missing(content).items():
        lines += [f"{row}, seed {seed}: {reason}" for reason, seeds in reasons.items() for seed in seeds]
    return "\n".join([*lines, *_tuned(comparison.tuning)])


def _tuned(tuning: Mapping[str, Any] | None) -> list[str]:
    """The values that stand for each row, and of how many they were chosen."""
    if tuning is None:
        return []
    said = [f"\nchosen on seeds {listed(map(str, tuning['seeds']))}, by the mean held-out metric:"]
    for row, own in tuning["rows"].items():
        values = ", ".join(f"{key} = {value}" for key, value in (own["choice"] or {}).items())
        said.append(f"  {row:<24}{values or 'nothing'}, of {counted(own['points'], 'point')}")
    return said


def endpoints_table(endpoints: Sequence[Mapping[str, Any]]) -> str:
    """Each endpoint of a protocol: its interval, its margin, and p, of secondary ones by Holm; in points."""
    lines = ["endpoints, in points; p of the sign-flip test against the margin, of secondary ones by Holm"]
    for one in endpoints:
        worst = ", worst fifth" if one["figure"] == "worst_fifth" else ""
        lines.append(
            f"  {one['method']}, {one['kind']}: {one['setting']}, {one['view']}{worst}: {one['of']} - {one['minus']}"
        )
        if "why" in one:
            lines.append(f"    {one['why']}")
            continue
        above = {True: "above", False: "not above", None: "one seed: cannot be told from"}[one["above"]]
        p = f"p by Holm {one['holm']:.3f}" if "holm" in one else f"p {one['p']:.3f}"
        lines.append(f"    {_estimate(one)}  lower limit {above} the margin {points(one['margin'])}; {p}")
    return "\n".join(lines)


def _estimate(value: Mapping[str, Any]) -> str:
    mean = f"{100 * value['mean']:7.1f}"
    if value["low"] is None:
        return f"{mean}  (one seed: no interval)"
    return f"{mean}  [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def _spread(content: Mapping[str, Any], figure: str) -> Table:
    """How the sites of each row differ, and what the row has over training alone."""
    task = figure.removesuffix("mean")
    grid = _grid(f"{task}*, %", *result.STATISTICS.values(), "vs local")
    for row, own in content["rows"].items():
        gain = compared.difference(content, row, compared.judge(content, row), figure)
        values = (own["summary"].get(f"{task}{key}", {}).get("mean") for key in result.STATISTICS)
        if own["summary"]:
            grid.add_row(
                Text(one_line(row)),
                *map(percent, values),
                Text(points(gain["mean"] if gain else None), style=LOSS if gain and loses(gain["mean"]) else ""),
            )
    return grid


def _costs(content: Mapping[str, Any]) -> Table:
    costs, target = compared.costs(content), content.get("target")
    more = any(own["trained"] for own in costs.values())
    head = f"rounds to {target}"
    pruned = any(own["ranks"] for own in costs.values())
    left = ["private", "ranks"] * pruned
    asked = [head] if target is not None else []
    grid = _grid("cost", "up", "down", *left, "time", *asked, *(["FLOP", "trained"] * more))
    for row, own in costs.items():
        to = "; ".join(
            "never" if one["mean"] is None else f"{one['mean']:.3g} ({one['reached']}/{one['n']})"
            for one in own["reached"].values()
        )
        last = [own["flops"], own["trained"]] * more
        kept = [own["private"], own["ranks"]] * pruned
        reached = [to] * (target is not None)
        grid.add_row(Text(one_line(row)), own["up"], own["down"], *kept, own["time"], *reached, *last)
    return grid


def _below(summary: Summary, rows: Sequence[Row]) -> Iterable[str]:
    for view in VIEWS:
        if (why := result.why_left_out(summary, view)) is not None:
            yield f"{view} view left out: {why}"
    if worst := [row.label for row in rows if row.worst]:
        yield f"* worst: {listed(worst)}"
    if alone := [row.label for row in rows if row.better_alone]:
        yield f"! better alone ({len(alone)} of {counted(len(rows), 'site')}; local-only does better): {listed(alone)}"
    for name in result.unmeasured(summary):
        yield f"{name} was not measured, and counts in no mean"
    silences = result.silences(summary)
    if len(silences) <= MANY:
        for name, missed in silences.items():
            yield f"{name} was silent in {rounds(missed)}: {missed[max(missed)]}"
    else:
        often = (f"{name} ({counted(len(missed), 'round')})" for name, missed in silences.items())
        yield f"{len(silences)} sites were silent, see the report: {listed(often)}"
    spent = f"{counted(summary['rounds'], 'round')} in {duration(summary['seconds'])}"
    yield f"{spent}; {size(summary['bytes_up'])} up, {size(summary['bytes_down'])} down"
    if summary.get("bytes_site"):
        yield f"on the wire {on_the_wire(summary['bytes_site'])}, for the site that moves most"
    if summary.get("memory"):
        yield f"memory {size(summary['memory'])} at most, of one process with all sites' data"


def _grid(first: str, *heads: str) -> Table:
    numbers = (Column(Text(head, overflow="fold"), justify="right", max_width=MAX_HEAD) for head in heads)
    columns = [Column(first, overflow="fold", min_width=MIN_NAME), *numbers]
    apart = 2 if len(columns) < 10 else 1
    return Table(*columns, box=None, padding=(0, apart, 0, 0), pad_edge=False, header_style="", show_edge=False)


def _text(parts: Iterable[RenderableType]) -> str:
    console = Console()
    console.width = min(WIDTH, console.width) if console.is_terminal else WIDTH
    with console.capture() as capture:
        for part in parts:
            console.print(part, highlight=False)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().split("\n"))
