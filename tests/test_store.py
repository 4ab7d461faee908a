"""State on disk: whole or not at all, damaged files passed over by name, rounds that can be asked again."""

import logging
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedloom import store as module
from fedloom.errors import StoreError
from fedloom.store import Store, write
from fedloom.tensors import to_bytes


def state(value: float) -> dict[str, Tensor]:
    return {"head/w": torch.full((3,), value), "opt/t": torch.tensor(value)}


def value(found: tuple[int, object]) -> tuple[int, float | None]:
    round, tensors = found
    return round, float(tensors["opt/t"]) if tensors else None  # type: ignore[index]


def test_what_was_kept_comes_back_to_the_bit(tmp_path: Path) -> None:
    store = Store(tmp_path / "site")
    assert store.before(5) == (-1, {})
    kept = {"a/x": torch.randn(3, 4).bfloat16().T, "a/y": torch.arange(5)}
    store.after(2, kept)
    round, found = store.before(3)
    assert round == 2
    assert all(torch.equal(found[name], tensor) and found[name].dtype is tensor.dtype for name, tensor in kept.items())


def test_a_round_reads_what_is_below_it_however_long_ago(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for round in (0, 1, 4):  # it sat out 2 and 3
        store.after(round, state(round))
    found = [value(store.before(round)) for round in range(6)]
    assert found == [(-1, None), (0, 0), (1, 1), (1, 1), (1, 1), (4, 4)]


def test_who_sat_out_for_long_finds_its_state_again_when_the_round_is_asked_again(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=2)
    store.after(1, state(1))
    store.after(50, state(50))
    assert value(store.before(50)) == (1, 1)


def test_a_round_asked_again_reads_the_same_and_drops_what_came_later(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for round in range(4):
        store.after(round, state(round))
    assert value(store.before(2)) == (1, 1)
    store.after(2, state(20))
    assert value(store.before(9)) == (2, 20)
    store.after(2, state(20))
    assert value(store.before(9)) == (2, 20)


@settings(max_examples=25)
@given(keep=st.integers(1, 5), rounds=st.lists(st.integers(0, 12), min_size=1, max_size=8, unique=True))
def test_it_keeps_the_newest(tmp_path_factory: pytest.TempPathFactory, keep: int, rounds: list[int]) -> None:
    store = Store(tmp_path_factory.mktemp("store"), keep)
    for round in sorted(rounds):
        store.after(round, state(round))
    assert value(store.before(99)) == (max(rounds), max(rounds))
    kept = {int(path.name.partition("-")[0]) for path in store.folder.glob("*.safetensors")}
    assert kept == set(sorted(rounds)[-keep:])
    assert store.size() == sum(path.stat().st_size for path in store.folder.iterdir())


def test_what_a_kill_kept_it_from_dropping_is_dropped_when_it_goes_on(tmp_path: Path) -> None:
    for round in range(6):
        Store(tmp_path, 9).after(round, state(round))
    Store(tmp_path, 2).trim(4)
    assert Store(tmp_path).rounds() == (3, 4)


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied"])
def test_a_damaged_file_is_named_and_passed_over(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path)
    store.after(0, state(0))
    store.after(1, state(1))
    (path,) = tmp_path.glob("000001-*")
    content = path.read_bytes()
    flipped = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
    path.write_bytes({"cut": content[:-4], "flipped": flipped, "emptied": b""}[damage])
    with caplog.at_level(logging.WARNING):
        assert value(store.before(2)) == (0, 0)
    assert path.name in caplog.text
    assert "damaged" in caplog.text
    store.after(1, state(1))  # the round is run again
    assert value(store.before(2)) == (1, 1)


def test_what_fine_tuning_left_is_apart_from_the_rounds(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.personal() is None
    store.after(3, state(3))
    store.personalised(state(30))
    store.personalised(state(31))
    assert value(store.before(99)) == (3, 3)
    personal = store.personal()
    assert personal is not None
    assert float(personal["opt/t"]) == 31
    assert len(list(tmp_path.iterdir())) == 2


def test_what_a_site_holds_is_its_newest_state(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=3)
    assert store.held() == 0
    for round, n in enumerate((300, 2, 70)):
        store.after(round, {"head/w": torch.zeros(n)})
    assert store.held() == len(to_bytes({"head/w": torch.zeros(70)}))
    store.personalised({"head/w": torch.zeros(9)})
    assert store.held() == len(to_bytes({"head/w": torch.zeros(9)}))


def test_a_kill_between_write_and_rename_leaves_the_old_file(tmp_path: Path) -> None:
    """A process that dies with its new file complete but not yet in place: the state before it is what is read."""
    Store(tmp_path).after(0, state(0))
    dying = textwrap.dedent(
        f"""
        import os, signal, torch
        from pathlib import Path
        from fedloom.store import Store
        Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        Store(Path({str(tmp_path)!r})).after(1, {{"opt/t": torch.tensor(1.0)}})
        """
    )
    killed = subprocess.run([sys.executable, "-c", dying], env={**os.environ, "PYTHONPATH": _source()}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2  # the partial file is there
    assert value(Store(tmp_path).before(9)) == (0, 0)
    Store(tmp_path).after(1, state(1))
    assert value(Store(tmp_path).before(9)) == (1, 1)


def _source() -> str:
    return str(Path(module.__file__).parents[1])


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_says_so(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    write(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os if step == "fsync" else Path, step, full)
    with pytest.raises(StoreError, match=r"cannot be written: No space left on device.*Free space there"):
        write(path, b"new")
    assert path.read_bytes() == b"old"


def test_the_content_is_on_the_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(Path, "replace", lambda self, to: (done.append("replace"), replace(self, to))[1])
    write(tmp_path / "x", b"new")
    assert done[:2] == ["fsync", "replace"]


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match=r"cannot be written: .*[a-z]\. Name another folder\.$"):
        Store(tmp_path / "file" / "site").after(0, state(0))


def test_an_empty_state_is_not_written_again_but_named_again(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=2)
    for round in range(4):
        store.after(round, {})
    assert store.rounds() == (2, 3)
    assert len({path.stat().st_ino for path in tmp_path.iterdir()}) == 1
    store.after(4, state(4))
    store.after(5, state(4))  # one that holds something is a file of its own: damage to one leaves the other
    assert store.rounds() == (4, 5)
    assert len({path.stat().st_ino for path in tmp_path.iterdir()}) == 2


def test_a_damaged_empty_state_is_not_named_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.after(0, {})
    (old,) = tmp_path.iterdir()
    old.write_bytes(b"")
    assert store.rounds() == ()
    store.after(1, {})
    assert store.rounds() == (1,)
    store.after(0, {})  # the round is run again
    assert store.rounds() == (0,)


def test_a_file_system_without_links_has_every_empty_state_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: Path, target: Path) -> None:
        raise PermissionError

    monkeypatch.setattr("os.link", link)
    store = Store(tmp_path)
    store.after(0, {})
    store.after(1, {})
    assert store.rounds() == (0, 1)
    assert len({path.stat().st_ino for path in tmp_path.iterdir()}) == 2
