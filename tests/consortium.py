"""A server and sites as processes of this machine, by the commands that a consortium would use; and their faults."""

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from fedloom.deploy.kits import approve, environment, init, join, package
from fedloom.deploy.look import endpoint
from fedloom.deploy.policy import fingerprint
from fedloom.deploy.session import Session

PROJECT = "trial"
SERVER = "server"
PATIENCE = 300.0  # seconds; a machine may be slow


class Consortium:
    """`with Consortium(folder, backbone, {"oslo": manifest, ...}, policy) as one:` its processes run, and then do not.

    A folder that has its certificates and kits keeps them.
    """

    def __init__(self, folder: Path, backbone: str, sources: Mapping[str, Path], policy: str) -> None:
        self.folder, self.sites = folder, tuple(sources)
        self.project = folder / "project"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        if not self.project.exists():
            root = init(self.project, PROJECT, "localhost", _free_port())
            for name in sources:
                request, own = join(name, PROJECT, folder / name)
                package(approve(request, self.project, own), folder / name, root)
        fedloom = [sys.executable, "-c", "from fedloom.cli import main; main()"]
        self.commands = {SERVER: [*fedloom, "server", "start", "--project", str(self.project)]}
        for name in sources:
            self.commands[name] = [*fedloom, "site", "start", "--config", str(folder / name / "site.toml")]
        self.over = threading.Event()
        self.jobs_left: list[psutil.Process] = []  # whose parent was killed
        self.port = endpoint(self.project / "server")[1]
        self.wire: Recorder | None = None
        for name, source in sources.items():
            (folder / name / "site.toml").write_text(
                f'name = "{name}"\nkit = "kit"\n[data]\nsource = "{source}"\n[policy]\n{policy}\n'
                f'[policy.backbones."{backbone}"]\nsha256 = "{fingerprint(backbone)}"\n'
            )

    def recorded(self) -> "Consortium":
        """The same, before it is started: its sites reach the server by way of `wire`."""
        self.wire = Recorder(self.port)
        for name in self.sites:
            config = self.folder / name / "kit" / "startup" / "fed_client.json"
            config.write_text(config.read_text().replace(f"localhost:{self.port}", f"localhost:{self.wire.port}"))
        return self

    def __enter__(self) -> "Consortium":
        threading.Thread(target=self._supervise, daemon=True).start()
        deadline = time.monotonic() + PATIENCE
        with Session(self.project / "coordinator", PATIENCE) as session:
            while len(session.sites()) < len(self.sites) and time.monotonic() < deadline:
                time.sleep(0.5)
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        time.sleep(1.5)
        for name in (*self.sites, SERVER):
            self.kill(name, whole=True)
        if self.wire is not None:
            self.wire.close()

    def _supervise(self) -> None:
        """Start what is not running, as a service manager would: FLARE's site gives up where a server is slow."""
        while not self.over.is_set():
            for name in (SERVER, *self.sites):
                process = self.processes.get(name)
                if process is None or process.poll() is not None:
                    self._start(name)
            self.over.wait(1)

    def _start(self, name: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                self.commands[name],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=dict(environment()),
                cwd=self.folder,
                start_new_session=True,
            )

    def kill(self, name: str, whole: bool = False) -> None:
        """kill -9 of one process; `whole`: of those that it started too."""
        process = self.processes.get(name)
        if process is None:
            return
        self.jobs_left += self.jobs(process.pid)
        process.kill()
        process.wait()
        while whole and self.jobs_left:
            _killed(self.jobs_left.pop())

    def kill_job(self, name: str) -> bool:
        """kill -9 of the process of a job at the server or a site; whether there was one."""
        jobs = self.jobs(self.processes[name].pid)
        for job in jobs:
            _killed(job)
        return bool(jobs)

    def jobs(self, pid: int) -> Sequence[psutil.Process]:
        try:
            children = psutil.Process(pid).children(recursive=True)
            return [child for child in children if "fedloom.deploy.overheard" not in child.cmdline()]
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            return []


class Recorder:
    """A port of this machine that stands for another one, and keeps what crosses, either way."""

    def __init__(self, port: int) -> None:
        self._beyond = port
        self._own = socket.create_server(("localhost", 0))
        self.port: int = self._own.getsockname()[1]
        self.crossed = bytearray()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._own.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it was closed
            while True:
                near, _ = self._own.accept()
                try:
                    far = socket.create_connection(("localhost", self._beyond), 5)
                except OSError:  # the server is away
                    near.close()
                    continue
                far.settimeout(None)
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while part := source.recv(2**16):
                self.crossed += part
                target.sendall(part)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


def squares(folder: Path, sites: Sequence[str], each: int = 16) -> dict[str, Path]:
    """Manifests of coloured squares on noise: one a site, and under "" that of all."""
    import torch
    from PIL import Image

    from fedloom.tensors import generator

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(each * len(sites)):
        noise = torch.randint(0, 90, (32, 32, 3), generator=generator("square", i), dtype=torch.uint8)
        noise[8:24, 8:24, i % 3] = 255
        Image.fromarray(noise.numpy()).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "label": ("red", "green", "blue")[i % 3], "site": sites[i // each]})
    return _manifests(folder, rows, sites)


def organs(folder: Path) -> dict[str, Path]:
    """Manifests of three organs of VQA-Med: one a site, and under "" that of all."""
    pack = Path(__file__).resolve().parents[1] / "benchmarks" / "data" / "vqamed"
    named = {"gastrointestinal": "gut", "lung, mediastinum, pleura": "lung", "spine and contents": "spine"}
    rows = [json.loads(line) for line in (pack / "manifest.jsonl").read_text().splitlines()]
    kept = [
        {
            "image": str(pack / row["image"]),
            "text": row["question"],
            "label": row["answer"],
            "site": named[row["organ"]],
        }
        for row in rows
        if row["organ"] in named and row["category"] in ("modality", "plane")
    ]
    return _manifests(folder, kept, tuple(named.values()))


def self_signed(folder: Path, name: str, begins: float = 0.0, ends: float = 1.0) -> Path:
    """A folder with client.crt and client.key of nobody's; valid between so many days from now."""
    now = datetime.now(UTC)
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    who = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateBuilder().subject_name(who).issuer_name(who).public_key(key.public_key()).serial_number(1)
    builder = builder.not_valid_before(now + timedelta(days=begins)).not_valid_after(now + timedelta(days=ends))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "client.crt").write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "client.key").write_bytes(secret)
    (folder / "client.key").chmod(0o600)
    return folder


def _manifests(folder: Path, rows: Sequence[Mapping[str, str]], sites: Sequence[str]) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    manifests = {}
    for name in ("", *sites):
        manifests[name] = folder / f"{name or 'all'}.jsonl"
        own = [row for row in rows if name in ("", row["site"])]
        manifests[name].write_text("".join(json.dumps(row) + "\n" for row in own))
    return manifests


def _killed(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
        return port
