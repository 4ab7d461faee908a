"""export: what the sites of a run serve, for whoever has no fedloom."""

from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.app import app
from fedloom.cli.options import RunFolder
from fedloom.errors import ExportError


@app.command(epilog="Example: fedloom export runs/quickstart --to exports --merged")
def export(
    run: RunFolder,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Where a folder for each site goes.")],
    site: Annotated[str | None, typer.Option("--site", metavar="NAME", help="One site only.")] = None,
    merged: Annotated[bool, typer.Option("--merged", help="A Hugging Face model with the adapter inside too.")] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="An ONNX graph too.")] = False,
    round: Annotated[
        int | None, typer.Option("--round", metavar="N", min=1, help="What round N left, as of an unfinished run.")
    ] = None,
    repository: Annotated[
        str | None, typer.Option("--push", metavar="REPO", help="Upload the folder of --site to the Hugging Face hub.")
    ] = None,
) -> None:
    """Write what each site serves: a PEFT folder, its head and processor, a card; checked before it is left there."""
    if repository is not None and site is None:
        raise ExportError("--push takes the folder of one site to one repository; name the site (--site).")
    from fedloom.export import BESIDE, named, push
    from fedloom.export import export as written
    from fedloom.progress import watching
    from fedloom.runs import Run

    target = None if repository is None else named(repository)
    with watching():
        forms = [form for form, asked in zip(BESIDE, (merged, onnx), strict=True) if asked]
        done = written(Run(run, round), to, () if site is None else (site,), forms)
    for folder, checks in done.items():
        print(f"{folder}: {', '.join(dict.fromkeys(check.form for check in checks))}")
        if target is not None:
            print(f"Pushed to {push(folder, target)}")
    print("Each form was loaded again and answers as the federation; each README.md says how to use it.")
