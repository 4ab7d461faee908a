"""NVIDIA FLARE itself: a server and three sites as processes of their own, with mutual TLS, on this machine."""

import json
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("nvflare", reason="the extra nvflare is not installed")

from consortium import SERVER, Consortium, organs, self_signed

from fedloom.deploy.kits import approve, join, package, request_fingerprint
from fedloom.deploy.look import doctor
from fedloom.deploy.session import Session
from fedloom.deploy.submit import definition
from fedloom.errors import DeployError, LinkError
from fedloom.recipe import load
from fedloom.runs import Run, run
from fedloom.store import Store
from fedloom.tensors import same

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SITES = ("gut", "lung", "spine")
METHODS: dict[str, list[str]] = {
    "fedavg": [],
    "fedpia": ["method.name=fedpia", "method.probe=8"],
    "feddlp": ["method.name=feddlp", 'method.adapter={kind="lora", rank=4, last=2}'],
}
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    """Three organs of VQA-Med, a site each."""
    folder = tmp_path_factory.mktemp("consortium")
    manifests = organs(folder / "data")
    (folder / "organs.toml").write_text(
        f'[data]\nsource = "{manifests[""]}"\nvocabulary = "site"\ntrain = 16\nheld_out = 8\ntest = 8\n'
        '[backbone]\nname = "vilt-small"\ncache = true\n'
        '[task]\nkind = "vqa"\nhead = "linear"\nobjective = "cross_entropy"\n'
        '[method]\nname = "fedavg"\n[method.adapter]\nkind = "bottleneck"\nwidth = 8\nlast = 2\n'
        "[reference]\nrows = []\n[training]\nlr = 0.01\nbatch = 8\nwarmup_head = 1\nfinetune = 1\n"
        "[federation]\nrounds = 2\ndeadline = 240.0\n"
    )
    policy = f'methods = {list(METHODS)}\ntasks = ["vqa"]'
    with Consortium(folder, "vilt-small", {name: manifests[name] for name in SITES}, policy) as one:
        yield one


def settings(changes: list[str]) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


@pytest.mark.parametrize("method", METHODS)
def test_processes_end_with_the_bits_of_one(
    consortium: Consortium, fedloom: Command, tmp_path: Path, method: str
) -> None:
    recipe, changes = consortium.folder / "organs.toml", METHODS[method]
    across = ("--engine", "nvflare", "--project", consortium.project, "--out", tmp_path / "far")
    code, said, error = fedloom("run", recipe, *settings(changes), *across)
    assert (code, error) == (0, "")
    assert "round 2/2  3 of 3 sites" in said
    near = run(load(recipe, changes), tmp_path / "near")
    far = Run(tmp_path / "far")
    assert same(Store(far.folder / "server").before(9)[1], near.shared)
    assert far.summary["views"]["personal"] == near.summary["views"]["personal"]
    assert far.summary["bytes_up"] == near.summary["bytes_up"]
    assert (far.folder / "report.html").is_file()
    experiment = (far.folder / "experiment").read_text()
    for name in SITES:
        own = Store(consortium.folder / name / "state" / "experiments" / experiment).personal()
        assert same(own or {}, near.private(name))
    code, said, _ = fedloom("deploy", "status", "--project", consortium.project)
    assert code == 0
    assert [line.split(";")[1].strip()[:7] for line in said.splitlines()] == ["fedloom"] * 3


def test_the_doctor_finds_a_sound_kit_sound(consortium: Consortium) -> None:
    found = list(doctor(consortium.folder / "lung" / "kit"))
    assert [one.text for one in found if not one.good] == []
    assert any("TLS" in one.text for one in found)


# Strangers


def handshake(consortium: Consortium, certificate: Path | None) -> bytes:
    """What the server sends first to whoever comes with this certificate; raises where it closes the connection."""
    context = ssl.create_default_context(cafile=str(consortium.project / "ca" / "rootCA.pem"))
    context.set_alpn_protocols(["h2"])
    if certificate is not None:
        context.load_cert_chain(certificate / "client.crt", certificate / "client.key")
    address = ("localhost", consortium.port)
    with socket.create_connection(address, 10) as bare, context.wrap_socket(bare, server_hostname="localhost") as tls:
        tls.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))  # and no settings
        if not (said := tls.recv(9)):
            raise ConnectionError("closed")
        return said


def test_without_a_certificate_of_the_project_the_port_is_closed(consortium: Consortium, tmp_path: Path) -> None:
    assert handshake(consortium, consortium.folder / "lung" / "kit" / "startup")
    for stranger in (None, self_signed(tmp_path / "self", "lung")):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            handshake(consortium, stranger)


def test_a_site_with_another_s_name_is_not_started(consortium: Consortium, fedloom: Command, tmp_path: Path) -> None:
    text = (consortium.folder / "lung" / "site.toml").read_text().replace('"lung"', '"gut"', 1)
    path = tmp_path / "site.toml"
    path.write_text(text.replace('kit = "kit"', f'kit = "{consortium.folder / "lung" / "kit"}"'))
    code, _, error = fedloom("site", "start", "--config", path)
    assert code == 2
    assert "is of the site 'gut', and the certificate in" in error


