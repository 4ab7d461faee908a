"""What a protocol asks, committed before the figures are made (`benchmarks/protocol.toml`), and what they answer.

An endpoint is a difference of two rows in one view of one setting, and the margin above which its lower limit has to
be. Each method has one primary endpoint; its secondary ones are a family, over which Holm's correction is taken; those
that were added when others had been seen stand for themselves, and are told as such.
"""

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fedloom.errors import RecipeError
from fedloom.report.compared import FILE as COMPARISON
from fedloom.report.compared import read, write_comparison
from fedloom.statistics import holm, interval, sign_flip
from fedloom.store import write
from fedloom.tables import Table, Where, build, convert

FILE = Path("benchmarks") / "protocol.toml"
LATER = ("secondary", "added")


@dataclass(frozen=True)
class Endpoint:
    """A figure of `view` in `setting`, row `of` minus row `minus`, against a margin; all are fractions."""

    method: str
    kind: str  # primary, secondary, or added after others were seen
    setting: str
    view: str
    of: str
    minus: str
    margin: float  # points in the file
    figure: Literal["mean", "worst_fifth"] = "mean"  # over sites, or of the worst fifth of them
    target: float | None = None  # what was hoped for, which is told and not tested; points in the file


@dataclass(frozen=True)
class Protocol:
    file: Path
    hash: str  # SHA-256
    endpoints: tuple[Endpoint, ...]
    grid: Mapping[str, Any]  # what every row is tuned by


def protocol(file: Path | None) -> Protocol | None:
    """The protocol in this file; where none is named, that of a checkout of fedloom, if this is one.

    raises RecipeError: the file is missing or damaged
    """
    if file is None and not FILE.is_file():
        return None
    path = file or FILE
    try:
        content = path.read_bytes()
        said = tomllib.loads(content.decode())
    except OSError as e:
        raise RecipeError(f"the protocol '{path}' cannot be read: {e.strerror}.") from None
    except ValueError as e:
        raise RecipeError(f"'{path}' is no protocol: {e}.") from None
    where = Where(str(path))
    tables = {key: convert(Mapping[str, Any], table, key, where) for key, table in said.items()}
    endpoints = [
        _endpoint(method, kind, one, where.inside(method).inside(kind))
        for method, table in tables.items()
        if "primary" in table
        for kind, every in [("primary", [table["primary"]]), *((k, table.get(k, ())) for k in LATER)]
        for one in convert(tuple[Table, ...], every, kind, where.inside(method))
    ]
    return Protocol(path, hashlib.sha256(content).hexdigest(), tuple(endpoints), said.get("grid", {}))


def stamp(own: Protocol | None, setting: str, named: bool) -> str | None:
    """The hash that cells of a setting are run under: of a protocol that is `named`, or has an endpoint there."""
    return own.hash if own and (named or any(one.setting == setting for one in own.endpoints)) else None


def _endpoint(method: str, kind: str, said: Table, where: Where) -> Endpoint:
    one = build(Endpoint, {"method": method, "kind": kind, **said}, where)
    return replace(one, margin=one.margin / 100, target=None if one.target is None else one.target / 100)


def judge(own: Protocol, folders: Mapping[str, Path]) -> list[dict[str, Any]]:
    """The protocol's endpoints in these settings' comparisons, which are told of them: the file and its page.

    A comparison that was run under another protocol keeps the hash of that one.
    """
    contents = {name: read(folder) for name, folder in folders.items() if (folder / COMPARISON).is_file()}
    found = judged(own.endpoints, contents)
    for name, content in contents.items():
        if asked := [one for one in found if one["setting"] == name]:
            told = {"protocols": [own.hash], **content, "endpoints": asked}
            write(folders[name] / COMPARISON, (json.dumps(told, indent=2) + "\n").encode())
            write_comparison(folders[name])
    return [one for one in found if one["setting"] in contents]


def judged(endpoints: Sequence[Endpoint], contents: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each endpoint with its interval, whether the lower limit is `above` the margin, the two-sided sign-flip p of the
    difference being the margin and, of a secondary one, that p by Holm.

    A family is all that the protocol names: an endpoint that is not there yet counts in it with p = 1.
    """
    rows = [asdict(one) | _measured(one, contents.get(one.setting)) for one in endpoints]
    for method in dict.fromkeys(one.method for one in endpoints):
        family = {
            str(i): row.get("p", 1.0)
            for i, row in enumerate(rows)
            if (row["method"], row["kind"]) == (method, "secondary")
        }
        for i, p in holm(family).items():
            rows[int(i)]["holm"] = p if "p" in rows[int(i)] else None
    return rows


def _measured(one: Endpoint, content: Mapping[str, Any] | None) -> dict[str, Any]:
    if content is None:
        return {"why": f"{one.setting} was not run"}
    if gone := [row for row in (one.of, one.minus) if not content["rows"].get(row, {}).get("cells")]:
        return {"why": f"'{gone[0]}' was not run"}
    of, minus = (content["rows"][row]["cells"] for row in (one.of, one.minus))
    names = dict.fromkeys(name for cell in of.values() for name in cell)
    figures = [name for name in names if name.startswith(f"{one.view}.") and name.endswith(f".{one.figure}")]
    if len(figures) != 1:
        return {"why": f"{one.view} has {len(figures)} tasks; an endpoint is of one"}
    (figure,) = figures
    paired = [own[figure] - minus[seed][figure] for seed, own in of.items() if figure in minus.get(seed, {})]
    if not paired:
        return {"why": "the two rows have no seed in common"}
    estimate = interval(paired)
    above = None if estimate["low"] is None else estimate["low"] > one.margin
    return {**estimate, "above": above, "p": sign_flip([value - one.margin for value in paired])}
