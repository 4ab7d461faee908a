"""init, advise: a first recipe for data of one's own, and whether to join."""

import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.cli.app import app
from fedloom.cli.options import WIDTH, RecipeName, Settings, loaded
from fedloom.errors import RunError

if TYPE_CHECKING:
    from fedloom.drafting import Draft

ASKED = ("label", "site", "task", "backbone", "method")  # on a terminal
Column = Annotated[str | None, typer.Option(metavar="COLUMN", help="Which column it is; 'none' for no such column.")]


@app.command(epilog="Example: fedloom init photos --to mine.toml")
def init(
    source: Annotated[
        str, typer.Argument(metavar="FOLDER|MANIFEST", help="A folder of CLASS/IMAGE, a .jsonl or .csv.")
    ],
    to: Annotated[Path | None, typer.Option("--to", metavar="FILE", help="The recipe; else NAME.toml here.")] = None,
    label: Column = None,
    image: Column = None,
    text: Column = None,
    site: Column = None,
    group: Column = None,
    task: Annotated[str | None, typer.Option(metavar="KIND", help="classification, detection or vqa.")] = None,
    backbone: Annotated[str | None, typer.Option(metavar="NAME", help="Built in, a folder, or a hub name.")] = None,
    method: Annotated[str | None, typer.Option(metavar="NAME", help="fedavg, fedpia, feddlp, ...")] = None,
    sites: Annotated[int | None, typer.Option(min=1, help="Make so many sites, whatever the data name.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing; a pipe is asked nothing either.")] = False,
) -> None:
    """Write a commented recipe for data of your own, and say what was guessed."""
    from fedloom.drafting import draft
    from fedloom.recipe import load
    from fedloom.report.figures import one_line

    name = Path(source.removeprefix("pack:")).resolve()
    path = to or Path(f"{name.stem if name.stem != 'manifest' else name.parent.name}.toml")
    if path.exists():
        raise RunError(f"'{path}' is there already, and is left as it is; name another file with --to.")
    wanted = {
        "label": label,
        "image": image,
        "text": text,
        "site": site,
        "group": group,
        "task": task,
        "backbone": backbone,
        "method": method,
        "sites": sites,
    }
    own = draft(source, wanted)
    if sys.stdin.isatty() and not yes:
        own = draft(source, {**wanted, **_answers(own)})
    try:
        path.write_text(own.text(path.parent), "utf-8")
    except OSError as e:
        raise RunError(f"'{path}' cannot be written: {e.strerror}; name another file with --to.") from None
    load(path)
    for guess in own.guesses:
        print(textwrap.fill(one_line(f"{guess.key:<10}{guess.value}: {guess.why}"), WIDTH, subsequent_indent=" " * 10))
    print(f"\nWrote {path}. Read it, then: fedloom check {path}")


def _answers(own: "Draft") -> dict[str, str]:
    """What the user changes of the guesses; enter keeps one."""
    found = {}
    for guess in own.guesses:
        if guess.key in ASKED and guess.why != "as you said":
            answer = typer.prompt(f"{guess.key} ({guess.why})", default=guess.value)
            if answer != guess.value:
                found[guess.key] = answer
    return found


@app.command(epilog="Example: fedloom advise quickstart --site site-03")
def advise(
    recipe: RecipeName,
    site: Annotated[str | None, typer.Option("--site", metavar="NAME", help="Only this one; else every site.")] = None,
    settings: Settings = None,
) -> None:
    """Should my site join? What one short round says, on held-out examples alone."""
    from fedloom.advise import advise as ask
    from fedloom.progress import watching
    from fedloom.report import advice_table

    asked = loaded(recipe, settings)
    with watching() as watch:
        found = ask(asked, watch, site)
    print(advice_table(found))
