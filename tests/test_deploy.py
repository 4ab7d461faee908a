"""A federation across sites, without the machines: messages, the engine, a site's policy, and what is written down."""

import errno
import gc
import io
import json
import logging
import os
import re
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedloom.assembly import planned
from fedloom.deploy.audit import Audit
from fedloom.deploy.conduct import Experiment, Standing, conduct, deployable
from fedloom.deploy.kits import TEMPLATE, lock
from fedloom.deploy.look import doctor
from fedloom.deploy.policy import Policy, allowed, fingerprint, load_limits, load_site
from fedloom.deploy.resident import Fenced, Resident
from fedloom.engines.messages import Message, moved, received, sent
from fedloom.engines.remote import Limits, RemoteEngine
from fedloom.errors import (
    DeployError,
    FedloomError,
    LinkError,
    PolicyError,
    QuorumError,
    RecipeError,
    RunError,
    StoreError,
    UpdateError,
)
from fedloom.events import Event, Note
from fedloom.methods import FedAvg
from fedloom.recipe import load
from fedloom.rounds import lines_of
from fedloom.runs import Run, ended, run
from fedloom.site import Answer, Silence, Update
from fedloom.store import Store
from fedloom.tensors import Shared, same, to_bytes

WAITING = Limits(deadline=60, beat=0.05, patience=1)
EXPERIMENT = "0123456789abcdef" * 2
SITES = ("kyiv", "oslo", "rome")
LABELS = {"task.labels": ("blue", "green", "red"), "reference.rows": ()}
Command = Callable[..., tuple[int, str, str]]
METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedavg, packed": {"wire": {"up": ("delta", "int8", "zstd"), "down": ("bf16", "zstd"), "budget": "20 kB"}},
    "fedpia": {"method.name": "fedpia", "method.probe": 4, "method.adapter": {"kind": "bottleneck", "width": 3}},
    "feddlp": {"method.name": "feddlp"},
}


class Here:
    """A link to residents in this process; each can be made to fail, or to be slow."""

    def __init__(self, residents: dict[str, Resident]) -> None:
        self.residents = residents
        self.dead: set[str] = set()
        self.slow: dict[str, float] = {}
        self.change: Callable[[str, dict[str, Any]], dict[str, Any]] = lambda site, reply: reply
        self.asked: list[tuple[str, str]] = []

    def ask(self, site: str, message: Message, seconds: float) -> Message:
        self.asked.append((site, message["kind"]))
        if site in self.dead:
            raise LinkError("it cannot be reached")
        if message["kind"] == "round":
            time.sleep(self.slow.get(site, 0))
        reply = self.residents[site].answer(message)
        return self.change(site, reply) if message["kind"] == "round" else reply


