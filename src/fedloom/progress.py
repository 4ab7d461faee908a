"""What a run shows while it goes on: a live line on a terminal, and plain lines, one a round, everywhere else."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

from fedloom.events import Began, Ended, Event, Note, Replied, Watch
from fedloom.report.figures import counted, duration, one_line, percent
from fedloom.report.result import held_out_means
from fedloom.site import Silence


@contextmanager
def watching(console: Console | None = None) -> Iterator[Watch]:
    """A `watch` for `fedloom.run.run` that prints; while the context is open, so are the library's warnings."""
    console = console or Console()
    handler, logger = _Lines(console), logging.getLogger("fedloom")
    logger.addHandler(handler)
    try:
        if console.is_terminal and not console.is_dumb_terminal:
            live = _Live(console)
            with live.progress:
                try:
                    yield live
                finally:
                    live.settle()
        else:
            yield _Plain(console)
    finally:
        logger.removeHandler(handler)


class _Plain:
    """A line for everything that the reader of a log wants to know."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.rounds = 0

    def __call__(self, event: Event) -> None:
        match event:
            case Note(text):
                _say(self.console, text)
            case Began():
                self.rounds = event.rounds
                _say(self.console, f"{event.stage}: {counted(event.sites, 'site')}, {_ahead(event)}")
            case Ended():
                _name_the_silent(self.console, event, self.rounds)
                rows, reached = event.line["sites"].values(), _held_out(event)
                parts = [
                    f"round {event.line['round'] + 1}/{self.rounds}",
                    f"{sum(row['answered'] for row in rows)} of {counted(len(rows), 'site')}",
                    *([reached] if reached else []),
                    duration(event.line["seconds"]),
                ]
                _say(self.console, "  ".join(parts))


class _Live:
    """One line a stage: how far it is, what it has reached, how long it will take, who just answered."""

    def __init__(self, console: Console) -> None:
        self.console = console
        fields = ("description", "fields[at]", "fields[reached]", "fields[left]", "fields[site]")
        widths = (14, None, None, None, 20)
        stage, *rest = (
            TextColumn(f"{{task.{name}}}", markup=False, table_column=Column(max_width=width, no_wrap=True))
            for name, width in zip(fields, widths, strict=True)
        )
        bar = BarColumn(bar_width=None)
        self.progress = Progress(stage, bar, *rest, console=console, expand=True, transient=True, refresh_per_second=4)
        self.stage: Began | None = None
        # Until the first stage begins: data are read, and a backbone is loaded.
        blank: Any = dict.fromkeys(("at", "reached", "left", "site"), "")
        self.task = self.progress.add_task("working", total=None, **blank)
        self.started, self.done = 0.0, 0.0  # seconds; rounds, with the part of the one that goes on
        self.reached, self.site = "", ""

    def __call__(self, event: Event) -> None:
        match event:
            case Note(text):
                if self.stage is not None and self.done == self.stage.rounds:
                    self.settle()  # what is noted is of what comes next
                _say(self.console, text)
            case Began():
                self.settle()
                self.stage, self.started, self.done = event, time.monotonic(), event.first
                self.reached, self.site = "", ""
                self.task = self.progress.add_task(one_line(event.stage), total=event.rounds, **self._fields(event))
                self.show(event)
            case Replied() if self.stage is not None:
                silent = "silent: " if isinstance(event.reply, Silence) else ""
                self.site = silent + one_line(event.reply.site)
                self.done = min(self.done + 1 / self.stage.sites, event.round + 0.99)  # all sites; it has not ended
                self.show(self.stage)
            case Ended() if self.stage is not None:
                _name_the_silent(self.console, event, self.stage.rounds)
                self.reached = _held_out(event) or self.reached
                self.done = event.line["round"] + 1
                self.show(self.stage)

    def settle(self) -> None:
        """The stage is over, or the run is stopped: its line no longer moves, and stays."""
        if self.progress.tasks:
            self.progress.remove_task(self.task)
            self.progress.refresh()  # or the next print would show it once more
        if self.stage is not None:
            fields, spent = self._fields(self.stage), duration(time.monotonic() - self.started)
            parts = (self.stage.stage, f"{fields['at']} rounds", self.reached, spent)
            _say(self.console, "  ".join(part for part in parts if part))
            self.stage = None

    def show(self, stage: Began) -> None:
        self.progress.update(self.task, completed=self.done)
        self.progress.tasks[0].fields.update(self._fields(stage))

    def _fields(self, stage: Began) -> dict[str, Any]:
        spent, done, ahead = time.monotonic() - self.started, self.done - stage.first, stage.rounds - self.done
        left = f"{duration(spent / done * ahead)} left" if done and ahead else "" if ahead else "measuring"
        site = self.site if ahead else ""
        return {"at": f"{int(self.done)}/{stage.rounds}", "reached": self.reached, "left": left, "site": site}


class _Lines(logging.Handler):
    """What the library warns of, as a line among the others."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        _say(self.console, record.getMessage(), "yellow")


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(Text(one_line(text), style=style), soft_wrap=not console.is_terminal)


def _name_the_silent(console: Console, event: Ended, rounds: int) -> None:
    for name, row in event.line["sites"].items():
        if not row["answered"]:
            _say(console, f"round {event.line['round'] + 1}/{rounds}  {name} is silent: {row['reason']}", "red")


def _ahead(stage: Began) -> str:
    if stage.first == stage.rounds:
        return f"{counted(stage.rounds, 'round')} done before"
    rounds = counted(stage.rounds, "round")
    return f"going on with round {stage.first + 1} of {rounds}" if stage.first else rounds


def _held_out(event: Ended) -> str:
    """The mean over the sites that were evaluated, one a task; empty where none was."""
    means = held_out_means(event.line)
    said = (
        f"{one_line(task)} {percent(mean)} %" if len(means) > 1 else f"{percent(mean)} %"
        for task, mean in means.items()
    )
    return f"held-out {', '.join(said)}" if means else ""
