"""What a run shows while it goes on: plain lines in a log, one live line on a terminal, and every silence by name."""

import io
import logging
import re
from collections.abc import Mapping
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from fedloom.events import Began, Ended, Note, Replied, Watch
from fedloom.progress import watching
from fedloom.site import Answer, Silence, Update
from fedloom.tensors import Shared

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
LONG = "lung, mediastinum, pleura and whatever else is in there"


class Stream(io.StringIO):
    """A file that knows what had been written when it was flushed last."""

    flushed = ""

    def flush(self) -> None:
        self.flushed = self.getvalue()


def line(round: int, **sites: float | str | None) -> dict[str, Any]:
    """A line of rounds.jsonl: a site's held-out metric, or the reason of its silence."""
    rows: dict[str, Mapping[str, Any]] = {
        name: {"answered": False, "reason": x, "task": "accuracy", "metric": None}
        if isinstance(x, str)
        else {"answered": True, "task": "accuracy", "metric": x}
        for name, x in sites.items()
    }
    return {"round": round, "seconds": 12.4, "sites": rows}


def answer(name: str) -> Answer:
    return Answer(name, Update(Shared({}), 1.0, 5))


def a_stage(watch: Watch, stage: str = "fedavg", rounds: int = 2) -> None:
    watch(Began(stage, 0, rounds, 2))
    for round in range(rounds):
        watch(Replied(stage, round, answer("a")))
        watch(Replied(stage, round, answer(LONG)))
        watch(Ended(stage, line(round, a=0.4, b=0.424)))


def plain() -> tuple[Console, Stream]:
    stream = Stream()
    return Console(file=stream, force_terminal=False), stream


def terminal(width: int = 80) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=True, width=width, _environ={"TERM": "xterm"}), stream


def shown(stream: io.StringIO) -> list[str]:
    """Every line that stood on the terminal at some time, without colours."""
    return re.split(r"[\r\n]+", ESCAPE.sub("", stream.getvalue()))


def test_plain_lines_are_one_a_round() -> None:
    console, stream = plain()
    with watching(console) as watch:
        a_stage(watch)
    assert stream.getvalue().splitlines() == [
        "fedavg: 2 sites, 2 rounds",
        "round 1/2  2 of 2 sites  held-out 41.2 %  12 s",
        "round 2/2  2 of 2 sites  held-out 41.2 %  12 s",
    ]


def test_plain_lines_are_flushed_as_they_come() -> None:
    console, stream = plain()
    with watching(console) as watch:
        watch(Note("two images are left out"))
        assert stream.flushed == "two images are left out\n"


def test_a_line_is_never_wrapped_in_a_log() -> None:
    console, stream = plain()
    with watching(console) as watch:
        watch(Note("word " * 60 + "end"))
    assert len(stream.getvalue().splitlines()) == 1


@pytest.mark.parametrize("make", [plain, terminal])
def test_who_is_silent_is_named_with_the_reason(make: Any) -> None:
    console, stream = make()
    with watching(console) as watch:
        watch(Began("fedavg", 0, 3, 2))
        watch(Replied("fedavg", 0, Silence("b", "no answer in 600 s")))
        watch(Ended("fedavg", line(0, a=0.5, b="no answer in 600 s")))
    assert "round 1/3  b is silent: no answer in 600 s\n" in ESCAPE.sub("", stream.getvalue())


def test_what_a_site_sends_cannot_steer_a_log() -> None:
    console, stream = plain()
    with watching(console) as watch:
        watch(Began("fedavg", 0, 1, 1))
        watch(Ended("fedavg", line(0, a="bad\x1b[2J\r\nround 9/9 [bold]")))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", stream.getvalue())
    assert len(stream.getvalue().splitlines()) == 3
    assert "[bold]" in stream.getvalue()


def test_a_round_that_was_not_evaluated_has_no_held_out_number() -> None:
    console, stream = plain()
    with watching(console) as watch:
        watch(Began("fedavg", 0, 1, 2))
        watch(Ended("fedavg", line(0, a=None, b="gone")))
    assert stream.getvalue().splitlines()[-1] == "round 1/1  1 of 2 sites  12 s"


