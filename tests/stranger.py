"""A server's end that sends what no server of fedloom's sends; for tests, of which a site takes none."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedloom import __version__
from fedloom.engines.messages import Message
from fedloom.engines.nvflare import FlareLink, Leading
from fedloom.errors import LinkError
from fedloom.tensors import to_bytes


class Stranger(Leading):
    """Greets the first site, and then sends it a message twice, and one that is cut short; keeps what it answers."""

    def __init__(self, experiment: str, recipe: str, roster: list[str]) -> None:
        super().__init__()
        self.experiment, self.recipe, self.site = experiment, recipe, roster[0]

    def told(self, question: dict[str, Any]) -> dict[str, Any]:
        return {}

    def lead(self, kit: Path, link: FlareLink, aborted: Callable[[], bool]) -> None:
        greeting = {"recipe": self.recipe, "version": __version__, "sites": 3}
        frame = to_bytes({})
        said = {
            "hello": self._asked(link, "hello", "1", **greeting),
            "hello again": self._asked(link, "hello", "2", **greeting),
            "replayed": self._asked(link, "hello", "1", **greeting),
            "truncated": self._asked(link, "evaluate", "3", round=0, frame=frame[:-1]),
        }
        (kit / "replies.json").write_text(json.dumps(said))

    def _asked(self, link: FlareLink, kind: str, nonce: str, **parts: Any) -> str:
        """What the site says is wrong; nothing where nothing is."""
        message: Message = {"kind": kind, "experiment": self.experiment, "nonce": nonce, **parts}
        for _ in range(60):
            try:
                return str(link.ask(self.site, message, 120.0).get("error", ""))
            except LinkError:  # its process of this job is not there yet
                time.sleep(1)
        return "no answer"