@pytest.fixture
def site_file(recipe: Path, backbone: Path) -> Callable[..., Path]:
    """`site_file(name, **policy)`: a site's own file beside a manifest of its own rows."""

    def make(name: str, **policy: object) -> Path:
        rows = [json.loads(line) for line in (recipe.parent / "manifest.jsonl").read_text().splitlines()]
        own = [row for row in rows if row["site"] == name]
        (recipe.parent / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
        rules = {"methods": ["fedavg", "fedpia", "feddlp"], "tasks": ["classification"], **policy}
        path = recipe.parent / f"{name}.toml"
        path.write_text(
            f'name = "{name}"\nkit = "kit"\nstate = "{name}"\n[data]\nsource = "{name}.jsonl"\n[policy]\n'
            + "".join(f"{key} = {json.dumps(value)}\n" for key, value in rules.items())
            + f'[policy.backbones."{backbone}"]\nsha256 = "{fingerprint(str(backbone))}"\n'
        )
        return path

    return make


@pytest.fixture
def here(site_file: Callable[..., Path]) -> Here:
    return Here({name: Resident(load_site(site_file(name))) for name in SITES})


def across(recipe: Path, here: Here, folder: Path, limits: Limits | None = None, **changes: Any) -> dict[str, Any]:
    asked = planned(load(recipe, {**LABELS, **changes}))
    experiment = Experiment(EXPERIMENT, asked, SITES, folder)
    return conduct(experiment, here, limits or WAITING, lambda event: None, Standing())


# The same bits


@pytest.mark.parametrize("method", METHODS)
def test_sites_elsewhere_end_with_the_bits_of_one_process(
    recipe: Path, here: Here, tmp_path: Path, method: str
) -> None:
    here.slow = {"kyiv": 0.3}  # the first of the roster answers last
    result = across(recipe, here, tmp_path / "far", **METHODS[method])
    near = run(load(recipe, {**LABELS, **METHODS[method]}), tmp_path / "near")
    last, shared = Store(tmp_path / "far" / "server").before(9)
    assert last == 1
    assert same(shared, near.shared)
    assert result["views"]["personal"] == near.summary["views"]["personal"]
    timed = {"seconds"}
    for far_line, near_line in zip(lines_of(tmp_path / "far"), near.rounds, strict=True):
        assert {k: v for k, v in far_line.items() if k not in timed} == {
            k: v for k, v in near_line.items() if k not in timed
        }
    for name in SITES:
        own = Store(here.residents[name].config.folder / "experiments" / EXPERIMENT)
        assert same(own.personal() or {}, near.private(name))


def test_a_run_folder_is_as_that_of_a_simulation(recipe: Path, here: Here, tmp_path: Path) -> None:
    result = across(recipe, here, tmp_path / "far")
    asked = load(recipe, LABELS)
    (tmp_path / "far" / "recipe.toml").write_text(asked.dump())
    done = ended(tmp_path / "far", asked, result)
    assert (done.folder / "report.html").is_file()
    simulated = set(Run(run(asked, tmp_path / "near").folder).summary)
    assert simulated - {"details", "lineage", "memory"} <= set(done.summary)  # which are of a site
    assert "simulation" in done.summary["left_out"]["global"]


# Faults


def test_a_killed_server_goes_on_with_the_same_bits(recipe: Path, here: Here, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(site: str, reply: dict[str, Any]) -> dict[str, Any]:
        if site == "rome" and len([1 for name, kind in here.asked if (name, kind) == ("rome", "round")]) == 2:
            raise Killed
        return reply

    here.change = kill
    with pytest.raises(Killed):
        across(recipe, here, tmp_path / "far")
    assert len(lines_of(tmp_path / "far")) == 1
    here.change = lambda site, reply: reply
    here.residents["oslo"] = Resident(here.residents["oslo"].config)  # it was killed too
    across(recipe, here, tmp_path / "far")
    near = run(load(recipe, LABELS), tmp_path / "near")
    assert same(Store(tmp_path / "far" / "server").before(9)[1], near.shared)


def test_a_late_answer_is_not_used(recipe: Path, here: Here, tmp_path: Path) -> None:
    across(recipe, here, tmp_path / "warm")  # so that hello is quick below
    here.slow = {"oslo": 7.0}
    late = Limits(deadline=5, beat=0.5, patience=1)
    across(recipe, here, tmp_path / "far", late, **{"federation.quorum": 0.5, "federation.rounds": 1})
    (line,) = lines_of(tmp_path / "far")
    assert line["sites"]["oslo"] == {**line["sites"]["oslo"], "answered": False, "reason": "no answer within 5 s"}
    assert all(line["sites"][name]["answered"] for name in ("kyiv", "rome"))


def test_a_site_that_is_gone_leaves_a_gap_and_no_hang(recipe: Path, here: Here, tmp_path: Path) -> None:
    here.dead = {"rome"}
    waiting = Limits(deadline=8, beat=0.5, patience=1)
    across(recipe, here, tmp_path / "warm", waiting, **{"federation.quorum": 0.5})
    began = time.monotonic()
    result = across(recipe, here, tmp_path / "far", waiting, **{"federation.quorum": 0.5})
    assert 8 < time.monotonic() - began < 16  # it is waited for once, and not in every round
    assert [line["sites"]["rome"]["answered"] for line in lines_of(tmp_path / "far")] == [False, False]
    assert "not there" in result["unmeasured"]["rome"]


def test_too_few_sites_are_an_error_that_names_them(recipe: Path, here: Here, tmp_path: Path) -> None:
    here.dead = {"rome"}
    limits = Limits(deadline=5, beat=0.5, patience=1)
    with pytest.raises(QuorumError, match=r"2 of 3 sites answered, the quorum is 3\. rome: it was not there"):
        across(recipe, here, tmp_path / "far", limits)


# Nothing that a peer sends is trusted


def changed(**values: Any) -> Callable[[str, dict[str, Any]], dict[str, Any]]:
    return lambda site, reply: {**reply, **values} if site == "oslo" else reply


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (changed(frame=b"no frame at all"), "is not safetensors"),
        (lambda site, reply: {**reply, "frame": reply["frame"][:-1]}, "is not safetensors"),  # truncated
        (changed(frame=to_bytes({"other": torch.zeros(2)})), "does not fit"),
        (changed(nonce="0" * 32), "to another message"),  # replayed
        (changed(weight=float("nan")), "expected a finite one"),
        (changed(examples=-1), "examples"),
        (changed(metrics={"loss": "low"}), "no numbers"),
        (changed(frame=7), "no frame"),
    ],
)
def test_what_is_no_update_is_refused_by_name(
    recipe: Path, here: Here, tmp_path: Path, change: Callable[[str, dict[str, Any]], dict[str, Any]], reason: str
) -> None:
    here.change = lambda site, reply: change(site, reply) if site == "oslo" else reply
    across(recipe, here, tmp_path / "far", **{"federation.quorum": 0.5, "federation.rounds": 1})
    (line,) = lines_of(tmp_path / "far")
    assert reason in line["sites"]["oslo"]["reason"]
    assert line["sites"]["rome"]["answered"]


