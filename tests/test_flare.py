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
import torch
from torch import Tensor

pytest.importorskip("nvflare", reason="the extra nvflare is not installed")

from consortium import PATIENCE, SERVER, Consortium, Recorder, organs, self_signed

from fedloom.assembly import planned
from fedloom.deploy.kits import REFUSED_LOG, approve, coordinator, join, package, request_fingerprint
from fedloom.deploy.look import doctor
from fedloom.deploy.session import Session
from fedloom.deploy.submit import definition
from fedloom.errors import DeployError, LinkError
from fedloom.recipe import load
from fedloom.runs import Run, run
from fedloom.store import Store
from fedloom.tensors import same, to_bytes

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
    with Consortium(folder, "vilt-small", {name: manifests[name] for name in SITES}, policy).recorded() as one:
        yield one


def settings(changes: list[str]) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


def readable(crossed: bytes, far: Run, near: Run) -> list[str]:
    """What can be read in bytes of what a run sent, and of what no site sends: words, names, numbers."""
    words = {"recipe": b"[federation]", "backbone": b"vilt-small", "frame": b"data_offsets", "hello": b"experiment"}
    names = {name: name.encode() for name in near.shared}
    shared = {f"numbers of {name}": tail(tensor) for name, tensor in near.shared.items() if tensor.numel() >= 16}
    private = {
        f"{site}'s {name}": tail(tensor)
        for site in SITES
        for name, tensor in near.private(site).items()
        if tensor.numel() >= 16
    }
    assert private
    return [what for what, piece in {**words, **names, **shared, **private}.items() if piece in crossed]


def tail(tensor: Tensor) -> bytes:
    """The last numbers of a tensor, as they lie in memory."""
    return to_bytes({"": tensor.reshape(-1)[-16:].clone()})[-64:]


def test_what_is_not_encrypted_can_be_read() -> None:
    """The control of what follows: the same search, in the same recorder, of a connection without TLS."""
    frame = to_bytes({"3/down": torch.arange(64.0)})
    with socket.create_server(("localhost", 0)) as server:
        wire = Recorder(server.getsockname()[1])
        with socket.create_connection(("localhost", wire.port)) as near:
            far, _ = server.accept()
            near.sendall(frame)
            assert far.recv(len(frame), socket.MSG_WAITALL) == frame
            far.close()
        wire.close()
    assert b"data_offsets" in wire.crossed
    assert b"3/down" in wire.crossed
    assert tail(torch.arange(64.0)) in wire.crossed


@pytest.mark.parametrize("method", METHODS)
def test_processes_end_with_the_bits_of_one(
    consortium: Consortium, fedloom: Command, tmp_path: Path, method: str
) -> None:
    recipe, changes, before = consortium.folder / "organs.toml", METHODS[method], len(consortium.wire.crossed)
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
    crossed = bytes(consortium.wire.crossed[before:])
    assert len(crossed) > far.summary["bytes_up"]
    assert readable(crossed, far, near) == []
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
    for stranger, why in ((None, "PEER_DID_NOT_RETURN"), (self_signed(tmp_path / "self", "lung"), "self signed")):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            handshake(consortium, stranger)
        assert within(30, lambda why=why: why in refusals(consortium, SERVER))
        assert why in (consortium.folder / "server.log").read_text()  # passed on


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    until = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < until:
        time.sleep(0.2)
    return found


def member(consortium: Consortium, folder: Path, user: str) -> Path:
    """A coordinator's kit with a site's certificate in it, under a name."""
    kit, own = folder / "kit", consortium.folder / "lung" / "kit" / "startup"
    shutil.copytree(consortium.project / "coordinator", kit)
    for part in ("client.crt", "client.key"):
        shutil.copy(own / part, kit / "startup" / part)
    admin = kit / "startup" / "fed_admin.json"
    content = json.loads(admin.read_text())
    content["admin"]["username"] = user
    admin.write_text(json.dumps(content))
    return kit


def test_a_member_submits_no_job(consortium: Consortium, tmp_path: Path) -> None:
    made = definition(tmp_path, "f" * 32, load(consortium.folder / "organs.toml"), SITES)
    with (
        pytest.raises(DeployError, match="'lung' is not authorized for 'submit_job'"),
        Session(member(consortium, tmp_path, "lung"), 20) as session,
    ):
        session.submit(made)
    assert "refused: 'submit_job' of lung (client)" in refusals(consortium, "server")


def test_a_member_under_the_coordinator_s_name_is_not_let_in(consortium: Consortium, tmp_path: Path) -> None:
    kit = member(consortium, tmp_path, coordinator("trial"))
    with pytest.raises(LinkError, match="client_registration"), Session(kit, 1) as session:
        session.sites()
    assert "failed to verify client identity: CNMismatch" in refusals(consortium, "server")


def refusals(consortium: Consortium, name: str) -> str:
    kit = consortium.project / "server" if name == SERVER else consortium.folder / name / "kit"
    log = kit / REFUSED_LOG
    return log.read_text() if log.is_file() else ""


