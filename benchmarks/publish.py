"""Publish a finished run or comparison: its figures as JSON, the tables of docs/results made from them, never typed.

    python benchmarks/publish.py runs/quickstart quickstart --command "make demo" [--picture docs/quickstart.svg]
    python benchmarks/publish.py runs/suite/vqamed-merge vqamed-merge --command "fedloom suite vqamed-merge --seeds 0-4"
    python benchmarks/publish.py runs/suite/vqamed-merge vqamed-merge --command "..." --add
    python benchmarks/publish.py

Writes benchmarks/results/NAME.json (the run's summary or the comparison, with the command, the commit, what it says of
its machine, and the hash of the protocol that it was run under: its own word, else that of benchmarks/protocol.toml at
its commit), if it is given a run, and from all that is there every page of docs/results: NAME.md, and README.md, which
is benchmarks/found.md with its figures, every endpoint of the protocol, and the settings. With --add rows and seeds
that were published before and are not in this run stay, if at least one cell of them was run again, and all that were
came out the same to the bit (a run of nothing else is only named); with --withdraw ROW,... those rows do not, as what
made them was wrong.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from found import filled
from joined import joined, without

from fedloom.endpoints import judged, protocol
from fedloom.outcomes import Comparison
from fedloom.report import comparison_table, picture, table
from fedloom.report.compared import told
from fedloom.runs import Run

FIRST, LAST = 5, 15  # seeds, of [seeds] in the protocol
PERSONAL = re.compile(r"personal\.\w+\.mean")
ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="or a comparison; none: the pages of what is published")
    parser.add_argument("name", nargs="?")
    parser.add_argument("--command", help="what made the run")
    parser.add_argument("--commit", help="at which it was made, where it is not this one")
    parser.add_argument("--add", action="store_true", help="to what is published under this name")
    parser.add_argument("--withdraw", metavar="ROW,...", default="", help="of what is published, what was made wrongly")
    parser.add_argument("--picture", type=Path, help="an SVG to draw")
    arguments = parser.parse_args()
    if arguments.run is not None:
        if not arguments.run.is_dir():
            parser.error(f"there is no run in '{arguments.run}'")
        if not (arguments.name and arguments.command):
            parser.error("a run is published under a name, with the --command that made it")
        result = published(arguments.run, arguments.command, arguments.commit)
        if arguments.add:
            before = json.loads((RESULTS / f"{arguments.name}.json").read_text())
            wrong = list(filter(None, arguments.withdraw.split(",")))
            result = joined(without(before, wrong) if wrong else before, result)
        (RESULTS / f"{arguments.name}.json").write_text(json.dumps(result, indent=1) + "\n")
        if arguments.picture:
            arguments.picture.write_text(picture(result["summary"]))
    for path, written in pages():
        path.write_text(written)


def published(run: Path, command: str, commit: str | None = None) -> dict[str, Any]:
    """What is kept of a run or a comparison, beside how it was made."""
    about = {"command": command, **lineage(commit), **computed(run)}
    if (compared := run / "comparison.json").is_file():
        result = about | json.loads(compared.read_text())
        return result | {"differences": told(result), "plan": plan(run)}
    done = Run(run)
    return about | {"recipe": done.recipe.table(), "summary": done.summary}


def pages() -> Iterator[tuple[Path, str]]:
    """Every page of docs/results that is made here, from benchmarks/results, found.md and the protocol."""
    for name, result in contents().items():
        if "rows" in result:
            yield PAGES / f"{name}.md", compared_page(name, result)
        elif "summary" in result:
            yield PAGES / f"{name}.md", page(name, result)
    yield PAGES / "README.md", index()


def contents() -> dict[str, dict[str, Any]]:
    """All that is published, by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def lineage(commit: str | None = None) -> dict[str, Any]:
    """What a figure must say of itself: the commit it was made at, else this one, its protocol, and on what."""
    if commit is None:
        parsed = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        commit = parsed.stdout.strip()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return {"commit": commit, "machine": machine, "protocols": protocols_at(commit)}


def protocols_at(commit: str) -> list[str]:
    """The hash of the protocol as it stood at a commit, whatever stands there now; none where there was none."""
    show = ["git", "show", f"{commit}:benchmarks/protocol.toml"]
    shown = subprocess.run(show, cwd=ROOT, capture_output=True, check=False)
    return [] if shown.returncode else [hashlib.sha256(shown.stdout).hexdigest()]


def computed(run: Path) -> dict[str, str]:
    """The machine, as a run or the cells of a comparison tell: threads, device, versions; nothing where they do not."""
    files = (*run.glob("summary.json"), *run.glob("cells/*/summary.json"))
    told = [said for path in files if (said := json.loads(path.read_text()).get("lineage"))]
    # Without precision and attention, which stand in the comparison's own plan.
    machines = {", ".join([*said["plan"].split(", ")[2:], *map(" ".join, said["versions"].items())]) for said in told}
    return {"machine": "; ".join(sorted(machines))} if machines else {}


