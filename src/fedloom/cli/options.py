"""Arguments and options that several commands take, and how a long line is shown."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedloom.recipe import Recipe

WIDTH = 80
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A TOML file, or the name of a built-in recipe.")]
Workers = Annotated[
    int, typer.Option("--workers", metavar="N", min=1, help="Cells side by side, a process of one thread each.")
]
Tune = Annotated[
    bool, typer.Option("--tune", help="First choose values for each row, on other seeds and held-out examples.")
]
ProtocolFile = Annotated[
    Path | None, typer.Option("--protocol", metavar="FILE", help="Endpoints; else benchmarks/protocol.toml, if there.")
]
Aim = Annotated[
    str | None, typer.Option("--target", metavar="ROW|VALUE", help="Count rounds until held-out reaches it.")
]
Flops = Annotated[bool, typer.Option("--flops", help="Count FLOPs and trained parameters too.")]
Device = Annotated[
    str | None, typer.Option("--device", metavar="NAME", help="Where the backbone computes; else where it was trained.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Another value for a key: method.mu=0.1. Repeatable."),
]


def loaded(recipe: str, settings: list[str] | None) -> "Recipe":
    """The recipe of these arguments."""
    from fedloom.recipe import load

    return load(recipe, settings or ())


def parts(names: str) -> list[str]:
    """`a, b` as a list."""
    return [part.strip() for part in names.split(",") if part.strip()]


def folded(line: str) -> str:
    """A line of 80 columns at most, what follows indented; a path is not torn."""
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.fill(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
