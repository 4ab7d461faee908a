"""compare, suite, study, verify-aggregation: methods beside each other, and what is inside them."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.cli.app import app
from fedloom.cli.options import Aim, Flops, ProtocolFile, RecipeName, Settings, Tune, Workers, folded, loaded, parts
from fedloom.errors import LawError, RecipeError, RunError

if TYPE_CHECKING:
    from fedloom.outcomes import Comparison


@app.command(epilog="Example: fedloom compare quickstart --methods fedavg,local,linear-probe --seeds 5")
def compare(
    recipe: RecipeName,
    methods: Annotated[
        str, typer.Option("--methods", metavar="A,B,...", help="Rows: methods, or names under \\[compare].")
    ],
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How many, from 0 on.")] = 5,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where its cells are kept.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with it; rows and seeds of before stay.")] = False,
    workers: Workers = 1,
    target: Aim = None,
    tune: Tune = False,
    flops: Flops = False,
    protocol: ProtocolFile = None,
) -> None:
    """Run several methods on the same sites and seeds, and show their paired differences."""
    from fedloom import endpoints, tuning
    from fedloom.comparisons import compare as compare_rows
    from fedloom.comparisons import target_of
    from fedloom.progress import watching
    from fedloom.report import comparison_table, endpoints_table

    name = Path(recipe).stem
    folder, base = out or Path("runs") / f"compare-{name}", loaded(recipe, settings)
    asked = endpoints.protocol(protocol)
    grid = tuning.grid_of(base, asked) if tune else None
    rows, aim = parts(methods), target_of(target)
    hash = endpoints.stamp(asked, name, protocol is not None)
    if not rows:
        raise RecipeError(f"--methods is '{methods}'; expected rows with commas between them: fedavg,local.")
    with watching() as watch:
        comparison = compare_rows(base, rows, range(seeds), folder, resume, watch, workers, aim, grid, flops, hash)
    print(comparison_table(comparison))
    if asked and (found := endpoints.judge(asked, {name: folder})):
        print(f"\n{endpoints_table(found)}")
    print(f"\nPage:    {folder / 'comparison.html'}\nFigures: {folder / 'comparison.json'}")
    if not _ran(comparison, rows):
        raise RunError(f"none of the rows {rows} could be run; why stands in the table.")


@app.command(epilog="Example: fedloom study recovery --seeds 2 --out studies")
def study(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Which study; see --list.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Show every study and its question.")] = False,
    seeds: Annotated[
        int | None,
        typer.Option("--seeds", metavar="N", help="How many development seeds, or points of a random design."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", metavar="RECIPE", help="Other sites than the study's own.")
    ] = None,
    settings: Settings = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where its files go.")] = Path("studies"),
) -> None:
    """Look into how a method works: figures, a picture, and what they say."""
    from fedloom.studies import STUDIES, conduct, write_result

    if listed:
        for key, one in STUDIES.items():
            print(f"{key:<12} {one.question}")
        return
    if name is None:
        raise RunError("no study was named; fedloom study --list shows them all.")
    result = conduct(name, seeds, recipe, settings or ())
    write_result(result, out)
    for sentence in result.found:
        print(f"- {sentence}")
    print(f"\nPage: {out / name}.md")


@app.command(epilog="Example: fedloom suite vqamed-merge --seeds 0-4 --rows local,fedavg,fedpia")
def suite(
    names: Annotated[list[str] | None, typer.Argument(metavar="[SETTING]...", help="Of the suite; else all.")] = None,
    settings: Settings = None,
    rows: Annotated[str, typer.Option("--rows", metavar="A,B,...", help="Only these rows of each setting.")] = "",
    seeds: Annotated[str, typer.Option("--seeds", metavar="FIRST-LAST", help="Or a list: 0,3,7.")] = "0-9",
    backbone: Annotated[
        list[str] | None,
        typer.Option(
            "--backbone",
            metavar="NAME=FOLDER",
            help="Other weights for vilt-small, or vilt: of all that have it, if no setting is named. Repeatable.",
        ),
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", metavar="FILE", help="Another suite.")] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where its cells are kept.")] = Path("runs/suite"),
    workers: Workers = 1,
    target: Aim = None,
    tune: Tune = False,
    flops: Flops = False,
    protocol: ProtocolFile = None,
) -> None:
    """Run the settings of benchmarks/suite.toml, and print each one's table; what is there is not run again."""
    from fedloom import endpoints, suites, tuning
    from fedloom.comparisons import target_of
    from fedloom.progress import watching
    from fedloom.report import comparison_table, endpoints_table

    others = dict(map(_weights, backbone or ()))
    chosen = suites.settings(file or suites.FILE, names or (), others, settings or ())
    asked, ran = parts(rows), False
    named = endpoints.protocol(protocol)
    hashes = {one.name: endpoints.stamp(named, one.name, protocol is not None) for one in chosen}
    grids = {one.name: tuning.grid_of(one.recipe, named) for one in chosen if tune or one.tune}
    with watching() as watch:
        for setting, comparison in suites.run(
            *(chosen, asked, suites.seeds_of(seeds), out, watch, workers, target_of(target), grids, flops, hashes)
        ):
            ran |= _ran(comparison, asked or setting.rows)
            print(f"{setting.name}: {setting.asks}\n{comparison_table(comparison)}\n")
    if named and (found := endpoints.judge(named, {one.setting: out / one.setting for one in named.endpoints})):
        print(f"{endpoints_table(found)}\n")
    print(f"Pages and figures: {out}")
    if not ran:
        raise RunError("no row could be run in any setting; why stands in the tables.")


@app.command("verify-aggregation", epilog="Example: fedloom verify-aggregation flexlora --ranks 4,8,16")
def verify_aggregation(
    method: Annotated[
        str, typer.Argument(metavar="METHOD", help="A method (or its package.module:Class), or a row: ffa-lora.")
    ],
    ranks: Annotated[
        str, typer.Option("--ranks", metavar="R,R,...", help="A site of each; of the first where all have one rank.")
    ] = "4,8,16",
) -> None:
    """How far what a method merges is from the mean of what its sites learnt, and what is attainable."""
    from fedloom.finding import table
    from fedloom.verify import findings, named, told

    try:
        numbers = [int(rank) for rank in ranks.split(",")]
    except ValueError:
        raise RunError(f"--ranks is '{ranks}'; expected numbers with commas between them: 4,8,16.") from None
    own = named(method)
    found = findings(own, numbers)
    if about := told(own):
        print(f"{folded(about)}\n")
    for line in table(found).splitlines():
        print(folded(line))
    if failed := [finding.name for finding in found if finding.failed]:
        raise LawError(f"{method} fails in {', '.join(failed)}: why stands above; expected a merge or an UpdateError.")


def _weights(pair: str) -> tuple[str, str]:
    name, _, folder = pair.partition("=")
    if not (name and folder):
        raise RecipeError(f"--backbone is '{pair}'; expected NAME=FOLDER, as in vilt=dandelin/vilt-b32-mlm.")
    return name, folder


def _ran(comparison: "Comparison", rows: Iterable[str]) -> bool:
    """Whether any cell of these rows is there."""
    return any(comparison.rows[row]["cells"] for row in rows if row in comparison.rows)
