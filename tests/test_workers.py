"""Worker processes: the same bits as in one, errors that name a site, and no process that is left behind."""

import logging
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedloom.adapters import LoRA
from fedloom.data import Dataset
from fedloom.engines.local import LocalEngine, Participant
from fedloom.errors import RunError, TrainingError
from fedloom.methods import Ditto
from fedloom.recipe import load
from fedloom.runs import run
from fedloom.site import Answer, Reply, Silence, Site, Update
from fedloom.store import Store
from fedloom.tensors import Private, Shared, same

NAMES = ("oslo", "rome", "kyiv")


class Engines:
    """Engines over the same three sites, each with stores of its own."""

    def __init__(self, site: Callable[..., Site], folder: Path):
        self.sites = [site(name, n) for name, n in zip(NAMES, (4, 5, 3), strict=True)]
        self.folder = folder
        self.shared = Ditto(LoRA(rank=2)).start(self.sites[0].model, self.sites[0].task, 3, 0)

    def __call__(self, workers: int, method: Ditto | None = None, group: int = 1) -> LocalEngine:
        stores = self.folder / f"{workers}-{group}"
        own = {site.name: Participant(site, Store(stores / site.name), Dataset(())) for site in self.sites}
        return LocalEngine(method or Ditto(LoRA(rank=2)), own, group=group, workers=workers)


@pytest.fixture
def engines(site: Callable[..., Site], tmp_path: Path) -> Engines:
    return Engines(site, tmp_path)


def replies(engine: LocalEngine, shared: Shared) -> dict[str, Reply]:
    return {reply.site: reply for r in (0, 1) for reply in engine.round(r, shared, NAMES)}


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("workers", [2, 5])
def test_workers_change_no_bit(engines: Engines, workers: int, group: int) -> None:
    alone, spread = engines(1, group=group), engines(workers, group=group)
    ours, theirs = replies(alone, engines.shared), replies(spread, engines.shared)
    assert list(ours) == list(theirs) == list(NAMES)
    for name in NAMES:
        one, other = ours[name], theirs[name]
        assert isinstance(one, Answer)
        assert isinstance(other, Answer)
        assert same(one.update.tensors, other.update.tensors)
        assert (one.update.metrics, one.bytes_up) == (other.update.metrics, other.bytes_up)
        (_, kept), (_, kept_too) = (engine.participants[name].store.before(2) for engine in (alone, spread))
        assert kept
        assert same(kept, kept_too)
    measured = [list(engine.evaluate(1, engines.shared, "held_out", NAMES)) for engine in (alone, spread)]
    assert measured[0] == measured[1]


def test_a_run_of_workers_is_the_same_run(recipe: Path, tmp_path: Path) -> None:
    one, two = (load(recipe, {"federation.workers": n}) for n in (1, 2))
    assert one.id == two.id
    folders = [run(asked, tmp_path / f"{asked.federation.workers}").folder for asked in (one, two)]
    left = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")} for folder in folders
    ]
    assert left[0] == left[1]
    assert len(left[0]) > 3


class Failing(Ditto):
    """At rome."""

    def local_round(self, round: int, site: Site, shared: Shared, private: Private) -> tuple[Update, Private]:
        if site.name == "rome":
            self.fail()
        logging.getLogger("fedloom.test").warning("%s has %s examples", site.name, len(site))
        return super().local_round(round, site, shared, private)

    def fail(self) -> None:
        raise TrainingError("the loss is nan")


class Mistaken(Failing):
    def fail(self) -> None:
        raise KeyError("a mistake of the method's")


class Ended(Failing):
    def fail(self) -> None:
        os._exit(9)


class Sleeping(Failing):
    def fail(self) -> None:
        (Path(os.environ["TMP_OF_TEST"]) / "pid").write_text(str(os.getpid()))
        time.sleep(600)


def test_a_site_that_fails_is_silent_and_what_sites_log_is_logged_here(
    engines: Engines, caplog: pytest.LogCaptureFixture
) -> None:
    found = list(engines(2, Failing(LoRA(rank=2))).round(0, engines.shared, NAMES))
    assert [type(reply) for reply in found] == [Answer, Silence, Answer]
    assert found[1] == Silence("rome", "the loss is nan")
    assert [r.message for r in caplog.records] == ["oslo has 4 examples", "kyiv has 3 examples"]


def test_an_error_of_a_method_names_its_site(engines: Engines) -> None:
    with pytest.raises(KeyError) as error:
        list(engines(2, Mistaken(LoRA(rank=2))).round(0, engines.shared, NAMES))
    assert error.value.__notes__[0] == "at site 'rome', round 1"
    assert "in fail" in error.value.__notes__[1]


def test_a_worker_that_is_gone_is_an_error(engines: Engines) -> None:
    with pytest.raises(RunError, match=r"lower \[federation\] workers"):
        list(engines(2, Ended(LoRA(rank=2))).round(0, engines.shared, NAMES))


def test_no_worker_outlives_a_run_that_is_killed(
    engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMP_OF_TEST", str(tmp_path))
    engine = engines(3, Sleeping(LoRA(rank=2)))

    def work() -> None:
        list(engine.round(0, engines.shared, NAMES))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    pid = tmp_path / "pid"
    until(lambda: pid.exists() and bool(pid.read_text()))
    process.kill()
    process.join()
    until(lambda: not alive(int(pid.read_text())))


def test_workers_end_with_their_engine(engines: Engines) -> None:
    before = {*multiprocessing.active_children()}
    engine = engines(2)
    list(engine.round(0, engines.shared, NAMES))
    assert len({*multiprocessing.active_children()} - before) == 2
    del engine
    until(lambda: {*multiprocessing.active_children()} <= before)


def alive(pid: int) -> bool:
    """Whether it runs: not so where it waits, ended, for a parent to look."""
    status = Path(f"/proc/{pid}/stat")
    if Path("/proc/self").exists():
        return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def until(held: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not held():
        assert time.monotonic() < end
        time.sleep(0.05)
