"""The benchmark's arithmetic and its command; how fast anything is, no test says."""

import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedloom import bench
from fedloom.assembly import ATTENTION
from fedloom.bench.lines import Line, Measured, table
from fedloom.bench.measuring import interleaved

ROOT = Path(__file__).parents[1]
FASTER = Line("a", "a step", 2.0, "ms", "a peer", 6.0, goal=2.5, floor=1.5)
SMALLER = Line("b", "a site", 1.0, "MB", "its bytes", 4.0, goal=0.2, at_most=True)
ALONE = Line("c", "a client", 1.2, "ms", goal=1.5, at_most=True)


def test_ratios_and_goals() -> None:
    assert (FASTER.ratio, FASTER.attainable, FASTER.met) == (3.0, 4.0, True)
    assert (SMALLER.ratio, SMALLER.attainable, SMALLER.met) == (0.25, None, False)
    assert (ALONE.ratio, ALONE.met) == (1.2, True)
    assert Line("d", "no goal", 1.0, "ms", "a peer", 1.0).met is None


def test_what_is_written_is_read_again_and_printed() -> None:
    measured = Measured(
        (FASTER, SMALLER, ALONE), ("x was left out.",), "fedloom bench", {"commit": "abc", "machine": "m"}
    )
    assert Measured.of(measured.json()) == measured
    head, first, *_ = table(measured.lines)
    assert head.split()[:4] == ["workload", "against", "own", "peer"]
    assert "≥ 2.5" in first
    assert first.endswith("met")


def test_variants_run_in_turn_and_once_before() -> None:
    ran: list[str] = []
    now = iter(range(100))
    took = interleaved({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, 3, lambda: next(now))
    assert ran == ["a", "b"] * 4
    assert {timing.minimum for timing in took.values()} == {1}


def test_a_missing_peer_is_one_sentence_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def needs(size: str, repeats: int) -> object:
        import flwr

        yield flwr

    monkeypatch.setitem(sys.modules, "flwr", None)
    monkeypatch.setattr(bench, "WORKLOADS", {"null-round": needs, "own": lambda size, repeats: iter([FASTER])})
    found = bench.bench(bench.Options(("null-round", "own"), ("small",)), lambda event: None)
    assert found.lines == (FASTER,)
    assert found.left_out == ("null-round needs Flower, which is not installed: pip install 'fedloom[bench]'.",)


def test_the_command_names_its_workloads(fedloom: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, out, _ = fedloom("bench", "--list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(bench.WORKLOADS)
    code, _, err = fedloom("bench", "lora-stp")
    assert code == 2
    assert "did you mean 'lora-step'" in err
    assert fedloom("bench", "--size", "huge")[0] == 2


def test_auto_is_the_attention_that_was_measured_quicker(tmp_path: Path) -> None:
    publish = runpy.run_path(str(ROOT / "benchmarks" / "publish_bench.py"))
    measured = ROOT / "benchmarks" / "results" / "bench" / "attention-base.json"
    assert publish["quicker"](measured) == dict(ATTENTION)
    slower = replace(FASTER, what="LoRA step, a model, float32, sdpa, batch 8", own=7.0)
    (tmp_path / "slower.json").write_text(Measured((slower,), (), "fedloom bench attention", {}).json())
    assert publish["quicker"](tmp_path / "slower.json") == {"float32": "eager"}
