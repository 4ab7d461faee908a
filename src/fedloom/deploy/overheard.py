"""What a server's gRPC says on stderr, passed on; a connection that TLS refused is written down too.

    python -m fedloom.deploy.overheard LOG     # reads stdin until every writer has closed it

Neither FLARE nor Python hears of a handshake that fails: gRPC's core says so in a line, without an address, and closes.
A process beside the server's: one that is held up in Python must not keep its own stderr from being read.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TextIO

from fedloom.deploy.audit import Audit
from fedloom.errors import StoreError

FAILED = "Handshake failed"
MANY, MINUTE = 60, 60.0  # notes in so many seconds: whoever knocks without end fills no disk, and holds nobody up


def overhear(said: Iterable[str], passed_on: TextIO, audit: Audit, clock: Callable[[], float] = time.monotonic) -> None:
    """Write each line on, and those of refused connections into the log, the last of what such a line says as why; of
    very many in a minute the first ones, and the number of the others with the next."""
    unsaid, noted, since = 0, 0, clock()
    for line in said:
        _passed(line, passed_on)
        if FAILED not in line:
            continue
        if (now := clock()) - since >= MINUTE:
            noted, since = 0, now
        if noted == MANY:
            unsaid += 1
            continue
        more = f" (and {unsaid} more since the line before)" if unsaid else ""
        try:
            audit.note("", f"refused: a connection, by TLS: {why(line)}{more}")
        except StoreError as e:  # a full disk: told where all else is told
            _passed(f"{e}\n", passed_on)
        unsaid, noted = 0, noted + 1


def why(line: str) -> str:
    """PEER_DID_NOT_RETURN_A_CERTIFICATE, CERTIFICATE_VERIFY_FAILED: self signed certificate, and the like."""
    return line.rpartition("OPENSSL_internal:")[2].strip()


def _passed(line: str, on: TextIO) -> None:
    with contextlib.suppress(OSError):  # whoever read it is gone, or its disk is full; the server goes on
        on.write(line)
        on.flush()


def listener(log: Path, environment: Mapping[str, str]) -> tuple[int, subprocess.Popen[bytes]]:
    """Start it; the file descriptor of what it reads, and the process, which ends when that is closed everywhere."""
    command = [sys.executable, "-m", "fedloom.deploy.overheard", str(log)]
    read, write = os.pipe()
    process = subprocess.Popen(command, stdin=read, env=environment, start_new_session=True)
    os.close(read)
    return write, process


if __name__ == "__main__":
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    overhear(sys.stdin, sys.stderr, Audit(Path(sys.argv[1])))
