"""What an export says of itself, in fedloom.json: where it comes from, and how it is to be read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal, TypeAlias

from fedloom.errors import ExportError
from fedloom.export.fingerprint import Inputs
from fedloom.sections import Backbone
from fedloom.tables import Where, build, plain
from fedloom.tasks import Task

FILE = "fedloom.json"
VERSIONED = ("safetensors", "torch", "transformers")

Form: TypeAlias = Literal["peft", "merged", "onnx"]


@dataclass(frozen=True)
class About:
    """The lineage of one site's export, and its forms."""

    fedloom: str  # the version that wrote it
    site: str
    method: str
    round: int  # whose result it is
    rounds: int  # that were asked for
    tuned: bool  # whether the site trained on by itself after them
    recipe: str  # SHA-256 of all that can change the result
    backbone: Backbone
    weights: str  # SHA-256 of the backbone's
    task: Task
    inputs: Inputs
    forms: tuple[Form, ...]
    adapter: str  # its kind
    parts: tuple[str, ...]  # folders, where the method serves a blend; () where it serves one adapter
    rule: str | None  # how the answers of the parts become one
    versions: Mapping[str, str]

    def dump(self) -> bytes:
        """JSON, of which `read` makes an equal one."""
        return (json.dumps(plain(self), indent=2, ensure_ascii=False) + "\n").encode()


def read(folder: Path) -> About:
    """What the export in a folder says of itself; raises ExportError or RecipeError."""
    try:
        table = json.loads((folder / FILE).read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise ExportError(f"'{folder}' is no export of fedloom: {FILE} is missing or damaged ({e}).") from e
    return build(About, table, Where(str(folder / FILE)))


def versions() -> dict[str, str]:
    """Of the libraries that compute."""
    return {name: version(name) for name in VERSIONED}