def test_a_replayed_and_a_truncated_message_are_refused(consortium: Consortium, tmp_path: Path) -> None:
    """By a server's end that sends them, which the server is made to allow."""
    resources = consortium.project / "server" / "local" / "resources.json"
    locked = resources.read_text()
    resources.write_text(json.dumps({**json.loads(locked), "class_allow_list": ["stranger.Stranger"]}))

    def change(made: Path) -> None:
        config = made / "app" / "config" / "config_fed_server.json"
        config.write_text(config.read_text().replace("fedloom.deploy.job.ServerEnd", "stranger.Stranger"))

    replies = consortium.project / "server" / "replies.json"
    try:
        assert outcome(consortium, tmp_path, change) == "FINISHED:COMPLETED"
    finally:
        resources.write_text(locked)
    said = json.loads(replies.read_text())
    assert said["hello"] == said["hello again"] == ""
    log = (consortium.folder / SITES[0] / "state" / "audit.log").read_text()
    for what, why in (("replayed", "not answered twice"), ("truncated", "is not safetensors")):
        assert why in said[what]
        assert said[what] in log


def test_a_site_with_another_s_name_is_not_started(consortium: Consortium, fedloom: Command, tmp_path: Path) -> None:
    text = (consortium.folder / "lung" / "site.toml").read_text().replace('"lung"', '"gut"', 1)
    path = tmp_path / "site.toml"
    path.write_text(text.replace('kit = "kit"', f'kit = "{consortium.folder / "lung" / "kit"}"'))
    code, _, error = fedloom("site", "start", "--config", path)
    assert code == 2
    assert "is of the site 'gut', and the certificate in" in error


def outcome(
    consortium: Consortium, folder: Path, change: Callable[[Path], None], enough: Callable[[], bool] = lambda: False
) -> str:
    """What becomes of a changed job, which is ended where that is `enough`."""
    made = definition(folder, "f" * 32, planned(load(consortium.folder / "organs.toml")), SITES)
    change(made)
    with Session(consortium.project / "coordinator", 20) as session:
        name = session.submit(made)
        within(PATIENCE, lambda: session.status(name).startswith("FINISHED") or enough())
        session.end(name)
        within(PATIENCE, lambda: session.status(name).startswith("FINISHED"))
        return session.status(name)


def test_a_job_with_code_is_refused(consortium: Consortium, tmp_path: Path) -> None:
    proof = tmp_path / "ran"

    def smuggle(made: Path) -> None:
        (made / "app" / "custom").mkdir()
        code = f"open({str(proof)!r}, 'w').write('ran')\nfrom fedloom.deploy.job import SiteEnd as Evil\n"
        (made / "app" / "custom" / "evil.py").write_text(code)
        config = made / "app" / "config" / "config_fed_client.json"
        config.write_text(config.read_text().replace("fedloom.deploy.job.SiteEnd", "evil.Evil"))

    assert outcome(consortium, tmp_path, smuggle) != "FINISHED:COMPLETED"
    assert "refused: 'byoc' of coordinator@trial" in refusals(consortium, "server")
    assert not proof.exists()


def test_a_job_with_a_class_that_is_not_listed_is_refused(consortium: Consortium, tmp_path: Path) -> None:
    def other(made: Path) -> None:
        config = made / "app" / "config" / "config_fed_client.json"
        config.write_text(config.read_text().replace("fedloom.deploy.job.SiteEnd", "subprocess.Popen"))

    def everywhere() -> bool:
        return all("'subprocess.Popen'" in refusals(consortium, name) for name in SITES)

    assert outcome(consortium, tmp_path, other, everywhere) != "FINISHED:COMPLETED"
    assert everywhere()


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


def test_kills_leave_the_same_bits(consortium: Consortium, fedloom: Command, tmp_path: Path) -> None:
    recipe = consortium.folder / "organs.toml"
    changes = ["federation.rounds=8", "training.epochs=4"]
    faults = (lambda: consortium.kill("lung"), lambda: consortium.kill_job("spine"), lambda: consortium.kill(SERVER))
    lines, struck = tmp_path / "far" / "rounds.jsonl", []

    def strike() -> None:
        for fault in faults:  # each after a round that ended since the one before
            done = len(lines.read_text().splitlines()) if lines.is_file() else 0
            while not (lines.is_file() and len(lines.read_text().splitlines()) > done):
                time.sleep(0.05)
            struck.append(fault())

    threading.Thread(target=strike, daemon=True).start()
    across = ("--engine", "nvflare", "--project", consortium.project, "--out", tmp_path / "far")
    code, said, error = fedloom("run", recipe, *settings(changes), *across)
    assert (code, error) == (0, "")
    assert len(struck) == len(faults)
    near = run(load(recipe, changes), tmp_path / "near")
    far = Run(tmp_path / "far")
    assert all(line["answered"] == list(SITES) for line in far.summary["roster"]), said
    assert same(Store(far.folder / "server").before(9)[1], near.shared)
    assert far.summary["views"]["personal"] == near.summary["views"]["personal"]
