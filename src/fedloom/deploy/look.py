"""What `fedloom deploy status` and `fedloom deploy doctor` look at: who is there, and what would stand in the way."""

import json
import shutil
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fedloom import __version__
from fedloom.deploy.kits import approved
from fedloom.deploy.session import Session
from fedloom.errors import DeployError
from fedloom.store import write

SOON = 30  # days before a certificate's end, from which on it is told
ROOM = 5 * 2**30  # bytes that a disk should have free
SEEN = "seen.json"  # what each site last said of itself, in the coordinator's project


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    good: bool
    text: str
    fatal: bool = False  # nothing works with it


def status(project: Path) -> Iterator[str]:
    """A line a site that was approved: whether it is connected, and what it last said of itself."""
    sites, seen = approved(project), _seen(project)
    with Session(project / "coordinator", patience=10.0) as session:
        connected = session.sites()
    for name in sorted({*sites, *connected}):
        heard = connected.get(name)
        last = (
            "not connected" if heard is None else f"last seen {datetime.fromtimestamp(heard, UTC):%Y-%m-%d %H:%M:%S}Z"
        )
        said = seen.get(name, "not yet in an experiment")
        yield f"{name}: {last}; {said}" + ("" if name in sites else "; NOT APPROVED HERE")


def remember(project: Path, said: Mapping[str, str]) -> None:
    """Keep what sites said of themselves, for `status`."""
    write(project / SEEN, (json.dumps({**_seen(project), **said}, indent=2) + "\n").encode())


def doctor(kit: Path) -> Iterator[Finding]:
    """Versions, disk, clock and certificates of a kit, and whether its server answers."""
    yield (versions := _versions())
    if not versions.good:
        return
    free = shutil.disk_usage(kit).free
    yield Finding(free >= ROOM, f"{free / 2**30:.0f} GiB free at {kit}" + ("" if free >= ROOM else "; make room"))
    yield from certificates(kit)
    yield reached(kit)


def sound(kit: Path) -> None:
    """Raises DeployError: of a kit's certificates one is missing, or its time is not now."""
    for found in certificates(kit):
        if found.fatal:
            raise DeployError(f"{found.text}.")


def answered(kit: Path, patience: float) -> None:
    """Raises DeployError: the server that a kit names does not take its certificate within so many seconds."""
    until = time.monotonic() + patience
    while (found := reached(kit)).fatal:
        if time.monotonic() > until:
            raise DeployError(f"{found.text}.")
        time.sleep(1)


def _versions() -> Finding:
    try:
        return Finding(True, f"fedloom {__version__}, nvflare {version('nvflare')}")
    except PackageNotFoundError:
        return Finding(False, "NVIDIA FLARE is not installed: pip install 'fedloom[nvflare]'")


def certificates(kit: Path) -> Iterator[Finding]:
    """What a kit needs to show who it is, and the days that are left of it."""
    from cryptography import x509

    startup, now = kit / "startup", _now()
    needed = (*(f"{_own(kit)}.{end}" for end in ("crt", "key")), "rootCA.pem")
    if missing := [name for name in needed if not (startup / name).is_file()]:
        text = f"'{startup}' has no {missing[0]}: put it back, or make the kit anew (`fedloom deploy package`)"
        yield Finding(False, text, fatal=True)
    for path in (startup / name for name in needed if name not in (*missing, needed[1])):
        try:
            certificate = x509.load_pem_x509_certificate(path.read_bytes())
        except ValueError as e:
            yield Finding(False, f"'{path}' is no certificate ({e}): put it back from a backup", fatal=True)
            continue
        begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        clock = f"and the clock here says {_minute(now)}"
        if now < begins:
            text = f"'{path}' is valid from {_minute(begins)} on, {clock}: set the clock"
            yield Finding(False, text, fatal=True)
        elif now > ends:
            text = f"'{path}' ended at {_minute(ends)}, {clock}: set the clock, or join again under another name"
            yield Finding(False, text, fatal=True)
        else:
            left = (ends - now).days
            yield Finding(left > SOON, f"{path.name}: {left} days left")
    for key in (kit / "startup").glob("*.key"):
        mode = key.stat().st_mode & 0o077
        yield Finding(not mode, f"{key.name} can be read by " + ("others; chmod 600" if mode else "its owner alone"))


def reached(kit: Path) -> Finding:
    """Whether the server that a kit names takes this kit's certificate."""
    host, port = endpoint(kit)
    startup, own = kit / "startup", _own(kit)
    try:
        context = ssl.create_default_context(cafile=str(startup / "rootCA.pem"))
        context.load_cert_chain(startup / f"{own}.crt", startup / f"{own}.key")
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection((host, port), 5) as plain,
            context.wrap_socket(plain, server_hostname=host) as tls,
        ):
            return Finding(True, f"{host}:{port} answers, {tls.version()}")
    except ssl.SSLError as e:
        return Finding(
            False, f"the certificates of {host}:{port} and '{startup}' do not fit: {e.reason or e}", fatal=True
        )
    except OSError as e:
        text = f"{host}:{port} cannot be reached ({e}); is the server started, its name right, the port open outwards?"
        return Finding(False, text, fatal=True)


def endpoint(kit: Path) -> tuple[str, int]:
    """Host and port of a kit's server."""
    for name in ("fed_client.json", "fed_server.json", "fed_admin.json"):
        if (path := kit / "startup" / name).is_file():
            content = json.loads(path.read_text())
            if "admin" in content:
                return content["admin"]["host"], int(content["admin"]["port"])
            host, _, port = content["servers"][0]["service"]["target"].rpartition(":")
            return host, int(port)
    raise DeployError(f"'{kit}' is no kit of `fedloom deploy package`.")


def _own(kit: Path) -> str:
    """What a kit's certificate and key are called."""
    return "server" if (kit / "startup" / "fed_server.json").is_file() else "client"


def _now() -> datetime:
    return datetime.now(UTC)


def _minute(when: datetime) -> str:
    return f"{when:%Y-%m-%d %H:%M}Z"


def _seen(project: Path) -> dict[str, str]:
    path = project / SEEN
    content: dict[str, str] = json.loads(path.read_text()) if path.is_file() else {}
    return content
