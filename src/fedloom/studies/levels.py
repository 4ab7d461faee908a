"""Where units are permuted, and how often: at the server, at the sites, at both, nowhere; against what it costs."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from fedloom.methods import FedPIA
from fedloom.studies.setting import ACCURACY, HELD_OUT, SITES, STARTS, TEST_LOSS, Setting, moved, prepared
from fedloom.studies.study import Options, Part, Result, Row, verdict

QUESTION = "Which level of the permutation is worth its time?"
LEVELS: Mapping[str, Mapping[str, Any]] = {
    "both": {"permute": "both"},
    "both, every third round": {"permute": "both", "every": 3},
    "server": {"permute": "server"},
    "client": {"permute": "client"},
    "neither": {"permute": "neither"},
}
ROUNDS = 6
CHANGES = {"data.train": 30, "data.test": 30}
SECONDS, MEGABYTES = "seconds a round", "MB up a round"
SERVED: Mapping[Literal["local", "global"], str] = {"local": "own adapter", "global": "global adapter"}
FIGURES = tuple(f"{figure}, {served}" for served in SERVED.values() for figure in (HELD_OUT, TEST_LOSS, ACCURACY))
AT_SERVER, AT_CLIENT = "units moved at the server, %", "units moved at the client, %"


def study(options: Options) -> Result:
    """The study: its figures, and what they say."""
    rows = [
        row
        for seed in options.drawn()
        for setting in [prepared(options, seed, CHANGES, sites=3)]
        for start in STARTS
        for row in levels(setting, start)
    ]
    parts = tuple(
        Part(
            f"Trained from {start}",
            ("permute",),
            (*FIGURES, AT_SERVER, AT_CLIENT, MEGABYTES, SECONDS),
            tuple(row for row in rows if row["start"] == start),
        )
        for start in STARTS
    )
    setting = (
        f"{SITES}; three sites of 30 training images, {ROUNDS} rounds of one epoch, γ = 1, β = "
        f"{FedPIA().beta[-1]:g}; a match is believed where it gains on features that it was not made on; seconds "
        "are of all sites in turn and of the server"
    )
    return Result("levels", QUESTION, setting, options.drawn(), parts, tuple(found(parts)))


def levels(setting: Setting, start: str) -> list[Row]:
    """Every level of permutation on one prepared federation."""
    rows: list[Row] = []
    for level, changes in LEVELS.items():
        method = FedPIA(setting.adapter, init=STARTS[start], **changes)
        rounds = list(setting.rounds(method, ROUNDS))
        last = rounds[-1]
        row: dict[str, str | float] = {"start": start, "permute": level, "seed": setting.seed}
        for served, name in SERVED.items():
            shown = replace(method, predict_with=served)
            figures = setting.figures(shown, last.shared, last.privates)
            row |= {f"{figure}, {name}": value for figure, value in figures.items()}
        row |= {AT_SERVER: moved(last.told, "server"), AT_CLIENT: moved(last.told, "client")}
        row |= {MEGABYTES: last.bytes_up / 1e6, SECONDS: sum(after.seconds for after in rounds) / ROUNDS}
        rows.append(row)
    return rows


def found(parts: tuple[Part, ...]) -> list[str]:
    """What the figures say, in sentences."""
    told = []
    for start, part in zip(STARTS, parts, strict=True):
        for level in list(LEVELS)[:-1]:
            for name in SERVED.values():
                figure = f"{TEST_LOSS}, {name}"
                difference = part.compared(figure, {"permute": level}, {"permute": "neither"})
                told.append(verdict(f"Trained from {start}: {figure}", f"permute {level}", "neither", difference))
        accuracy = f"{ACCURACY}, {SERVED['local']}"
        difference = part.compared(accuracy, {"permute": "both"}, {"permute": "neither"})
        told.append(verdict(f"Trained from {start}: {accuracy}", "permute both", "neither", difference))
        sent = {part.mean(MEGABYTES, permute=level) for level in LEVELS}
        bytes_sent = "as many bytes" if len(sent) == 1 else "other numbers of bytes"
        told.append(
            f"Trained from {start}: every level sends {bytes_sent}; "
            f"a round takes {part.mean(SECONDS, permute='both'):.2f} s with both levels, "
            f"{part.mean(SECONDS, permute='both, every third round'):.2f} s where they match every third round, and "
            f"{part.mean(SECONDS, permute='neither'):.2f} s with neither."
        )
    return told
