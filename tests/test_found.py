"""What docs/results says: each of its figures is named, and read from what is published."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from found import filled
from scipy.stats import ttest_1samp

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FOUND = (BENCHMARKS / "found.md").read_text("utf-8")
ASIDE = {
    "caltech-bf16",
    "caltech-wire",
    "caltech-dirichlet-wire",
    "caltech-dirichlet-shared",
    "medclip-dirichlet-wider",
}  # one question of their own

Row = list[float]


def page(setting: str, **rows: Row) -> dict[str, Any]:
    """A comparison whose rows have these accuracies, by seed."""
    return {
        "command": f"fedloom suite {setting} --seeds 0-9",
        "rows": {
            name.replace("_", "-"): {
                "cells": {
                    str(seed): {
                        "personal.accuracy.mean": value,
                        "personal.accuracy.worst_fifth": value - 0.25,
                        "global.accuracy.mean": 1 - value,
                    }
                    for seed, value in enumerate(values)
                },
                "summary": {"bytes_up": {"mean": 1e6 / len(name)}},
            }
            for name, values in rows.items()
        },
    }


CONTENTS = {
    "a": page("a", local=[0.5, 0.6, 0.4], fedavg=[0.55, 0.7, 0.5, 0.9]),
    "a-more": page("a", local_lora=[0.5, 0.5], local=[0.1, 0.2], fedavg_lora=[0.75, 0.5]),
}


def half(*differences: float) -> float:
    """Half of the 95 % t interval, of another's making."""
    limits = ttest_1samp(differences, 0.0).confidence_interval(0.95)
    return float(limits.high - limits.low) / 2


def test_a_difference_is_over_the_seeds_that_both_rows_have() -> None:
    gain, limits = "+8.3", f"{half(5, 10, 10):.1f}"
    assert filled("x {own a: fedavg - local} y", CONTENTS) == f"x {gain} ± {limits} y"
    assert filled("{all a:\nfedavg -\nlocal}", CONTENTS) == f"-8.3 ± {limits}"
    assert filled("{own a: fedavg}", CONTENTS) == "66.2"
    assert filled("{worst a: fedavg}", CONTENTS) == "41.2"
    assert filled("{own.accuracy a: local}", CONTENTS) == "50.0"
    assert filled("{own a: fedavg - a-more: local-lora}", CONTENTS) == f"+12.5 ± {half(5, 20):.1f}"
    assert filled("{sent a: fedavg / local}", CONTENTS) == "0.83"


def test_a_pair_is_of_one_page_where_one_has_both_rows_and_of_two_with_a_star() -> None:
    made = filled("{pairs own all of a by fedavg - local, fedavg - local-lora, fedpia - local}", CONTENTS)
    head, _, line = made.splitlines()
    assert head == "| setting | seeds | fedavg - local | fedavg - local-lora | fedpia - local |"
    limits = f"{half(5, 10, 10):.1f}"
    two = f"{half(5, 20):.1f}"
    cells = f"**+8.3 ± {limits}** / **-8.3 ± {limits}** | +12.5 ± {two} / -12.5 ± {two}\\*"
    assert line == f"| [a](a.md) | 2 to 3 | {cells} | – |"
    made = filled("{pairs all of a.accuracy by fedavg - local}", CONTENTS)
    assert made.endswith(f"| [a.accuracy](a.md) | 3 | **-8.3 ± {limits}** |")
    pages = {
        "a": page("a", local=[0.5, 0.6, 0.4], there=[]),
        "a-more": page("a", local=[0.1, 0.2], row=[0.3, 0.5, 0.9], there=[0.7, 0.7, 0.5], other=[]),
        "a-others": page("a", gone=[], other=[0.6, 0.8]),
    }
    made = filled("{pairs own of a by row - local, there - gone, other - there}", pages).splitlines()[2]
    assert made == f"| [a](a.md) | 2 | +25.0 ± {half(20, 30):.1f} | – | +0.0 ± {half(-10, 10):.1f}\\* |"
    pages["a-costs"] = page("a", row=[0.3], local=[0.1], once=[0.2])  # of one seed: where nothing else has both
    pages["a-row"] = page("a", row=[0.3, 0.5])
    del pages["a-more"]
    made = filled("{pairs own of a by row - local, once - row}", pages).splitlines()[2]
    assert made == f"| [a](a.md) | 1 to 2 | -15.0 ± {half(-20, -10):.1f}\\* | -10.0 (one seed) |"


def test_the_rows_on_each_side_of_one_are_named() -> None:
    rows = {"local": [0.5, 0.6, 0.4], "far": [0.8, 0.91, 0.7], "near": [0.55, 0.66, 0.45], "worse": [0.2, 0.3, 0.11]}
    contents = {"a": page("a", **rows, noisy=[0.1, 0.9, 0.6], one=[0.9], gone=[])}
    assert filled("{above own a: local}", contents) == "`far`, `near`"
    assert filled("{below own a: local} are", contents) == "`worse` are"
    assert filled("{level own a: local}; {below all a: local}", contents) == "`noisy`; `far`, `near`"


@pytest.mark.parametrize(
    "named",
    [
        "{own b: local}",
        "{own a: feddlp}",
        "{newcomer a: local}",
        "{everyone a: local}",
        "{own a}",
        "{sent a: fedavg / feddlp}",
        "{pairs own of b by fedavg - local}",
        "{pairs own of a}",
        "{pairs own of a.labels by fedavg - local}",
        "{pairs own of a by fedpia - local}",
        "{pairs own of a by fedavg}",
        "{below own a: local}",
        "{level own a: fedpia}",
    ],
)
def test_a_figure_that_there_is_not_is_named(named: str) -> None:
    with pytest.raises(SystemExit, match=re.escape(named)):
        filled(f"It is {named}.", CONTENTS)


def test_no_figure_of_a_comparison_is_typed() -> None:
    assert re.findall(r"±\s*[\d{]|\d\s*\[-?\d", FOUND) == []


def test_every_setting_of_the_suite_stands_beside_training_alone() -> None:
    settings = tomllib.loads((BENCHMARKS / "suite.toml").read_text("utf-8"))["settings"]
    tables = re.findall(r"\{pairs own\s+of\s(.+?)\sby\slinear-probe - local,", FOUND, re.DOTALL)
    told = {named.partition(".")[0] for table in tables for named in re.split(r",\s+", table)}
    assert told == settings.keys() - ASIDE