def plan(folder: Path) -> dict[str, str]:
    """The numerical plan of a comparison's cells: other kernels, other bits."""
    recipe = tomllib.loads(next(folder.glob("cells/*/recipe.toml")).read_text())
    return {key: recipe["backbone"][key] for key in ("dtype", "attention", "kernels")}


def page(name: str, result: dict[str, Any]) -> str:
    """The page of a run."""
    summary = result["summary"]
    return (
        f"# {name}\n\n"
        f"`{result['command']}`, seed {summary['seed']}, {made(result)}. "
        f"One run of one seed: no interval. Made from `benchmarks/results/{name}.json` by `benchmarks/publish.py`.\n\n"
        f"```text\n{table(summary)}\n```\n"
    )


def compared_page(name: str, result: dict[str, Any]) -> str:
    """The page of a comparison."""
    comparison = Comparison(result["rows"], result["differences"], result["seeds"], result.get("target"))
    numerics = ", ".join(f"{key} {value}" for key, value in result["plan"].items())
    return (
        f"# {name}\n\n"
        f"`{result['command']}`, {made(result)}; {numerics}. {''.join(map(earlier, result.get('earlier', ())))}"
        f"{''.join(map(again, result.get('again', ())))}"
        f"Made from `benchmarks/results/{name}.json` by `benchmarks/publish.py`.\n\n"
        f"```text\n{comparison_table(comparison)}\n```\n{tuned(result.get('tuning'))}"
    )


def earlier(result: dict[str, Any]) -> str:
    """What is said of rows that a page had before others were added."""
    wrong = ", ".join(result.get("withdrawn", ()))
    return (
        f"Of `{result['command']}`, {made(result)}: {', '.join(result['rows'])}; what was run again of that came out "
        f"the same to the bit. {f'Its {wrong} were wrong (CHANGELOG.md), and were run anew. ' if wrong else ''}"
    )


def again(result: dict[str, Any]) -> str:
    """What is said of cells that were run again later, and added nothing."""
    return f"Run again as `{result['command']}`, {made(result)}, it came out the same to the bit. "


def made(result: dict[str, Any]) -> str:
    """At which commit, under which protocol if there was one, and where."""
    hashes = ", ".join(hash[:10] for hash in result.get("protocols", ()))
    return f"commit {result['commit'][:10]}, {f'protocol {hashes}, ' if hashes else ''}{result['machine']}"


def tuned(tuning: dict[str, Any] | None) -> str:
    """What was chosen for each row, and what each choice came to; nothing where nothing was tuned."""
    if tuning is None:
        return ""
    said = list(dict.fromkeys(json.dumps(one["set"]) for own in tuning["rows"].values() for one in own["tried"]))
    lines = [
        f"\nChosen for each row on seeds {', '.join(map(str, tuning['seeds']))}, by the mean held-out metric of the "
        "sites (per cent):\n",
        f"| row | {' | '.join(said)} |",
        f"| --- |{' ---: |' * len(said)}",
    ]
    for row, own in tuning["rows"].items():
        if own["choice"] is None:
            continue
        cells = dict.fromkeys(said, "")
        for one in own["tried"]:
            mark = "**" if one["set"] == own["choice"] else ""
            cells[json.dumps(one["set"])] = (
                f"{mark}{100 * one['held_out']:.1f}{mark}" if "held_out" in one else "failed"
            )
        lines.append(f"| {row} | {' | '.join(cells.values())} |")
    if at := edge(tuning):
        lines.append(f"\nAt the edge of its grid, where more might be gained: {', '.join(at)}.")
    return "\n".join(lines) + "\n"


def edge(tuning: dict[str, Any]) -> list[str]:
    """The rows that chose the first or the last of some key's values, though it mattered which."""
    return [
        row
        for row, own in tuning["rows"].items()
        if len({tried.get("held_out") for tried in own["tried"]}) > 1
        and any(
            len(values) > 1 and value in (values[0], values[-1])
            for key, value in (own["choice"] or {}).items()
            if (values := list(dict.fromkeys(tried["set"][key] for tried in own["tried"])))
        )
    ]