def test_an_update_beyond_the_limits_is_refused(recipe: Path, here: Here, tmp_path: Path) -> None:
    for limits, reason in (({"norm": 1e-9}, "from what it was given"), ({"bytes": 10}, "more than the 10")):
        with pytest.raises(QuorumError, match=reason):
            across(recipe, here, tmp_path / reason, Limits(deadline=60, patience=1, **limits))


def test_how_far_an_update_moved() -> None:
    shared = {"0/A": torch.zeros(2, 2), "0/B": torch.ones(3)}
    assert moved({"0/A": torch.full((2, 2), 2.0), "0/B": torch.ones(3)}, shared) == pytest.approx(4.0)
    assert moved({"0/B": torch.full((1,), 3.0)}, shared) == pytest.approx(3.0)  # another width: from zero


def test_an_update_crosses_as_it_is() -> None:
    update = Update(Shared({"a/b": torch.arange(3.0)}), 2.0, 2, {"loss": 0.5})
    back, frame = received("oslo", sent(update, b"frame"), 10**6)
    assert frame == b"frame"
    assert (back.weight, back.examples, back.metrics) == (2.0, 2, {"loss": 0.5})


def test_a_message_is_not_answered_twice(here: Here) -> None:
    resident = here.residents["oslo"]
    message = {"kind": "evaluate", "experiment": EXPERIMENT, "nonce": "n", "round": 0, "frame": b""}
    assert "no such experiment" in resident.answer(message)["error"]
    assert "not answered twice" in resident.answer(message)["error"]


def test_no_message_stops_a_site(here: Here) -> None:
    resident = here.residents["oslo"]
    for message in ({}, {"kind": "hello"}, {"nonce": "a", "kind": 3}, {"nonce": "b", "experiment": "../../etc"}):
        assert "error" in resident.answer(message)
    assert resident.answer({"kind": "ping", "nonce": "p"}) == {"nonce": "p"}


# A site's policy


@pytest.mark.parametrize(
    ("change", "rules", "reason"),
    [
        ({"method.name": "ditto"}, {}, "method is 'ditto'"),
        ({}, {"tasks": ["vqa"]}, "task is 'classification'"),
        ({"federation.rounds": 101}, {}, "rounds = 101"),
        ({"training.epochs": 21}, {}, "epochs = 21"),
        ({"training.finetune": 21}, {}, "finetune = 21"),
        ({}, {"sites": 4}, "3 sites take part"),
        ({"sites.oslo.initial": "/etc/passwd"}, {}, "no site opens"),
        ({"method": {"name": "feddlp", "share": "both"}}, {}, "'local'.* policy allows \\[\\]"),
    ],
)
def test_a_site_refuses_what_its_policy_does_not_allow(
    recipe: Path, site_file: Callable[..., Path], change: dict[str, Any], rules: dict[str, Any], reason: str
) -> None:
    config = load_site(site_file("oslo", **rules))
    with pytest.raises(PolicyError, match=reason):
        allowed(config, load(recipe, {**LABELS, **change}).dump(), 3)


