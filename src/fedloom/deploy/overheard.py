"""What a server's gRPC says on stderr, passed on; a connection that TLS refused is written down too.

    python -m fedloom.deploy.overheard LOG     # reads stdin until every writer has closed it

Neither FLARE nor Python hears of a handshake that fails: gRPC's core says so in a line, without an address, and closes.
A process beside the server's, because a server that is held up in Python must never wait for its own reader.
"""

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TextIO

from fedloom.deploy.audit import Audit
from fedloom.errors import StoreError

FAILED = "Handshake failed"


def overhear(said: Iterable[str], passed_on: TextIO, audit: Audit) -> None:
    """Write each line on, and those of refused connections into the log: the last of what the line says is why."""
    for line in said:
        passed_on.write(line)
        passed_on.flush()
        if FAILED in line:
            try:
                audit.note("", f"refused: a connection without a certificate of the project: {why(line)}")
            except StoreError as e:  # a full disk: told where all else is told
                passed_on.write(f"{e}\n")


def why(line: str) -> str:
    """PEER_DID_NOT_RETURN_A_CERTIFICATE, CERTIFICATE_VERIFY_FAILED: self signed certificate, and the like."""
    return line.rpartition("OPENSSL_internal:")[2].strip()


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