def test_unlike_metrics_are_in_no_mean_together() -> None:
    console, stream = plain()
    both = line(0, a=0.4, b=0.6, c=0.1)
    both["sites"]["c"]["task"] = "labels"
    with watching(console) as watch:
        watch(Began("fedavg", 0, 1, 3))
        watch(Ended("fedavg", both))
    assert "  held-out accuracy 50.0 %, labels 10.0 %  " in stream.getvalue()


def test_going_on_and_being_done_are_said() -> None:
    console, stream = plain()
    with watching(console) as watch:
        watch(Began("fedavg", 3, 10, 5))
        watch(Began("local-only", 10, 10, 5))
    assert stream.getvalue().splitlines() == [
        "fedavg: 5 sites, going on with round 4 of 10 rounds",
        "local-only: 5 sites, 10 rounds done before",
    ]


def test_warnings_of_the_library_are_lines_while_a_run_is_watched() -> None:
    console, stream = plain()
    with watching(console):
        logging.getLogger("fedloom.store").warning("'%s' is damaged", "000003.safetensors")
        logging.getLogger("fedloom.store").info("not this")
    logging.getLogger("fedloom.store").warning("nor what comes later")
    assert stream.getvalue() == "'000003.safetensors' is damaged\n"


@pytest.mark.parametrize("make", [plain, terminal])
def test_an_error_passes_and_leaves_nothing_behind(make: Any) -> None:
    handlers = list(logging.getLogger("fedloom").handlers)
    console, stream = make()

    def stopped() -> None:
        with watching(console) as watch:
            watch(Began("fedavg", 0, 10, 2))
            watch(Ended("fedavg", line(0, a=0.5, b=0.5)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert logging.getLogger("fedloom").handlers == handlers
    assert "1/10" in [text for text in shown(stream) if text.strip()][-1]  # where it stopped


@pytest.mark.parametrize("width", [80, 60, 200])
def test_a_live_line_fits_and_its_stages_stay(width: int) -> None:
    console, stream = terminal(width)
    with watching(console) as watch:
        a_stage(watch, "a method whose name is rather long", rounds=12)
        a_stage(watch, "local-only", rounds=12)
    assert max(map(cell_len, shown(stream))) <= width
    text = " ".join(ESCAPE.sub("", stream.getvalue()).split())
    assert "a method whose name is rather long 12/12 rounds held-out 41.2 %" in text
    assert "local-only 12/12 rounds held-out 41.2 %" in text


def test_a_note_comes_after_the_stage_that_ended_before_it() -> None:
    console, stream = terminal()
    with watching(console) as watch:
        a_stage(watch)
        watch(Note("the next row"))
    kept = [text for text in shown(stream) if text.startswith(("fedavg  2/2 rounds  held-out 41.2 %", "the next row"))]
    assert kept[-1].strip() == "the next row"
    assert len(kept) == 2


def test_a_live_line_says_who_answered_what_was_reached_and_what_is_left() -> None:
    console, stream = terminal()
    with watching(console) as watch:
        watch(Began("fedavg", 0, 10, 2))
        watch(Replied("fedavg", 0, answer("oxford")))
        watch.progress.refresh()  # type: ignore[attr-defined]  # as its clock does four times a second
        watch(Ended("fedavg", line(0, oxford=0.5)))
        watch.progress.refresh()  # type: ignore[attr-defined]
    first, later = [text for text in shown(stream) if "oxford" in text and "left" in text][-2:]
    assert "0/10" in first
    assert "1/10" in later
    assert "held-out 50.0 %" in later


def test_before_the_first_stage_a_terminal_shows_that_something_goes_on() -> None:
    console, stream = terminal(80)
    with watching(console) as watch:
        watch.progress.refresh()  # type: ignore[attr-defined]
        assert "working" in stream.getvalue()
        before = len(stream.getvalue())
        a_stage(watch)
    assert "working" not in stream.getvalue()[before:]


def test_replies_alone_end_no_round() -> None:
    console, stream = terminal()
    with watching(console) as watch:
        watch(Began("fedavg", 0, 10, 2))
        for name in ("a", "b", "a"):  # one asked again
            watch(Replied("fedavg", 0, answer(name)))
    assert [text for text in shown(stream) if text.startswith("fedavg  0/10 rounds")]
