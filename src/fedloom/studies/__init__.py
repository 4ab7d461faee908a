"""Studies: how a method works inside, each a question with an answer computed from what was measured.

    fedloom study --list
    fedloom study recovery --out studies

A new study is one file with a QUESTION and a pure function `study(options) -> Result`, and one line in STUDIES.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedloom.errors import RecipeError
from fedloom.overrides import changes
from fedloom.store import write
from fedloom.studies import (
    client,
    costs,
    gamma,
    levels,
    nonmedical,
    probe,
    recovery,
    sensitivity,
    sora_overfitting,
    widths,
    wire,
)
from fedloom.studies.pages import page, picture
from fedloom.studies.study import Options, Result, command
from fedloom.tables import guess

__all__ = ["STUDIES", "Options", "Result", "Study", "conduct", "find", "page", "picture", "write_result"]


@dataclass(frozen=True)
class Study:
    question: str
    conduct: Callable[[Options], Result]
    seeds: int = 3  # unasked


STUDIES: Mapping[str, Study] = {
    "recovery": Study(recovery.QUESTION, recovery.study),
    "client": Study(client.QUESTION, client.study),
    "costs": Study(costs.QUESTION, costs.study),
    "probe": Study(probe.QUESTION, probe.study),
    "gamma": Study(gamma.QUESTION, gamma.study),
    "levels": Study(levels.QUESTION, levels.study),
    "widths": Study(widths.QUESTION, widths.study),
    "sensitivity": Study(sensitivity.QUESTION, sensitivity.study, seeds=40),
    "nonmedical": Study(nonmedical.QUESTION, nonmedical.study),
    "sora-overfitting": Study(sora_overfitting.QUESTION, sora_overfitting.study),
    "wire": Study(wire.QUESTION, wire.study),
}


def find(name: str) -> Study:
    """The study of a name; raises RecipeError, with what may have been meant."""
    if name not in STUDIES:
        raise RecipeError(f"there is no study '{name}'{guess(name, STUDIES)}")
    return STUDIES[name]


def conduct(name: str, seeds: int | None = None, recipe: str | None = None, settings: Sequence[str] = ()) -> Result:
    """Make a study.

    seeds: how many; None: the study's own number
    recipe: another one than the study's own; settings: `key=value` for it
    """
    asked = find(name)
    options = Options(asked.seeds if seeds is None else seeds, recipe, changes(settings))
    result = asked.conduct(options)
    others = [f"the recipe {recipe}"] * (recipe is not None) + list(settings)
    said = f"{result.setting}; but here with {', '.join(others)}" if others else result.setting
    return replace(result, setting=said, command=command(name, options, asked.seeds, settings))


def write_result(result: Result, folder: Path) -> None:
    """NAME.json, and what is made from it: NAME.svg and NAME.md. Raises StoreError."""
    write(folder / f"{result.name}.json", result.json().encode())
    write(folder / f"{result.name}.svg", picture(result).encode())
    write(folder / f"{result.name}.md", page(result).encode())