@pytest.mark.parametrize(
    ("method", "sends"),
    [
        ({"name": "feddlp", "share": "both"}, ["local"]),
        ({"name": "feddlp"}, []),
        ({"name": "fedpia"}, []),  # an adapter of each site's own is what it federates: its name allows that
    ],
)
def test_a_site_says_whether_an_option_may_send_its_own_adapter(
    recipe: Path, site_file: Callable[..., Path], method: dict[str, Any], sends: list[str]
) -> None:
    asked = load(recipe, {**LABELS, "method": method})
    own, _ = allowed(load_site(site_file("oslo", sends=sends)), asked.dump(), 3)
    assert own.method == asked.method


def test_a_method_that_is_not_allowed_is_not_even_imported(
    recipe: Path, site_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    text = load(recipe, LABELS).dump().replace('name = "fedavg"', 'name = "evil:Method"')
    with pytest.raises(PolicyError, match="evil:Method"):
        allowed(load_site(site_file("oslo")), text, 3)


def test_where_a_site_computes_is_the_site_s_own_affair(recipe: Path, site_file: Callable[..., Path]) -> None:
    text = load(recipe, {**LABELS, "backbone.device": "cuda:3"}).dump()
    config = load_site(site_file("oslo"))
    assert allowed(config, text, 3)[0].backbone.device == "cpu"
    assert allowed(replace(config, device="cuda"), text, 3)[0].backbone.device == "cuda"


def test_another_backbone_of_the_same_name_is_refused(
    recipe: Path, site_file: Callable[..., Path], backbone: Path, tmp_path: Path
) -> None:
    config = load_site(site_file("oslo"))
    other = {name: replace(one, sha256="0" * 64) for name, one in config.policy.backbones.items()}
    with pytest.raises(PolicyError, match="SHA-256"):
        allowed(replace(config, policy=replace(config.policy, backbones=other)), load(recipe, LABELS).dump(), 3)


def test_what_is_refused_says_so_at_both_ends(
    recipe: Path, here: Here, site_file: Callable[..., Path], tmp_path: Path
) -> None:
    here.residents["oslo"] = Resident(load_site(site_file("oslo", tasks=["vqa"])))
    across(recipe, here, tmp_path / "far", **{"federation.quorum": 0.5})
    assert "policy allows ['vqa']" in lines_of(tmp_path / "far")[0]["sites"]["oslo"]["reason"]
    for log in (tmp_path / "far" / "audit.log", here.residents["oslo"].audit.path):
        assert "policy allows ['vqa']" in log.read_text()


def test_metrics_that_may_not_leave_stay(
    recipe: Path, here: Here, site_file: Callable[..., Path], tmp_path: Path
) -> None:
    here.residents["oslo"] = Resident(load_site(site_file("oslo", metrics=["loss"])))
    result = across(recipe, here, tmp_path / "far")
    rows = lines_of(tmp_path / "far")[0]["sites"]
    assert rows["oslo"]["metric"] is None
    assert rows["oslo"]["loss"] is not None
    assert rows["rome"]["metric"] is not None
    assert "oslo" not in result["views"]["personal"]["sites"]


def test_patterns_say_which_metrics_leave() -> None:
    policy = Policy(("fedavg",), ("vqa",), {}, metrics=("loss", "rank/*"))
    assert policy.leaving({"loss": 1.0, "rank/a": 2.0, "rank": 3.0}) == {"loss": 1.0, "rank/a": 2.0}


def test_an_unlike_version_is_refused(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedloom.deploy.resident.__version__", "0.0.1")
    message = {"kind": "hello", "experiment": EXPERIMENT, "nonce": "n", "version": "9", "recipe": "", "sites": 3}
    assert "the server runs fedloom 9 and this site 0.0.1" in here.residents["oslo"].answer(message)["error"]


@pytest.mark.parametrize(("off", "said"), [(86_400, "ahead of"), (-86_400, "behind"), (60, None)])
def test_a_clock_that_is_off_is_told(
    recipe: Path, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, off: int, said: str | None
) -> None:
    monkeypatch.setattr("fedloom.deploy.resident.time", SimpleNamespace(time=lambda: time.time() + off))
    told: list[str] = []
    asked = planned(load(recipe, {**LABELS, "federation.rounds": 1, "training.warmup_head": 0}))

    def watch(event: Event) -> None:
        told.extend([event.text] if isinstance(event, Note) else [])

    conduct(Experiment(EXPERIMENT, asked, SITES, tmp_path), here, WAITING, watch, Standing())
    clocks = [text for text in told if "clock" in text]
    assert [re.sub("[0-9]{2},[0-9]{3} s", "N s", text) for text in clocks] == (
        [f"{site}'s clock is N s {said} this server's: one of the two is wrong; set it." for site in SITES]
        if said
        else []
    )
    assert "on cpu" in told[0]


def test_a_recipe_whose_labels_nobody_could_know_is_refused(recipe: Path) -> None:
    with pytest.raises(RecipeError, match="write them out"):
        deployable(load(recipe))
    deployable(load(recipe, LABELS))
    deployable(load(recipe, {"data.vocabulary": "site"}))


@pytest.mark.parametrize(
    ("text", "reason"),
    [("nme = 3", "unknown key 'nme'"), ("name = [", "not TOML"), ('name = "oslo"', "'kit' is missing")],
)
def test_a_site_file_with_a_mistake_says_where(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "site.toml").write_text(text)
    with pytest.raises(FedloomError, match=reason):
        load_site(tmp_path / "site.toml")


def test_a_server_s_limits_are_checked(tmp_path: Path) -> None:
    assert load_limits(tmp_path / "none.toml", 7.0) == Limits(deadline=7.0)
    (tmp_path / "server.toml").write_text("nrom = 3.0")
    with pytest.raises(RecipeError, match="did you mean 'norm'"):
        load_limits(tmp_path / "server.toml", 7.0)
    with pytest.raises(DeployError, match="cannot be read"):
        load_site(tmp_path / "none.toml")


def test_without_flare_the_command_says_how_to_get_it(
    fedloom: Command, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nvflare", None)
    for command in (["run", recipe, "--engine", "nvflare"], ["deploy", "join", "oslo", "--project-name", "trial"]):
        code, _, error = fedloom(*command, "--out", tmp_path / "out")
        assert (code, error) == (2, "fedloom: NVIDIA FLARE is not installed: pip install 'fedloom[nvflare]'.\n")


def test_a_recipe_for_sites_elsewhere_is_not_run_here(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="--engine nvflare"):
        run(load(recipe, {"federation.engine": "nvflare"}), tmp_path / "run")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["deploy", "approve", "none.zip", "--fingerprint", "0"], "is no request that"),
        (["deploy", "status", "--project", "none"], "is no project of"),
        (["deploy", "join", "a b", "--project-name", "trial"], "is no name for a site"),
        (["site", "start", "--config", "none.toml"], "cannot be read"),
        (["server", "start", "--project", "none"], "is no kit of"),
        (["deploy", "fingerprint", "none"], "no backbone 'none'"),
    ],
)
def test_a_mistake_is_one_sentence(fedloom: Command, words: list[str], reason: str) -> None:
    code, _, error = fedloom(*words)
    assert code == 2
    assert reason in error
    assert error.count("\n") == 1


