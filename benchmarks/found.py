"""The figures of benchmarks/found.md: named there, read from benchmarks/results, never typed.

    {own caltech-dirichlet-few: feddlp - local}   +2.5 ± 1.2
    {all caltech-dirichlet-few: feddlp}           19.3
    {own.labels mixed-tasks: feddat - local}      of one task, where there are several
    {own PAGE: ROW - PAGE: ROW}                   rows of two pages, paired by seed
    {sent caltech-wire: wire-int8 / fedavg}       0.25, of the bytes that sites send
    {above own PAGE: ROW}                         the rows whose difference from ROW is above zero, below, or level
    {pairs own all of SETTING, SETTING.TASK, ... by ROW - ROW, ...}

A figure is a mean over seeds, in points; a difference is one over the seeds that both rows have, with half of its 95 %
t interval. `pairs` is a table of each row minus the other, a line for each setting: of the setting's pages that have
both at more than one seed that with most counts; where none has, two of its pages have, and a star says so. Bold leaves
out zero.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fedloom.statistics import interval

Contents = Mapping[str, Mapping[str, Any]]  # the comparisons that are published, by page
Scores = dict[str, float]  # of a row, by seed

VIEWS = {
    "own": ("personal", "mean"),
    "worst": ("personal", "worst_fifth"),
    "all": ("global", "mean"),
    "newcomer": ("newcomer", "mean"),
}
SIDES = ("below", "level", "above")
NAMED = re.compile(r"\{(\w+)(?:\.(\w+))?\s([^{}]+)\}")


def filled(text: str, contents: Contents) -> str:
    """The text with every figure that it names.

    raises SystemExit: no page, row, view or task of that name, or several tasks and none named
    """

    def figure(match: re.Match[str]) -> str:
        kind, task, named = match[1], match[2], " ".join(match[3].split())
        try:
            if kind == "pairs":
                return pairs(named, contents)
            if kind == "sent":
                return sent(named, contents)
            if kind in SIDES:
                return beside(kind, named, contents)
            return score(kind, task, named, contents)
        except (KeyError, ValueError) as e:
            raise SystemExit(f"found.md names {match[0]}, and the results have no such figure: {e}.") from None

    return NAMED.sub(figure, text)


def score(kind: str, task: str | None, named: str, contents: Contents) -> str:
    """A row's mean over seeds, or the difference of two rows."""
    of, _, minus = named.partition(" - ")
    page, row = of.split(": ")
    own = scores(contents[page]["rows"][row], kind, task)
    if not minus:
        return f"{100 * sum(own.values()) / len(own):.1f}"
    page, row = minus.split(": ") if ": " in minus else (page, minus)
    return estimate(differences(own, scores(contents[page]["rows"][row], kind, task)))


def scores(row: Mapping[str, Any], kind: str, task: str | None) -> Scores:
    """What a row scores in a view; empty where it has not run."""
    view, over = VIEWS[kind]
    name = re.compile(rf"{view}\.{task or '[^.]+'}\.{over}")
    found = [
        (seed, key, value) for seed, cell in row["cells"].items() for key, value in cell.items() if name.fullmatch(key)
    ]
    if len({key for _, key, _ in found}) != bool(row["cells"]):
        raise ValueError(f"{kind} is {', '.join(sorted({key for _, key, _ in found})) or 'not told'} there")
    return {seed: value for seed, _, value in found}


def differences(own: Scores, its: Scores) -> list[float]:
    """In points, over the seeds that both have."""
    return [100 * (own[seed] - its[seed]) for seed in own if seed in its]


def estimate(values: Sequence[float]) -> str:
    """A mean, with half of its interval."""
    told = interval(values)
    if told["mean"] is None or told["high"] is None:
        return f"{told['mean']:+.1f} (one seed)"
    return f"{told['mean']:+.1f} ± {told['high'] - told['mean']:.1f}"


def sent(named: str, contents: Contents) -> str:
    """What the sites of one row send, as a fraction of what those of another do."""
    page, rows = named.split(": ")
    own, its = (contents[page]["rows"][row]["summary"]["bytes_up"]["mean"] for row in rows.split(" / "))
    return f"{own / its:.2f}"


def beside(side: str, named: str, contents: Contents) -> str:
    """The rows of a page on one side of one of them, the furthest from it first; the level ones best first.

    raises ValueError: there is none
    """
    kind, page, row = re.split(r":? ", named)
    rows = contents[page]["rows"]
    its = scores(rows[row], kind, None)
    found = {}
    for name, own in rows.items():
        values = [] if name == row else differences(scores(own, kind, None), its)
        if len(values) > 1 and SIDES[1 + sign(values)] == side:
            found[name] = sum(values) / len(values)
    if not found:
        raise ValueError("no row is there")
    return ", ".join(f"`{name}`" for name in sorted(found, key=lambda name: found[name], reverse=side != "below"))


def sign(values: Sequence[float]) -> int:
    """Of a mean whose interval leaves out zero, else 0."""
    limits = interval(values)
    return int((limits["low"] or 0) > 0) - int((limits["high"] or 0) < 0)


def pairs(named: str, contents: Contents) -> str:
    """The table of rows minus others in some views, a line for each setting."""
    kinds, rest = named.split(" of ")
    settings, columns = (words.split(", ") for words in rest.split(" by "))
    lines = [f"| setting | seeds | {' | '.join(columns)} |", f"| --- | ---: |{' ---: |' * len(columns)}"]
    for line in settings:
        setting, _, task = line.partition(".")
        pages = about(setting, contents)
        found = [[paired(column, kind, task, pages) for kind in kinds.split()] for column in columns]
        values = [view for cell in found for view, _ in cell]
        if not any(values):
            raise ValueError(f"{line} has none of these rows")
        stars = ["" if together or not view else "\\*" for (view, together), *_ in found]
        cells = [" / ".join(told(view) for view, _ in cell if view) or "–" for cell in found]
        lines.append(f"| [{line}]({setting}.md) | {many(values)} | {' | '.join(map(str.__add__, cells, stars))} |")
    return "\n".join(lines)


def paired(rows: str, kind: str, task: str, pages: Sequence[Mapping[str, Any]]) -> tuple[list[float], bool]:
    """By seed, what a row is above another, and whether one page has both: that with most seeds, if more than one; else
    two pages."""
    row, minus = rows.split(" - ")
    found = [
        (differences(scores(one["rows"][row], kind, task), scores(two["rows"][minus], kind, task)), one is two)
        for one in pages
        for two in pages
        if row in one["rows"] and minus in two["rows"]
    ]
    return max(found, key=lambda pair: (min(len(pair[0]), 2), pair[1], len(pair[0])), default=([], True))


def many(found: Sequence[Sequence[float]]) -> str:
    """Over how many seeds the cells of a line are."""
    seeds = sorted({len(values) for values in found if values})
    return " to ".join(dict.fromkeys((str(seeds[0]), str(seeds[-1]))))


def about(setting: str, contents: Contents) -> list[Mapping[str, Any]]:
    """The pages of a setting, its own first."""
    return [contents[page] for page in sorted(contents, key=len) if of(contents[page]) == setting]


def of(content: Mapping[str, Any]) -> str | None:
    """The setting of a comparison; none where it is not of the suite."""
    words: list[str] = content["command"].split()
    return words[2] if words[1] == "suite" else None


def told(values: Sequence[float]) -> str:
    """A cell of the table."""
    if not values:
        return "–"
    return f"**{estimate(values)}**" if sign(values) else estimate(values)
