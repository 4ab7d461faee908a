"""What left a machine and what came, for a person to read: a line each, appended, never changed."""

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedloom.errors import StoreError


@dataclass(frozen=True)
class Audit:
    """A log in a file.

    2026-03-01T09:30:00Z  ab12cd34  sent to the server: update of round 3, 1,234 bytes, sha256 9f86d081884c7d65
    """

    path: Path

    def note(self, experiment: str, text: str) -> None:
        """Append a line; what a peer said stays on it. raises StoreError: the line cannot be written"""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        said = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{now}  {experiment[:8] or '-':8}  {said}\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as e:
            raise StoreError(f"'{self.path}' cannot be written: {e.strerror}. Free space there.") from e

    def frame(self, experiment: str, what: str, frame: bytes) -> None:
        """Append a line about tensors: how many bytes, and their hash."""
        from fedloom.engines.messages import digest  # which brings torch, and a note has no need of it

        self.note(experiment, f"{what}, {len(frame):,} bytes, sha256 {digest(frame)}")
