"""A line of a benchmark: what was measured, against what, the ratio of the two, the goal and the floor."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True)
class Line:
    """One comparison. `own`, `peer` and `floor` are minima in one unit; the smaller the better.

    The ratio says how many times less `own` is than `peer`; where the goal is an upper bound (`at_most`), it is the
    part of `peer` that `own` is; without a peer it is `own`.
    """

    workload: str
    what: str  # with model, dtype and batch
    own: float
    unit: Literal["ms", "MB", "s", ""]
    against: str = ""
    peer: float | None = None
    goal: float | None = None
    at_most: bool = False
    floor: float | None = None  # the least that `own` could be
    own_median: float | None = None
    peer_median: float | None = None

    @property
    def ratio(self) -> float:
        return self._ratio(self.own)

    @property
    def attainable(self) -> float | None:
        """The ratio at the floor."""
        return None if self.floor is None else self._ratio(self.floor)

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.ratio <= self.goal if self.at_most else self.ratio >= self.goal

    def _ratio(self, own: float) -> float:
        if self.peer is None:
            return own
        return own / self.peer if self.at_most else self.peer / own

    def row(self) -> list[str]:
        """The cells of a table."""
        goal = "" if self.goal is None else f"{'≤' if self.at_most else '≥'} {self.goal:.3g}"
        return [
            self.what,
            self.against or "-",
            f"{self.own:.3g} {self.unit}".rstrip(),
            "" if self.peer is None else f"{self.peer:.3g} {self.unit}".rstrip(),
            f"{self.ratio:.3g}",
            goal,
            "" if self.attainable is None else f"{self.attainable:.3g}",
            {None: "", True: "met", False: "not met"}[self.met],
        ]


HEAD = ("workload", "against", "own", "peer", "ratio", "goal", "at the floor", "")


@dataclass(frozen=True)
class Measured:
    """All lines of one call, and what could not be measured."""

    lines: tuple[Line, ...]
    left_out: tuple[str, ...]
    command: str
    lineage: Mapping[str, str]

    def json(self) -> str:
        lines = [{**asdict(line), "ratio": line.ratio, "met": line.met} for line in self.lines]
        whole = {"command": self.command, **self.lineage, "lines": lines, "left_out": list(self.left_out)}
        return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def of(cls, text: str) -> "Measured":
        """The inverse of `json`."""
        whole = json.loads(text)
        lines = [{key: value for key, value in line.items() if key not in ("ratio", "met")} for line in whole["lines"]]
        named = {key: whole[key] for key in whole if key not in ("command", "lines", "left_out")}
        return cls(tuple(Line(**line) for line in lines), tuple(whole["left_out"]), whole["command"], named)


def table(lines: Sequence[Line]) -> Iterator[str]:
    """Lines of text, columns aligned."""
    rows = [list(HEAD), *(line.row() for line in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
