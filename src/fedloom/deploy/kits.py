"""Certificates and kits, made by FLARE's own tools; keys stay where they were made.

    coordinator   init                       the project's root certificate, the server's kit and the coordinator's
    site          join        -> request     a key, and a request that goes to the coordinator
    coordinator   approve     -> signed      after both have compared the request's fingerprint
    site          package     -> kit         after both have compared the root certificate's fingerprint; locked

A locked kit starts no code but the two classes of `fedloom.deploy.job`, whoever asks.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fedloom.errors import DeployError
from fedloom.store import write

SERVER_END = "fedloom.deploy.job.ServerEnd"
SITE_END = "fedloom.deploy.job.SiteEnd"
REFUSED = "fedloom.deploy.refused"
REFUSED_LOG = "refused.log"  # in a kit: what FLARE refused there
TEMPLATE = Path(__file__).resolve().parents[1] / "assets" / "deploy" / "site.toml"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
Kind = Literal["server", "site"]
# Who may do what with a job. Nobody brings code, nobody has a shell, and whoever is not named may nothing.
PERMISSIONS = {
    "project_admin": "none",
    "org_admin": "none",
    "lead": {
        "submit_job": "any",
        "manage_job": "n:submitter",
        "app_command": "n:submitter",
        "view": "any",
        **dict.fromkeys(("clone_job", "download_job", "operate", "shell_commands", "byoc"), "none"),
    },
    "member": "none",
}


def init(folder: Path, project: str, host: str, port: int) -> str:
    """A project in a folder of the coordinator's: CA, server's kit, coordinator's kit. The CA's fingerprint."""
    _named("project", project)
    if (folder / "ca").exists():
        raise DeployError(f"'{folder}' holds a project already; name another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    where = f"host: {host}\n  fed_learn_port: {port}\n  admin_port: {port}\n"
    profile = f"name: {project}\nscheme: grpc\nconnection_security: mtls\nserver:\n  {where}"
    write(folder / "profile.yml", profile.encode())
    fingerprint: str = _nvflare("cert", "init", "--profile", folder / "profile.yml", "-o", folder / "ca")[
        "rootca_fingerprint_sha256"
    ]
    (folder / "ca" / "rootCA.key").chmod(0o600)
    for participant, kind, kit in ((host, "server", "server"), (coordinator(project), "admin", "coordinator")):
        request = _request(folder / "requests" / kit, project, participant, kind, "coordinator")
        signed = _signed(request, folder, folder / "requests" / f"{kit}.signed.zip")
        _packaged(signed, folder / "requests" / kit, folder / kit, fingerprint)
    lock(folder / "server", "server")
    write(folder / "sites.json", b"{}\n")
    return fingerprint


def coordinator(project: str) -> str:
    """The name in the coordinator's certificate."""
    return f"coordinator@{project}.fedloom"


def join(name: str, project: str, folder: Path) -> tuple[Path, str]:
    """A site's key, which stays in the folder, and its request: the file to send, and its fingerprint."""
    _named("site", name)
    _named("project", project)
    if folder.exists():
        raise DeployError(f"'{folder}' exists already, with a key perhaps; name another folder, or delete it.")
    request = _request(folder, project, name, "client", name)
    return request, request_fingerprint(request)[1]


def request_fingerprint(request: Path) -> tuple[str, str]:
    """The name in a site's request, and the SHA-256 of what would be signed."""
    try:
        with zipfile.ZipFile(request) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(".csr"))
            return Path(member).stem, hashlib.sha256(archive.read(member)).hexdigest()
    except (OSError, ValueError, zipfile.BadZipFile) as e:
        raise DeployError(f"'{request}' is no request that `fedloom deploy join` made ({e}).") from None


def approve(request: Path, folder: Path, fingerprint: str) -> Path:
    """Sign a site's request: the file to send back.

    fingerprint: as the site read it out
    raises DeployError: it is another one, or a site of that name was approved before
    """
    name, found = request_fingerprint(request)
    if _plain(fingerprint) != found:
        raise DeployError(f"the request's fingerprint is {found}, and not {fingerprint}: it is not what the site sent.")
    sites = approved(folder)
    if name in sites:
        raise DeployError(
            f"a site '{name}' was approved before, and two sites cannot have one name; let it join under another."
        )
    signed = _signed(request, folder, request.with_name(f"{name}.signed.zip"))
    write(folder / "sites.json", (json.dumps({**sites, name: {"request": found}}, indent=2) + "\n").encode())
    return signed


def approved(folder: Path) -> dict[str, Any]:
    """The sites that the coordinator of a project has approved."""
    try:
        sites: dict[str, Any] = json.loads((folder / "sites.json").read_text())
    except (OSError, ValueError):
        raise DeployError(f"'{folder}' is no project of `fedloom deploy init`.") from None
    return sites


def package(signed: Path, folder: Path, fingerprint: str) -> Path:
    """A site's kit, in the folder where it asked to join, locked; beside it a site.toml to fill in.

    fingerprint: of the root certificate, as the coordinator read it out
    """
    kit = folder / "kit"
    if kit.exists():
        raise DeployError(f"'{kit}' exists already; delete it to make it anew.")
    _packaged(signed, folder, kit, fingerprint)
    lock(kit, "site")
    if not (folder / "site.toml").exists():
        name = _json(kit / "startup" / "fed_client.json")["client"]["fqsn"]
        write(folder / "site.toml", TEMPLATE.read_text().replace('"NAME"', f'"{name}"').encode())
    return kit


