"""run, evaluate, predict, check: one federation, and the machine it runs on."""

from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.app import app
from fedloom.cli.options import Device, RecipeName, RunFolder, Settings, folded, loaded
from fedloom.errors import ExportError, RunError


@app.command(epilog="Example: fedloom run quickstart --set federation.rounds=5 --out runs/short")
def run(
    recipe: RecipeName,
    settings: Settings = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The run's folder; else runs/RECIPE.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    track: Annotated[
        list[str] | None,
        typer.Option("--track", metavar="NAME", help="tensorboard, wandb, mlflow or trackio. Repeatable."),
    ] = None,
    engine: Annotated[
        str | None, typer.Option("--engine", metavar="ENGINE", help="local, or nvflare: across a project's sites.")
    ] = None,
    project: Annotated[
        Path, typer.Option("--project", metavar="DIR", help="The coordinator's folder; of --engine nvflare.")
    ] = Path(),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read and check everything, estimate time, memory, disk and bytes.")
    ] = False,
) -> None:
    """Run a federation, and show what each site gained."""
    asked = loaded(recipe, [*(settings or ()), *([f"federation.engine={engine}"] if engine else ())])
    if track:
        asked = asked.altered({"federation.track": track})
    folder = out or Path("runs") / Path(recipe).stem
    if dry_run:
        from fedloom.estimate import estimate

        for line in estimate(asked).lines():
            print(folded(line))
        return
    from fedloom.progress import watching
    from fedloom.report import table
    from fedloom.runs import run as run_recipe

    with watching() as watch:
        if asked.federation.engine == "nvflare":
            from fedloom.deploy.submit import Consortium, run_across

            done = run_across(asked, Consortium(project), folder, resume, watch)
        else:
            done = run_recipe(asked, folder, resume=resume, watch=watch)
    print(table(done.summary))
    print(f"\nReport: {done.folder / 'report.html'}")


@app.command(epilog="Example: fedloom evaluate runs/quickstart --split held_out")
def evaluate(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="The folder of a run.")] = None,
    site: Annotated[str | None, typer.Option("--site", metavar="NAME", help="One site only.")] = None,
    split: Annotated[str, typer.Option("--split", metavar="SPLIT", help="train, held_out or test.")] = "test",
    by: Annotated[
        str | None, typer.Option("--by", metavar="COLUMN", help="A row for each value of a column: scanner, sex.")
    ] = None,
    exported: Annotated[
        Path | None,
        typer.Option("--exported", metavar="DIR", help="No run: does an export still answer as the federation did?"),
    ] = None,
    device: Device = None,
) -> None:
    """Measure what each site of a run serves; or check an export, which needs neither run nor data."""
    if run is None:
        if exported is None:
            raise RunError("name the folder of a run, or an export with --exported DIR.")
        _check_export(exported)
        return
    if exported is not None:
        raise RunError(f"--exported checks an export by itself; leave out '{run}', or --exported.")
    if split not in ("train", "held_out", "test"):
        raise RunError(f"there is no split '{split}'; expected train, held_out or test.")
    from fedloom.progress import watching
    from fedloom.report import measured_table
    from fedloom.runs import Run

    with watching():
        found = Run(run, device=device).measure(split, site, by)
    print(measured_table(found, mean=by is None))


def _check_export(folder: Path) -> None:
    from fedloom.export import checked
    from fedloom.progress import watching

    with watching():
        checks = list(checked(folder))
    for check in checks:
        print(folded(check.told))
    if bad := [check for check in checks if not check.equal]:
        raise ExportError(
            f"{len(bad)} of {len(checks)} forms in '{folder}' do not answer as they did; export the run again."
        )


@app.command(epilog="Example: fedloom predict runs/vqamed-organ --site other --image x.jpg --question 'which plane?'")
def predict(
    run: RunFolder,
    site: Annotated[str, typer.Option("--site", metavar="NAME", help="Whose model answers.")],
    image: Annotated[
        Path | None, typer.Option("--image", metavar="FILE", help="A picture (.dcm too), or a folder of pictures.")
    ] = None,
    question: Annotated[str | None, typer.Option("--question", metavar="TEXT", help="What to answer.")] = None,
    text: Annotated[str | None, typer.Option("--text", metavar="TEXT", help="A sentence or a report.")] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="How many answers to give.")] = 5,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where the answers for a folder go; else answers.csv.")
    ] = None,
    device: Device = None,
) -> None:
    """What a site's model says of an image or a text; of a folder of images, into a CSV."""
    from fedloom.answers import images_in, write_csv
    from fedloom.progress import watching
    from fedloom.runs import Run

    if image is None or not image.is_dir():
        if out is not None:
            raise RunError("--out is for a folder of images; name one with --image.")
        for label, probability in Run(run, device=device).predict(site, image, text, question)[:top]:
            print(f"{probability:6.1%}  {label}")
        return
    images, table = images_in(image), out or Path("answers.csv")
    if not table.parent.is_dir() or table.is_dir():
        raise RunError(f"'{table}' cannot be written: its folder is not there, or it is one; name a file with --out.")
    with watching():
        answers = Run(run, device=device).answers(site, images, text, question)
    write_csv(table, answers, top)
    bad = len(images) - len(answers)
    print(f"{table}: {len(answers)} images" + (f"; {bad} could not be read" if bad else ""))


@app.command(epilog="Example: fedloom check quickstart")
def check(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="A recipe whose data to look at.")] = None,
    settings: Settings = None,
) -> None:
    """Look at this machine and, given a recipe, at its data and backbone: sites, sizes, classes, shared images."""
    from fedloom.doctor import machine, present, sites

    asked = None if recipe is None else loaded(recipe, settings)
    for line in machine():
        print(folded(line))
    if asked is not None:
        for line in chain(present(asked), sites(asked)):
            print(folded(line))
