"""Arguments and options that several commands take."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedloom.recipe import Recipe

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
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Another value for a key: method.mu=0.1. Repeatable."),
]


def loaded(recipe: str, settings: list[str] | None) -> "Recipe":
    """The recipe of these arguments."""
    from fedloom.recipe import load

    return load(recipe, settings or ())