# The kit


def test_a_locked_kit_takes_no_code_and_no_other_class(tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    parts = [{"id": "job_manager", "args": {"uri_root": "/tmp"}}, {"id": "site_log_streamer"}]
    default = {"class_allow_list": ["a.B"], "class_list_enforcement_mode": "log", "components": parts}
    (tmp_path / "local" / "resources.json.default").write_text(json.dumps(default))
    logs = {"handlers": {"console": {}}, "loggers": {"root": {"handlers": ["console"]}}}
    (tmp_path / "local" / "log_config.json.default").write_text(json.dumps(logs))
    lock(tmp_path, "site")
    resources = json.loads((tmp_path / "local" / "resources.json").read_text())
    assert resources["class_allow_list"] == ["fedloom.deploy.job.SiteEnd"]
    assert resources["class_list_enforcement_mode"] == "enforce"
    assert [(part["id"], part["args"]) for part in resources["components"]] == [
        ("job_manager", {"uri_root": str(tmp_path / "jobs")}),
        ("refused", {"log": str(tmp_path / "refused.log")}),
    ]
    logs = json.loads((tmp_path / "local" / "log_config.json").read_text())
    assert logs["loggers"]["root"]["handlers"] == ["console", "refused"]
    assert logs["handlers"]["refused"]["log"] == str(tmp_path / "refused.log")
    rights = json.loads((tmp_path / "local" / "authorization.json").read_text())["permissions"]
    assert rights["lead"]["byoc"] == rights["lead"]["shell_commands"] == "none"
    assert {role: right for role, right in rights.items() if role != "lead"} == dict.fromkeys(
        ("project_admin", "org_admin", "member"), "none"
    )


def test_the_site_file_that_a_kit_comes_with_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(TEMPLATE.read_text())
    config = load_site(tmp_path / "site.toml")
    assert config.name == "NAME"
    assert config.policy.sites == 3
    assert config.device == "cpu"


def test_a_process_that_was_left_behind_writes_nothing(tmp_path: Path) -> None:
    old, new = (Fenced(tmp_path, token=token) for token in ("old", "new"))
    old.claim()
    old.after(0, {"a": torch.zeros(1)})
    new.claim()
    new.after(1, {"a": torch.ones(1)})
    with pytest.raises(StoreError, match="taken the experiment over"):
        old.after(0, {"a": torch.zeros(1)})
    assert new.rounds() == (0, 1)


def kit_of(folder: Path, **validity: float) -> Path:
    """A site's kit, as far as a start looks at it; its server is on a port where nobody is."""
    pytest.importorskip("nvflare", reason="the extra nvflare is not installed")
    from consortium import self_signed

    startup = self_signed(folder / "startup", "oslo", **validity)
    (startup / "rootCA.pem").write_bytes((startup / "client.crt").read_bytes())
    servers = [{"service": {"target": "localhost:1"}}]
    (startup / "fed_client.json").write_text(json.dumps({"client": {"fqsn": "oslo"}, "servers": servers}))
    (folder / "local").mkdir()
    (folder / "local" / "resources.json.default").write_text('{"components": []}')
    logs = {"handlers": {}, "loggers": {"root": {"handlers": []}}}
    (folder / "local" / "log_config.json.default").write_text(json.dumps(logs))
    return folder


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("missing", "has no client.crt: put it back"),
        ("no key", "has no client.key: put it back"),
        ("damaged", "is no certificate"),
        ("expired", "and the clock here says .*: set the clock, or join again"),
        ("clock", "is valid from .* on, and the clock here says .*: set the clock"),
        ("address", r"localhost:1 cannot be reached \(.*\); is the server started, its name right"),
    ],
)
def test_a_site_that_cannot_begin_says_why(
    fedloom: Command,
    site_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    reason: str,
) -> None:
    monkeypatch.setattr("fedloom.deploy.start.PATIENCE", 0.0)
    config = site_file("oslo")
    kit = kit_of(config.parent / "kit", **({"begins": -3, "ends": -2} if fault == "expired" else {}))
    match fault:
        case "missing":
            (kit / "startup" / "client.crt").unlink()
        case "no key":
            (kit / "startup" / "client.key").unlink()
        case "damaged":
            (kit / "startup" / "client.crt").write_text("-----")
        case "clock":
            monkeypatch.setattr("fedloom.deploy.look._now", lambda: datetime.now(UTC) - timedelta(days=1))
    code, _, error = fedloom("site", "start", "--config", config)
    assert code == 2
    assert re.search(reason, error)
    assert error.count("\n") == 1
    assert any(reason in one.text or re.search(reason, one.text) for one in doctor(kit) if not one.good)