def outcome(consortium: Consortium, folder: Path, change: Callable[[Path], None]) -> str:
    """What becomes of a changed job."""
    made = definition(folder, "f" * 32, load(consortium.folder / "organs.toml"), SITES)
    change(made)
    with Session(consortium.project / "coordinator", 20) as session:
        name = session.submit(made)
        until = time.monotonic() + 60
        while not (status := session.status(name)).startswith("FINISHED") and time.monotonic() < until:
            time.sleep(0.5)
    return status


def test_a_job_with_code_is_refused(consortium: Consortium, tmp_path: Path) -> None:
    proof = tmp_path / "ran"

    def smuggle(made: Path) -> None:
        (made / "app" / "custom").mkdir()
        code = f"open({str(proof)!r}, 'w').write('ran')\nfrom fedloom.deploy.job import SiteEnd as Evil\n"
        (made / "app" / "custom" / "evil.py").write_text(code)
        config = made / "app" / "config" / "config_fed_client.json"
        config.write_text(config.read_text().replace("fedloom.deploy.job.SiteEnd", "evil.Evil"))

    assert outcome(consortium, tmp_path, smuggle) != "FINISHED:COMPLETED"
    assert "BYOC not permitted" in (consortium.folder / "server.log").read_text()
    assert not proof.exists()


def test_a_job_with_a_class_that_is_not_listed_is_refused(consortium: Consortium, tmp_path: Path) -> None:
    def other(made: Path) -> None:
        config = made / "app" / "config" / "config_fed_client.json"
        config.write_text(config.read_text().replace("fedloom.deploy.job.SiteEnd", "subprocess.Popen"))

    assert outcome(consortium, tmp_path, other) != "FINISHED:COMPLETED"
    logs = [(consortium.folder / f"{name}.log").read_text() for name in SITES]
    assert all("subprocess.Popen" in log for log in logs)


# Bad input


def test_two_sites_of_one_name_are_refused(consortium: Consortium, tmp_path: Path) -> None:
    request, own = join("lung", "trial", tmp_path / "lung")
    with pytest.raises(DeployError, match="was approved before"):
        approve(request, consortium.project, own)


def test_a_request_that_was_exchanged_on_its_way_is_refused(consortium: Consortium, tmp_path: Path) -> None:
    request, own = join("bern", "trial", tmp_path / "bern")
    assert request_fingerprint(request) == ("bern", own)
    with pytest.raises(DeployError, match="not what the site sent"):
        approve(request, consortium.project, "0" * 64)


def test_a_kit_of_another_project_is_refused(consortium: Consortium, tmp_path: Path) -> None:
    request, own = join("lima", "trial", tmp_path / "lima")
    signed = approve(request, consortium.project, own)
    with pytest.raises(DeployError):
        package(signed, tmp_path / "lima", "SHA256:" + ":".join(["00"] * 32))
    sites = consortium.project / "sites.json"
    rows = {name: row for name, row in json.loads(sites.read_text()).items() if name in SITES}
    sites.write_text(json.dumps(rows))  # nobody waits for it below


def test_a_server_that_is_not_there_is_said_so(consortium: Consortium, tmp_path: Path) -> None:
    kit = tmp_path / "coordinator"
    shutil.copytree(consortium.project / "coordinator", kit)
    admin = kit / "startup" / "fed_admin.json"
    admin.write_text(admin.read_text().replace(str(consortium.port), "1"))
    with pytest.raises(LinkError, match="did not answer within"), Session(kit, 2) as session:
        session.sites()


# Faults; last, for they stop processes


@pytest.mark.parametrize("fault", ["a site", "a site's job", "the server"])
def test_a_kill_leaves_the_same_bits(consortium: Consortium, fedloom: Command, tmp_path: Path, fault: str) -> None:
    recipe = consortium.folder / "organs.toml"
    changes = ["federation.rounds=6", "training.epochs=4"]
    struck: list[float] = []

    def strike() -> None:
        while not (tmp_path / "far" / "rounds.jsonl").is_file():
            time.sleep(0.05)
        struck.append(time.monotonic())
        match fault:
            case "a site":
                consortium.kill("lung")
            case "a site's job":
                consortium.kill_job("spine")
            case "the server":
                consortium.kill(SERVER)

    threading.Thread(target=strike, daemon=True).start()
    across = ("--engine", "nvflare", "--project", consortium.project, "--out", tmp_path / "far")
    code, said, error = fedloom("run", recipe, *settings(changes), *across)
    assert (code, error) == (0, "")
    assert struck
    near = run(load(recipe, changes), tmp_path / "near")
    far = Run(tmp_path / "far")
    assert all(line["answered"] == list(SITES) for line in far.summary["roster"]), said
    assert same(Store(far.folder / "server").before(9)[1], near.shared)
    assert far.summary["views"]["personal"] == near.summary["views"]["personal"]