def lock(kit: Path, kind: Kind) -> None:
    """Write what a kit allows: no code that a job brings, no class but ours, no shell; jobs are kept inside the kit."""
    local, log = kit / "local", {"log": str(kit / REFUSED_LOG)}
    try:
        resources = json.loads((local / "resources.json.default").read_text())
        logs = json.loads((local / "log_config.json.default").read_text())
    except (OSError, ValueError) as e:
        raise DeployError(f"'{kit}' is no kit of `fedloom deploy package` ({e}).") from None
    logs["handlers"]["refused"] = {"class": f"{REFUSED}.Errors", **log}
    logs["loggers"]["root"]["handlers"].append("refused")
    resources |= {
        "class_list_enforcement_mode": "enforce",
        "class_allow_list": [SERVER_END if kind == "server" else SITE_END],
        "allow_log_streaming": False,
    }
    # Logs of a site's may hold what its data are like.
    own = [part for part in resources["components"] if "log" not in part["id"]]
    for part in own:
        if part["id"] == "job_manager":
            part["args"]["uri_root"] = str(kit / "jobs")
    resources["components"] = [*own, {"id": "refused", "path": f"{REFUSED}.Refused", "args": log}]
    if kind == "server":
        resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(kit / "snapshots")
    permissions = {"format_version": "1.0", "permissions": PERMISSIONS}
    write(local / "resources.json", json.dumps(resources, indent=2).encode())
    write(local / "log_config.json", json.dumps(logs, indent=2).encode())
    write(local / "authorization.json", json.dumps(permissions, indent=2).encode())


def command(kit: Path, kind: Kind) -> list[str]:
    """What starts the kit's process, in the foreground."""
    needs_nvflare()
    config = _json(kit / "startup" / ("fed_server.json" if kind == "server" else "fed_client.json"))
    if kind == "server":
        module, uid = "nvflare.private.fed.app.server.server_train", []
    else:
        module, uid = "nvflare.private.fed.app.client.client_train", [f"uid={config['client']['fqsn']}"]
    start = [sys.executable, "-u", "-m", module, "-m", str(kit), "-s"]
    options = ["--set", "secure_train=true", *uid, "org=fedloom", "config_folder="]
    return [*start, "fed_server.json" if kind == "server" else "fed_client.json", *options]


def environment() -> Mapping[str, str]:
    """What the process runs in: Python finds what this one finds, memory is given back, and comes in large pages.

    A message of 100 MB is memory that nobody has touched yet, several times over; page by page, of 4 KB each, the
    kernel takes longer to hand it out than it takes to hash it.
    """
    found = os.pathsep.join(str(Path(path).resolve()) for path in sys.path if path)
    memory = {"MALLOC_ARENA_MAX": "4", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    return {**memory, **os.environ, "PYTHONPATH": found, "PYTHONUNBUFFERED": "1"}


def needs_nvflare() -> None:
    """raises DeployError: NVIDIA FLARE is not installed"""
    if importlib.util.find_spec("nvflare") is None:
        raise DeployError("NVIDIA FLARE is not installed: pip install 'fedloom[nvflare]'.")


def admin_of(kit: Path) -> str:
    """The name in the certificate of a coordinator's kit."""
    return str(_json(kit / "startup" / "fed_admin.json")["admin"]["username"])


def _named(what: str, name: str) -> None:
    if not NAME.fullmatch(name):
        raise DeployError(f"'{name}' is no name for a {what}: letters, digits, '.', '_' and '-', at most 63.")


def _request(folder: Path, project: str, name: str, kind: str, org: str) -> Path:
    role = "\n    role: lead" if kind == "admin" else ""
    asked = f"name: {project}\nparticipants:\n  - name: {name}\n    type: {kind}\n    org: {_org(org)}{role}\n"
    with tempfile.TemporaryDirectory() as scratch:
        participant = Path(scratch) / "participant.yml"
        participant.write_text(asked)
        return Path(_nvflare("cert", "request", "-p", participant, "--out", folder)["request_zip"])


def _org(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]", "_", name)


def _signed(request: Path, folder: Path, to: Path) -> Path:
    _nvflare("cert", "approve", "-c", folder / "ca", "--profile", folder / "profile.yml", "--out", to, request)
    return to


def _packaged(signed: Path, request: Path, kit: Path, fingerprint: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        made = _nvflare("package", signed, "--request-dir", request, "-w", scratch, "--fingerprint", fingerprint)
        shutil.copytree(made["output_dir"], kit, symlinks=True)
    for key in (kit / "startup").glob("*.key"):
        key.chmod(0o600)


def _nvflare(*arguments: object) -> dict[str, Any]:
    """What one of FLARE's commands made; raises DeployError with what it says."""
    needs_nvflare()
    call = [sys.executable, "-m", "nvflare.cli", *map(str, arguments), "--format", "json"]
    done = subprocess.run(call, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            said = json.loads(line)
            if said.get("status") == "ok":
                result: dict[str, Any] = said["data"]
                return result
            raise DeployError(f"{said.get('message', 'refused')} {said.get('hint', '')}".strip())
    raise DeployError(f"nvflare {arguments[0]} {arguments[1]} failed: {(done.stderr or done.stdout).strip()[-300:]}")


def _json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise DeployError(f"'{path}' cannot be read ({e}); is this a kit of `fedloom deploy package`?") from None
    return content


def _plain(fingerprint: str) -> str:
    return re.sub(r"[^0-9a-f]", "", fingerprint.lower().removeprefix("sha256:"))