def test_a_full_disk_costs_a_site_the_round_and_no_state(
    recipe: Path, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    across(recipe, here, tmp_path / "far", **{"federation.rounds": 1, **METHODS["feddlp"]})
    folder, whole = here.residents["oslo"].config.folder, Path.replace
    kept = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    assert kept

    def full(partial: Path, target: Path) -> Path:
        if folder in Path(target).parents:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(partial, target)

    def no_line(self: Audit, experiment: str, text: str) -> None:
        raise StoreError("no space for a line either")

    changes = {"federation.rounds": 2, "federation.quorum": 0.5, **METHODS["feddlp"]}
    with monkeypatch.context() as disk:
        disk.setattr(Path, "replace", full)
        across(recipe, here, tmp_path / "far", **changes)
        first, second = lines_of(tmp_path / "far")
        assert first["sites"]["oslo"]["answered"]
        assert re.search(
            "oslo/experiments/.*cannot be written: No space left on device; it takes [0-9,]+ bytes. Free space there",
            second["sites"]["oslo"]["reason"],
        )
        assert second["sites"]["rome"]["answered"]
        disk.setattr(Audit, "note", no_line)
        refusal = here.residents["oslo"].answer({"kind": "hello", "nonce": "n", "experiment": EXPERIMENT})
        assert "the server runs fedloom None" in refusal["error"]
    assert {path: path.read_bytes() for path in folder.rglob("*.safetensors")} == kept
    assert not list(folder.rglob("*.partial"))
    across(recipe, here, tmp_path / "far", **{**changes, "federation.rounds": 3})
    assert lines_of(tmp_path / "far")[2]["sites"]["oslo"]["answered"]


# What is written down


def test_the_site_writes_down_what_left_it(recipe: Path, here: Here, tmp_path: Path) -> None:
    across(recipe, here, tmp_path / "far")
    server, site = (path.read_text() for path in (tmp_path / "far" / "audit.log", here.residents["oslo"].audit.path))
    hashes = [line.rsplit(" ", 1)[1] for line in site.splitlines() if "sent to the server: update" in line]
    assert len(hashes) == 2
    assert all(f"oslo: came: update of round {i + 1}" in server and digest in server for i, digest in enumerate(hashes))


def test_a_peer_cannot_write_a_line_of_its_own(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.log")
    audit.note(EXPERIMENT, "refused: x\n2026-01-01T00:00:00Z  0123  sent nothing\x1b[2K")
    (line,) = audit.path.read_text().splitlines()
    assert line.endswith("refused: x 2026-01-01T00:00:00Z 0123 sent nothing [2K")


def test_what_flare_refuses_is_written_down_or_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fedloom.deploy.refused import Errors

    def say(log: Path, part: str, text: str, *arguments: object) -> None:
        Errors(str(log)).emit(logging.LogRecord(f"nvflare.{part}", logging.ERROR, "", 1, text, arguments, None))

    log = tmp_path / "refused.log"
    say(log, "ClientManager", "'%s' is not the certificate's name", "rome")
    say(log, "Cell", "a peer is gone")
    (line,) = log.read_text().splitlines()
    assert line.endswith("ClientManager: 'rome' is not the certificate's name")
    assert capsys.readouterr().err == ""
    say(tmp_path, "ClientManager", "a log that cannot be written")
    say(log, "ClientManager", "%d", "arguments that do not fit")
    told = capsys.readouterr().err
    assert "StoreError" in told
    assert "TypeError" in told
    assert log.read_text().splitlines() == [line]


def test_a_connection_that_tls_refused_is_written_down_and_all_else_passed_on(tmp_path: Path) -> None:
    from fedloom.deploy.overheard import listener

    log, shown = tmp_path / "refused.log", tmp_path / "stderr"
    failed = "I1121 ssl.cc:2563] Handshake failed with error SSL_ERROR_SSL: error:1:OPENSSL_internal:NO_CERTIFICATE: x"
    with shown.open("wb") as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)  # which the listener gets, as it gets a server's
        try:
            stdin, child = listener(log, os.environ)
        finally:
            os.dup2(kept, 2)
    os.write(stdin, f"a warning\n{failed}\n\xff\n".encode("latin-1"))
    os.close(stdin)
    assert child.wait(60) == 0
    (line,) = log.read_text().splitlines()
    assert line.endswith("refused: a connection, by TLS: NO_CERTIFICATE: x")
    assert shown.read_text().startswith(f"a warning\n{failed}\n")


def test_a_large_frame_that_has_crossed_is_not_held_in_a_circle() -> None:
    from fedloom.engines.nvflare import LARGE, _freed

    class Task:
        def __init__(self, frame: bytes) -> None:
            self.frame, self.own = frame, self

    gc.disable()
    try:
        for size, held in ((LARGE, True), (LARGE + 1, False)):
            frame = bytes(size)
            crossed = weakref.ref(Task(frame))
            _freed({"frame": frame})
            assert (crossed() is not None) is held
        _freed({"frame": 3})
    finally:
        gc.enable()


def test_who_knocks_without_end_fills_no_log(tmp_path: Path) -> None:
    from fedloom.deploy.overheard import FAILED, MANY, overhear

    class Gone(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError

    moments = iter([0.0, *[0.1] * (MANY + 2), 61.0])
    overhear([f"{FAILED}\n"] * (MANY + 3), Gone(), Audit(tmp_path / "log"), lambda: next(moments))
    *first, last = (tmp_path / "log").read_text().splitlines()
    assert len(first) == MANY
    assert not any("more" in line for line in first)
    assert last.endswith("(and 2 more since the line before)")


def test_private_tensors_never_leave(recipe: Path, here: Here, tmp_path: Path) -> None:
    crossed: list[bytes] = []

    def tap(site: str, reply: dict[str, Any]) -> dict[str, Any]:
        crossed.append(reply["frame"])
        return reply

    here.change = tap
    across(recipe, here, tmp_path / "far", **METHODS["feddlp"])
    private = Store(here.residents["oslo"].config.folder / "experiments" / EXPERIMENT).before(9)[1]
    pieces = [tensor.numpy().tobytes() for tensor in private.values() if tensor.numel() > 4 and tensor.any()]
    assert pieces
    assert not any(piece in frame for piece in pieces for frame in crossed)


# The engine by itself


def test_a_site_that_stops_answering_pings_is_known_before_the_deadline() -> None:
    gone = threading.Event()

    class Stuck:
        def ask(self, site: str, message: Message, seconds: float) -> Message:
            if message["kind"] == "ping" and not gone.is_set():
                return message
            if message["kind"] == "ping":
                raise LinkError("no answer")
            gone.set()
            time.sleep(5)
            return {}

    engine = RemoteEngine(Stuck(), EXPERIMENT, FedAvg(), limits=Limits(deadline=0.6, beat=0.05))
    (reply,) = engine.round(0, Shared({}), ["oslo"])
    assert isinstance(reply, Silence)
    assert engine.lost == {"oslo": "it has not answered 3 pings"}


def test_a_late_answer_is_counted() -> None:
    told: list[str] = []

    class Slow:
        def ask(self, site: str, message: Message, seconds: float) -> Message:
            time.sleep(0.0 if message["kind"] == "ping" else 1.0)
            return message

    engine = RemoteEngine(
        Slow(), EXPERIMENT, FedAvg(), limits=Limits(deadline=0.2, beat=0.1), seen=lambda site, text: told.append(text)
    )
    assert [type(reply) for reply in engine.round(0, Shared({}), ["oslo"])] == [Silence]
    time.sleep(2)
    assert engine.late == {"oslo": 1}
    assert "its answer came after the deadline, and was not used" in told


def test_replies_are_folded_in_roster_order() -> None:
    class Unlike:
        def ask(self, site: str, message: Message, seconds: float) -> Message:
            time.sleep(0.2 if site == "a" else 0)
            return {**sent(Update(Shared({}), 1.0, 1), to_bytes({})), "nonce": message["nonce"]}

    engine = RemoteEngine(Unlike(), EXPERIMENT, FedAvg(), limits=Limits(deadline=5))
    replies = list(engine.round(0, Shared({}), ["a", "b", "c"]))
    assert [reply.site for reply in replies] == ["a", "b", "c"]
    assert all(isinstance(reply, Answer) for reply in replies)


def test_an_update_error_names_the_site() -> None:
    with pytest.raises(UpdateError, match="'oslo'"):
        received("oslo", {}, 1)
