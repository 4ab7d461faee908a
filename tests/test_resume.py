"""Same seed, same bits: for two runs, for one that was killed over and over, for one that was given more rounds."""

import hashlib
import json
import multiprocessing
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load

from fedloom.events import Ended, Event
from fedloom.recipe import load as load_recipe
from fedloom.runs import Run, run
from fedloom.store import Store

KILLS = 20
Bits = dict[str, Any]
Fedloom = Callable[..., tuple[int, str, str]]


def contents(folder: Path) -> Bits:
    """All that a run left, but for what tells how long it took."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    found: Bits = {}
    for name, path in files.items():
        if name.endswith("rounds.jsonl"):
            found[name] = [{**json.loads(line), "seconds": 0} for line in path.read_text().splitlines()]
        elif name == "summary.json":
            found[name] = {**json.loads(path.read_text()), "seconds": 0, "memory": 0}
        else:
            found[name] = "" if name == "report.html" else path.read_bytes()
    return found


def assert_nothing_is_half_written(folder: Path) -> None:
    """Every file of a final name is whole."""
    for path in folder.rglob("*"):
        if path.suffix == ".safetensors":
            content = path.read_bytes()
            assert hashlib.sha256(content).hexdigest().startswith(path.stem.partition("-")[2])
            load(content)
        elif path.suffix in (".json", ".jsonl"):
            for document in [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines():
                json.loads(document)
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>")


@pytest.fixture
def plain(recipe: Path, tmp_path: Path) -> Run:
    """A run of two rounds that nothing disturbed."""
    return run(recipe, tmp_path / "plain")


@pytest.fixture
def longer(recipe: Path) -> Path:
    """The same recipe with four rounds."""
    path = recipe.with_name("longer.toml")
    path.write_text(recipe.read_text().replace("rounds = 2", "rounds = 4"))
    return path


def test_two_runs_of_one_seed_are_equal_to_the_bit(plain: Run, recipe: Path, tmp_path: Path) -> None:
    assert contents(run(recipe, tmp_path / "again").folder) == contents(plain.folder)


def test_another_seed_ends_elsewhere(plain: Run, recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(recipe.read_text() + "seed = 1\n")
    other = run(recipe, tmp_path / "other")
    assert {name for name in contents(other.folder) if name.startswith("server/")} != {
        name for name in contents(plain.folder) if name.startswith("server/")
    }


@pytest.mark.slow
def test_a_run_that_is_killed_over_and_over_ends_with_the_same_bits(longer: Path, tmp_path: Path) -> None:
    # Children are forked from a process that has everything imported and has computed nothing.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["fedloom.runs", "transformers.models.clip.modeling_clip"])

    def begun(folder: Path) -> Any:
        process = processes.Process(target=run, args=(longer, folder, True))
        process.start()
        return process

    begun(tmp_path / "warm-up").join()
    start = time.perf_counter()
    begun(tmp_path / "plain").join()
    usual = time.perf_counter() - start
    wanted = contents(tmp_path / "plain")
    rng = random.Random(0)
    kills, ended, folder = 0, 0, tmp_path / "killed-0"
    while kills < KILLS or not ended:
        process = begun(folder)
        process.join(timeout=rng.uniform(0, 0.6 * usual) if kills < KILLS else None)
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
            assert_nothing_is_half_written(folder)
            continue
        assert process.exitcode == 0
        assert contents(folder) == wanted
        ended += 1
        folder = tmp_path / f"killed-{ended}"


def test_more_rounds_are_those_of_one_long_run(plain: Run, longer: Path, tmp_path: Path) -> None:
    whole = run(longer, tmp_path / "whole")
    assert plain.private("rome").keys() >= {"local/vision.0.q_proj/A"}  # fine-tuned at its end, which no round may see
    grown = run(longer, plain.folder, resume=True)
    assert contents(grown.folder) == contents(whole.folder)


def test_a_run_that_was_given_more_rounds_is_finished_only_after_them(
    plain: Run, longer: Path, fedloom: Fedloom
) -> None:
    tuned = plain.private("rome")
    stopped = Run(stopped_after(longer, plain.folder, rounds=1))
    assert not stopped.finished
    assert any(name.startswith("local/") for name in tuned)
    assert not any(name.startswith("local/") for name in stopped.private("rome"))
    code, _, err = fedloom("run", longer, "--out", plain.folder)
    assert code == 2
    assert "--resume" in err


def damage(path: Path) -> Path:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return path


def stopped_after(recipe: Path, folder: Path, rounds: int) -> Path:
    """The folder of a run that was stopped after so many more rounds."""
    seen: list[Event] = []

    def stop(event: Event) -> None:
        seen.append(event)
        if sum(isinstance(one, Ended) for one in seen) == rounds:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, folder, resume=True, watch=stop)
    return folder


@pytest.mark.parametrize("what", ["checkpoint", "checkpoints", "site", "missing site", "rounds.jsonl"])
def test_what_was_damaged_is_named_and_computed_again(
    longer: Path, tmp_path: Path, fedloom: Fedloom, what: str
) -> None:
    whole = run(longer, tmp_path / "whole")
    folder = stopped_after(longer, tmp_path / "stopped", rounds=3)
    newest = sorted((folder / "server").iterdir())
    rome = sorted((folder / "sites" / "rome").iterdir())[-1]
    named: list[Path] = []
    match what:
        case "checkpoint":
            named = [damage(newest[-1])]
        case "checkpoints":
            named = [damage(path) for path in newest]
        case "site":
            named = [damage(rome)]
        case "missing site":
            rome.unlink()
        case "rounds.jsonl":
            (folder / what).unlink()
    code, out, err = fedloom("run", longer, "--out", folder, "--resume")
    assert (code, err) == (0, "")
    assert all(f"'{path}' is damaged; going back to the state before it." in out for path in named)
    assert contents(folder) == contents(whole.folder)


def test_a_finished_run_is_served_from_what_is_whole_and_says_so(
    plain: Run, fedloom: Fedloom, caplog: pytest.LogCaptureFixture
) -> None:
    path = damage(sorted((plain.folder / "server").iterdir())[-1])
    assert fedloom("evaluate", plain.folder)[0] == 0
    assert f"'{path}' is damaged" in caplog.text
    assert Store(plain.folder / "server").before(9)[0] == 0


@pytest.mark.parametrize(("finetune", "lost"), [(1, "*"), (1, "personal-*"), (0, "*"), (0, "000001-*")])
def test_a_site_whose_state_is_lost_is_not_served_as_if_it_had_never_trained(
    finetune: int, lost: str, recipe: Path, tmp_path: Path, fedloom: Fedloom
) -> None:
    done = run(load_recipe(recipe, {"training.finetune": finetune, "reference.rows": []}), tmp_path / "run")
    assert fedloom("evaluate", done.folder)[0] == 0
    for path in (done.folder / "sites" / "rome").glob(lost):
        path.unlink()
    for command in (("evaluate", done.folder), ("export", done.folder, "--to", tmp_path / "to")):
        code, _, err = fedloom(*command)
        assert code == 2
        assert f"what site 'rome' held after round {done.last} is missing or damaged in " in err
    assert fedloom("evaluate", done.folder, "--site", "oslo")[0] == 0


@pytest.mark.parametrize("content", ["x", "[]", "{}"])
def test_a_damaged_summary_is_named_and_written_again(content: str, plain: Run, recipe: Path, fedloom: Fedloom) -> None:
    path = plain.folder / "summary.json"
    whole = path.read_bytes()
    path.write_text(content)
    for command in (("evaluate", plain.folder), ("run", recipe, "--out", plain.folder, "--resume")):
        code, _, err = fedloom(*command)
        assert (code, err) == (2, f"fedloom: '{path}' is damaged; remove it, and --resume writes it again.\n")
    path.unlink()
    run(recipe, plain.folder, resume=True)
    assert json.loads(path.read_text()).keys() == json.loads(whole).keys()
