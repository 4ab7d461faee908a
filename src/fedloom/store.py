"""State on a disk that survives being killed: one safetensors file a round, written whole or not at all.

A site keeps its private state so, the server its checkpoints. A file's name holds the hash of its content, so that one
that was damaged is known, named and passed over.
"""

import contextlib
import errno
import hashlib
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from fedloom.errors import StoreError
from fedloom.tensors import Tensors, from_bytes, to_bytes

log = logging.getLogger(__name__)

STATE = re.compile(r"(\d+)-[0-9a-f]+\.safetensors")
PERSONAL = "personal"  # what fine-tuning after the last round left; no round reads it


@dataclass(frozen=True)
class Store:
    """The state after each round, the newest `keep` of them."""

    folder: Path
    keep: int = 4

    def before(self, round: int) -> tuple[int, Tensors]:
        """The newest state of a round below this one, and that round; (-1, {}) where there is none.

        A round reads what the rounds before it left, so asking for a round twice is harmless, and a site may sit out.
        """
        for number, path in reversed(self._states()):
            if number < round and (tensors := self._read(path)) is not None:
                return number, tensors
        return -1, {}

    def rounds(self) -> tuple[int, ...]:
        """The rounds of which there is a state that can be read, the oldest first."""
        return tuple(number for number, path in self._states() if self._read(path) is not None)

    def after(self, round: int, tensors: Tensors) -> None:
        """Keep the state that a round left; also an empty one, whose file says that the site took part."""
        content = to_bytes(tensors)
        path = self._path(f"{round:06d}", content)
        if tensors or not self._again(path):
            write(path, content)
        self.trim(round, path)

    def trim(self, round: int, newest: Path | None = None) -> None:
        """Drop what `after` drops, as a kill may have kept it from doing: states of rounds after this one, of a run
        that was set back, and of those up to it all but the newest `keep`.

        newest: of several states of this round, the one that is kept
        """
        states = self._states()
        # Counted in files: a site that sat out for long still finds what it had, when a round is asked again.
        kept = [path for number, path in states if number < round or (number == round and newest in (None, path))]
        for _, path in states:
            if path not in kept[-self.keep :]:
                path.unlink(missing_ok=True)

    def personal(self) -> Tensors | None:
        """What `personalised` kept; None where nothing was."""
        for path in sorted(self.folder.glob(f"{PERSONAL}-*.safetensors")):
            if (tensors := self._read(path)) is not None:
                return tensors
        return None

    def personalised(self, tensors: Tensors) -> None:
        """Keep what fine-tuning after the last round left."""
        content = to_bytes(tensors)
        write(path := self._path(PERSONAL, content), content)
        for old in self.folder.glob(f"{PERSONAL}-*.safetensors"):
            if old != path:
                old.unlink(missing_ok=True)

    def size(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    def held(self) -> int:
        """Bytes of what fine-tuning left, or else the last round."""
        newest = [*(path for _, path in self._states()), *self.folder.glob(f"{PERSONAL}-*.safetensors")][-1:]
        return sum(path.stat().st_size for path in newest)

    def _states(self) -> list[tuple[int, Path]]:
        """Round and file of each state, the oldest first."""
        try:
            named = [(STATE.fullmatch(path.name), path) for path in self.folder.iterdir()]
        except FileNotFoundError:
            return []
        return sorted((int(said[1]), path) for said, path in named if said)

    def _again(self, path: Path) -> bool:
        """Whether an empty state got a second name of the file of the one before: nothing has to reach the disk."""
        for _, before in reversed(self._states()):
            if before != path and before.name.endswith(path.name.partition("-")[2]) and self._read(before) is not None:
                with contextlib.suppress(OSError):  # of a file system without links; or it is there, and written anew
                    os.link(before, path)
                    return True
        return False

    def _read(self, path: Path) -> Tensors | None:
        try:
            content = path.read_bytes()
        except OSError as e:
            raise StoreError(f"'{path}' cannot be read: {e.strerror}.") from e
        if _digest(content) != path.stem.partition("-")[2]:
            log.warning("'%s' is damaged; going back to the state before it.", path)
            return None
        return from_bytes(content)

    def _path(self, name: str, content: bytes) -> Path:
        return self.folder / f"{name}-{_digest(content)}.safetensors"


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a reader sees the old one or the new one, also after a kill or a power cut.

    raises StoreError: the folder cannot be written
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as e:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)  # of a full disk, what it holds is needed first
        full = e.errno in {errno.ENOSPC, errno.EDQUOT}
        remedy = f"; it takes {len(content):,} bytes. Free space there, or name" if full else ". Name"
        raise StoreError(f"'{path}' cannot be written: {e.strerror}{remedy} another folder.") from e


def holds_anything(folder: Path) -> bool:
    """Whether there is a folder, and more in it than what a killed `write` left."""
    return folder.is_dir() and any(path.suffix != ".partial" for path in folder.iterdir())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