def index() -> str:
    """The page of all results: what was found, the protocol's endpoints, the settings."""
    everything = contents()
    compared = {name: content for name, content in everything.items() if "rows" in content}
    asked = protocol(ROOT / "benchmarks" / "protocol.toml")
    assert asked is not None
    found = filled((ROOT / "benchmarks" / "found.md").read_text(), compared)
    results = judged(asked.endpoints, compared)
    primaries = [one for one in results if one["kind"] == "primary"]
    lines = [found.rstrip(), "", "## The endpoints of the protocol", ""]
    lines += [
        "In points, with 95 % t intervals over seeds. `benchmarks/protocol.toml` was committed before they were run; "
        "those that are told as added were named later, and why stands there. `Above it` is the protocol's criterion: "
        f"the lower limit is above the margin. By it {' and '.join(map(met, primaries))}.",
        "",
        "p is of a stricter test, which the protocol does not name and which was added later: all signs of the paired "
        "differences from the margin flipped, of secondary endpoints by Holm over all that the protocol names. It can "
        "give no p below 0.06 at five seeds, nor Holm one below 0.31 (FedPIA) or 0.62 (FedDLP) while all endpoints of "
        "a method have five, whatever was measured; where some have more, the seeds went on.",
        "",
        f"Where an interval holds zero and the margin, the protocol goes on from {FIRST} seeds by two, up to {LAST}; "
        "some went there at once, an endpoint that was decided goes on when another of the same rows does, and one "
        "that may yet go on is marked open. Of looking more than once the intervals know nothing: each look adds to "
        "the 2.5 % of a false `yes` that one has. Splits are drawn by seed from one pool: seeds share some test "
        "examples, and some stood in a split of a development seed, but none in its own seed's training.",
        "",
        "The protocol has had several versions, as settings and endpoints were added, and rows were not run again for "
        "that: each page has the hashes of its own; single runs are under none. Of FedDAT and the baselines nothing "
        "was asked beforehand: what is said of them is a survey.",
        "",
        "| method | endpoint | setting, view | difference | seeds | result | margin | above it | p |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | --- | ---: |",
    ]
    lines += map(endpoint, results)
    lines += [
        "",
        "## The settings",
        "",
        "Personal view, mean over sites, per cent; the page has all views and intervals. A row of fewer seeds than its "
        "setting has their number after it: seeds differ by points, so do not rank its mean among the others; the page "
        "pairs rows by seed.",
        "",
    ]
    lines += ["| setting | seeds | protocol | rows |", "| --- | ---: | --- | --- |"]
    lines += [line for name, content in compared.items() for line in setting(name, content)]
    lines += ["", "## Single runs, and how well `advise` forecasts", ""]
    lines += [f"- [{name}]({name}.md)" for name in everything if name not in compared]
    return "\n".join(lines) + "\n"


def met(one: dict[str, Any]) -> str:
    """Whether a method's primary endpoint was met."""
    return f"the primary endpoint of {one['method']} was {'met' if one.get('above') else 'missed'}"


def undecided(one: dict[str, Any]) -> bool:
    """Whether the protocol goes on with an endpoint: its interval holds zero and the margin."""
    return bool(one["n"] < LAST and one["low"] <= min(0, one["margin"]) and max(0, one["margin"]) <= one["high"])


def endpoint(one: dict[str, Any]) -> str:
    """A line of the protocol's table."""
    worst = "" if one["figure"] == "mean" else ", worst fifth"
    head = (
        f"| {one['method']} | {one['kind']} | {one['setting']}, {one['view']}{worst} | {one['of']} - {one['minus']} | "
    )
    if "why" in one:
        return f"{head}| not yet: {one['why']} | {100 * one['margin']:.1f} | | |"
    limits, seeds = "one seed", "1"
    if one["low"] is not None:
        limits = f"[{100 * one['low']:.1f}, {100 * one['high']:.1f}]"
        seeds = f"{one['n']}, open" if undecided(one) else f"{one['n']}"
    p = one["p"] if one.get("holm") is None else one["holm"]
    above = {True: "yes", False: "no", None: "–"}[one["above"]]
    return f"{head}{seeds} | {100 * one['mean']:+.1f} {limits} | {100 * one['margin']:.1f} | {above} | {p:.2f} |"


def setting(name: str, content: dict[str, Any]) -> Iterator[str]:
    """Of each task a line of the table of settings: the rows, best first."""
    figures = dict.fromkeys(key for own in content["rows"].values() for cell in own["cells"].values() for key in cell)
    personal = [figure for figure in figures if PERSONAL.fullmatch(figure)]
    hashes = ", ".join(hash[:7] for hash in content["protocols"]) or "none"
    for figure in personal:
        means = {}
        for row, own in content["rows"].items():
            if values := [cell[figure] for cell in own["cells"].values() if figure in cell]:
                fewer = f" ({len(values)})" if len(values) < len(content["seeds"]) else ""
                means[row] = 100 * sum(values) / len(values), fewer
        ranked = sorted(means.items(), key=lambda told: -told[1][0])
        rows = ", ".join(f"{row} {mean:.1f}{fewer}" for row, (mean, fewer) in ranked)
        task = f", {figure.split('.')[1]}" if len(personal) > 1 else ""
        yield f"| [{name}]({name}.md){task} | {len(content['seeds'])} | {hashes} | {rows} |"


if __name__ == "__main__":
    main()
