"""A comparison that is published, with what was run later: rows and seeds added or run again, wrong ones withdrawn."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from fedloom.outcomes import differences
from fedloom.report.compared import told
from fedloom.statistics import interval
from fedloom.tuning import ROWS

NAMED = re.compile(r"--(?:rows|methods) (\S+)")


def joined(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """A comparison with the rows and seeds that were published `before` it and that it has not itself.

    Of a row that both have, sites, curves and seconds are those of the one with more seeds, the later where they tie.
    Gains of an earlier row over training alone stay what they were. Where the later has nothing that was not published,
    nothing changes, but that it was run `again`.

    raises SystemExit: another recipe, plan or tuning; no cell in both; one whose scores are not the same
    """
    tunings = [one.get("tuning") or {} for one in (before, after)]
    grids = [{key: own for key, own in t.get("grid", {}).items() if key != ROWS} for t in tunings]  # rows' own: below
    tried, chosen = ({row: (own["tried"], own["choice"]) for row, own in t.get("rows", {}).items()} for t in tunings)
    for name, own, its in [
        ("recipe", before.get("recipe"), after.get("recipe")),
        ("tuning: grid", *grids),
        ("tuning: seeds", *(tuning.get("seeds") for tuning in tunings)),
        *((f"tuning of {row}", tried[row], chosen[row]) for row in tried.keys() & chosen.keys()),
        *((key, said, after["plan"][key]) for key, said in before["plan"].items()),
    ]:
        if own != its:
            raise SystemExit(f"What is published was made with another {name}: {own}, and now {its}.")
    old, new = before["rows"], after["rows"]
    again = [
        (f"{row}, seed {seed}, {name}", score, new[row]["cells"][seed].get(name, "gone"))
        for row in old.keys() & new.keys()
        for seed in old[row]["cells"].keys() & new[row]["cells"].keys()
        for name, score in old[row]["cells"][seed].items()
        if "." in name  # bytes on disk may have changed with a file's head
    ]
    if not again:
        raise SystemExit("No cell of what is published was run again: nothing tells that its rows are of one kind.")
    for place, own, its in again:
        if own != its:
            raise SystemExit(f"{place}: it was {own}, and now {its}.")
    if all(row in old and own["cells"].keys() <= old[row]["cells"].keys() for row, own in new.items()):
        confirmed = {key: after[key] for key in ("command", "commit", "machine", "protocols")}
        return before | {"again": [*before.get("again", ()), confirmed]}
    rows = old | new | {row: grown(old[row], new[row]) for row in old if row in new}
    earlier = {key: before[key] for key in ("command", "commit", "machine", "protocols")} | {"rows": ran(before)}
    earlier |= {"withdrawn": before["withdrawn"]} if before.get("withdrawn") else {}
    tuning = {"tuning": {**tunings[1], "rows": tunings[0]["rows"] | tunings[1]["rows"]}} if tunings[1] else {}
    result = {
        **{key: own for key, own in after.items() if key != "endpoints"},
        **tuning,
        "seeds": sorted({*before["seeds"], *after["seeds"]}),
        "rows": rows,
        "differences": differences(rows),
        "earlier": [*before.get("earlier", ()), earlier],
        **({"again": before["again"]} if "again" in before else {}),
    }
    return result | {"differences": told(result)}


def ran(content: dict[str, Any]) -> list[str]:
    """The rows that its command made: those that it names, else all; the others were added to."""
    named = NAMED.search(content["command"])
    asked = named[1].split(",") if named else content["rows"]
    return [row for row, own in content["rows"].items() if row in asked and own["cells"]]


def without(content: dict[str, Any], rows: Collection[str]) -> dict[str, Any]:
    """A comparison whose rows of these names are `withdrawn`, with what was tuned for them.

    raises SystemExit: it has no such row
    """
    if gone := [row for row in rows if row not in content["rows"]]:
        raise SystemExit(f"What is published has no row '{gone[0]}' to withdraw.")

    def left(names: Mapping[str, Any]) -> dict[str, Any]:
        return {row: own for row, own in names.items() if row not in rows}

    before = [one | {"rows": [row for row in one["rows"] if row not in rows]} for one in content.get("earlier", ())]
    tuning = content.get("tuning")
    return {
        **content,
        "rows": left(content["rows"]),
        "earlier": [one for one in before if one["rows"]],
        **({"tuning": tuning | {"rows": left(tuning["rows"])}} if tuning else {}),
        "withdrawn": list(rows),
    }


def grown(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A row with the cells of both."""
    both = old["cells"] | new["cells"]
    cells = {seed: both[seed] for seed in sorted(both, key=int)}
    names = dict.fromkeys(name for cell in cells.values() for name in cell)
    summary = {name: interval([cell[name] for cell in cells.values() if name in cell]) for name in names}
    missing = {seed: why for seed, why in (old["missing"] | new["missing"]).items() if seed not in cells}
    longest = max(new, old, key=lambda row: len(row["cells"]))
    adapter = {key: new[key] for key in ("adapter", "alone") if key in new}  # which early pages do not have
    return longest | {"cells": cells, "summary": summary, "missing": missing} | adapter
