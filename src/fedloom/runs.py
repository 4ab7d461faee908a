"""Running a recipe, and the folder that a run leaves.

    recipe.toml    the recipe as it was run, every default and the numerical plan written out
    rounds.jsonl   a line a round            summary.json   the result            report.html   the same, to look at
    server/        checkpoints               sites/NAME/    private states        references/   what it is compared with

A run that was stopped goes on with `resume`, and ends with the same bits as one that was not.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedloom import __version__
from fedloom.answers import Answers, Measured, asked, by_value, measure, ranked, readable
from fedloom.assembly import Federation, assemble, planned, site_folder
from fedloom.data import Dataset, Pixels
from fedloom.engines.local import Participant
from fedloom.errors import RunError
from fedloom.events import Note, Watch
from fedloom.federation import own_state, predict
from fedloom.lineage import lineage, peak
from fedloom.methods import METHODS, Local, Method, Pooled
from fedloom.recipe import Recipe, load
from fedloom.report import write_report
from fedloom.rounds import arrived, lines_of, newcomers, summary_of, totals, train
from fedloom.store import Store, holds_anything, write
from fedloom.tensors import Private, Shared
from fedloom.tested import Answered
from fedloom.tracking import tracked
from fedloom.views import left_out, own_tests, views

WRITTEN = "# As run by fedloom"  # how the recipe of a run begins, and no other
MAY_CHANGE = frozenset({"federation.rounds"})  # on resume, upwards


@dataclass(frozen=True)
class Run:
    """A run folder."""

    folder: Path
    round: int | None = None  # what it left is looked at, counted from one; None: what the last left, and fine-tuning
    device: str | None = None  # where its backbone computes; None: where it was trained

    @cached_property
    def recipe(self) -> Recipe:
        if not (self.folder / "recipe.toml").is_file():
            raise RunError(f"'{self.folder}' is not a run folder: it has no recipe.toml.")
        return load(self.folder / "recipe.toml")

    @property
    def finished(self) -> bool:
        """Whether there is a summary, and of as many rounds as the recipe now asks for."""
        summary = summary_of(self.folder)
        return summary is not None and summary["rounds"] == self.recipe.federation.rounds

    @cached_property
    def summary(self) -> dict[str, Any]:
        summary = summary_of(self.folder)
        if summary is None or not self.finished:
            raise RunError(f"the run in '{self.folder}' is not finished; go on with it: --resume.")
        return summary

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """The lines of rounds.jsonl."""
        return lines_of(self.folder)

    @cached_property
    def federation(self) -> Federation:
        return assemble(self.recipe if self.device is None else self.recipe.altered({"backbone.device": self.device}))

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.federation.participants)

    @property
    def last(self) -> int:
        """The round whose result is looked at, counted from one."""
        return self._last[0] + 1

    @property
    def shared(self) -> Shared:
        return self._last[1]

    def private(self, site: str) -> Private:
        """What a site holds after the last round that ended; of a finished run, fine-tuned where the recipe says so.

        A newcomer holds what it makes of the shared adapter of that round. Raises RunError where it is lost.
        """
        own, store = self.participant(site), Store(site_folder(self.folder, site))
        personal = store.personal() if self.finished and self.round is None else None
        if personal is None and site in self.federation.newcomers:
            return arrived(self.federation.method, own, self.shared)
        if personal is not None:
            return own_state(personal)
        kept, state = store.before(self.last)
        answered = [line["round"] for line in self.rounds[: self.last] if line["sites"].get(site, {}).get("answered")]
        tuned = self.finished and self.round is None and self.recipe.training.finetune > 0
        if tuned or (answered and kept < answered[-1]):
            raise RunError(
                f"what site '{site}' held after round {self.last} is missing or damaged in '{store.folder}'; put it "
                "back from a copy, or run the recipe again into another folder (--out)."
            )
        return own_state(state)

    @cached_property
    def _last(self) -> tuple[int, Shared]:
        checkpoints, rounds = Store(self.folder / "server"), self.recipe.federation.rounds
        last, tensors = checkpoints.before(rounds if self.round is None else self.round)
        if last < 0 and self.round is None:
            why = "no checkpoint that can be read" if holds_anything(checkpoints.folder) else "no round yet"
            raise RunError(f"the run in '{self.folder}' has {why}; go on with it: --resume.")
        if self.round is not None and last != self.round - 1:
            kept = ", ".join(str(number + 1) for number in checkpoints.rounds()) or "none"
            raise RunError(
                f"the run in '{self.folder}' no longer has, or never had, what round {self.round} left; it has rounds "
                f"{kept} ([federation] keep says how many)."
            )
        return last, Shared(tensors)

    def evaluate(self, split: str = "test", site: str | None = None) -> dict[str, dict[str, float]]:
        """The metrics of what each site serves (or one does), on its own split; none where it has no example."""
        return {name: dict(row.metrics) for name, row in self.measure(split, site).items()}

    def measure(self, split: str = "test", site: str | None = None, by: str | None = None) -> dict[str, Measured]:
        """As `evaluate`, with what the metrics leave out; `by` a column of the source, a row for each of its values."""
        privates = {name: self.private(name) for name in (self.sites if site is None else (site,))}
        datasets = {name: self.participant(name).split(split) for name in privates}
        datasets = {name: dataset for name, dataset in datasets.items() if len(dataset)}
        parts = {name: {"": list(range(len(dataset)))} for name, dataset in datasets.items()}
        found = {}
        for name, values in (parts if by is None else by_value(datasets, by)).items():
            own, dataset = self.participant(name).site, datasets[name]
            logits = predict(self.federation.method, own, privates[name], self.shared, dataset)
            for value, rows in values.items():
                part = f"{name}, {value}" if value else name
                found[part] = measure(own.task, logits[rows], dataset[rows].examples)
        return found

    def predict(
        self, site: str, image: Path | None = None, text: str | None = None, question: str | None = None
    ) -> Answers:
        """What a site answers for one image, with its text or question where the task has one, or for one text."""
        (answers,) = self._answers(site, self._asked(site, [] if image is None else [image], text, question))
        return answers

    def answers(
        self, site: str, images: Sequence[Path], text: str | None = None, question: str | None = None
    ) -> dict[Path, Answers]:
        """As `predict`, for each of these images that can be read; the others are warned of."""
        dataset = readable(self._asked(site, images, text, question))
        return dict(zip((Path(str(row.image)) for row in dataset.examples), self._answers(site, dataset), strict=True))

    def _asked(self, site: str, images: Sequence[Path], text: str | None, question: str | None) -> Dataset:
        pixels = Pixels(Path(), self.federation.model.network.decode, "skip")
        return asked(self.participant(site), pixels, images, {"question": question, "text": text})

    def _answers(self, site: str, dataset: Dataset) -> list[Answers]:
        own = self.participant(site).site
        return ranked(own.task, predict(self.federation.method, own, self.private(site), self.shared, dataset))

    def participant(self, site: str) -> Participant:
        """A site that took part, or a newcomer."""
        every = {**self.federation.participants, **self.federation.newcomers}
        if site not in every:
            raise RunError(f"there is no site '{site}' in '{self.folder}'; its sites are {list(every)}.")
        return every[site]


def run(recipe: Recipe | str | Path, out: str | Path, resume: bool = False, watch: Watch = lambda event: None) -> Run:
    """Run a recipe into a folder, or go on with a run that was stopped; `watch` sees what happens while it does.

    raises RunError: the folder is in the way, or holds the run of another recipe
    """
    recipe = planned(recipe if isinstance(recipe, Recipe) else load(recipe))
    folder = checked(Path(out), recipe, resume)
    done = Run(folder)
    if recipe.federation.engine != "local":
        raise RunError("fedloom.run is of one process; across sites it is `fedloom run --engine nvflare`.")
    if done.finished and done.recipe.federation.rounds == recipe.federation.rounds:
        write_report(folder)  # a kill may have come before it
        return done
    with tracked(recipe, folder, watch) as told:
        federation = assemble(recipe)
        # Only now: what cannot be read leaves no run behind.
        write(folder / "recipe.toml", f"{WRITTEN} {__version__}\n{recipe.dump()}".encode())
        result = _measured(recipe, federation, folder, told)
    return ended(folder, recipe, result)


def _measured(recipe: Recipe, federation: Federation, folder: Path, watch: Watch) -> dict[str, Any]:
    for reason in federation.skipped:
        watch(Note(reason))
    shared, privates = train(recipe.method_name, recipe.method, federation, folder, watch)
    privates |= newcomers(recipe.method, federation, shared, folder)
    answered = own_tests(federation, recipe.method, shared, privates)
    return {
        "views": views(federation, recipe.method, shared, privates, answered),
        "references": dict(_references(federation, folder, watch, answered)),
        "left_out": left_out(federation),
        "details": {name: said.details() for name, said in answered.items()},
        "lineage": lineage(federation),
        "memory": peak(),
        "skipped_images": len(federation.skipped),
    }


def ended(folder: Path, recipe: Recipe, result: Mapping[str, Any]) -> Run:
    """The run in a folder whose rounds are all there, with its summary and its report.

    result: of the summary, what has to be measured: views, references, left_out, skipped_images
    """
    summary = {
        "fedloom": __version__,
        "recipe": recipe.id,
        "method": recipe.method_name,
        "seed": recipe.federation.seed,
        "rounds": recipe.federation.rounds,
        **result,
        **totals(lines_of(folder)),
    }
    write(folder / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    write_report(folder)
    return Run(folder)


def checked(folder: Path, recipe: Recipe, resume: bool) -> Path:
    """The folder, if a run of this recipe may begin in it, or with `resume` go on.

    raises RunError: it is in the way, or holds the run of another recipe
    """
    written = folder / "recipe.toml"
    if folder.exists() and not folder.is_dir():
        raise RunError(f"'{folder}' is a file; name a folder with --out.")
    if written.is_file() and (folder / "rounds.jsonl").is_file():
        if not resume:
            raise RunError(f"'{folder}' holds a run already; go on with it (--resume) or name another folder (--out).")
        before = load(written)
        if changed := [key for key in recipe.difference(before) if key not in MAY_CHANGE]:
            raise RunError(
                f"the run in '{folder}' was of another recipe: {', '.join(changed)} changed. "
                "Set it back, or name another folder (--out)."
            )
        if recipe.federation.rounds < before.federation.rounds:
            raise RunError(
                f"the run in '{folder}' was of {before.federation.rounds} rounds, not of {recipe.federation.rounds}; "
                "on --resume rounds may only grow."
            )
    elif holds_anything(folder) and not (written.is_file() and written.read_text().startswith(WRITTEN)):
        raise RunError(f"'{folder}' is not empty and is no run; name another folder with --out.")
    return folder


def _references(
    federation: Federation, folder: Path, watch: Watch, answered: Mapping[str, Answered]
) -> Iterator[tuple[str, Any]]:
    """What the method is compared with, and the interval of each site's `gain` over it.

    majority: the most frequent training answer of each site, always
    frozen:   the backbone as it came, with a head fitted to it where the task has one
    local:    every site by itself, with the same adapter and as many epochs
    pooled:   the same adapter, trained on the data of all sites at one place, which no federation may do
    """
    adapter = federation.method.adapter
    for name in federation.recipe.reference.rows:
        method: Method
        if name in ("local", "pooled"):
            method = Local(adapter) if name == "local" else Pooled(adapter, federation.method.heads)
            stage = "local-only" if name == "local" else "pooled"
            beneath = folder / "references" / name
            shared, privates = train(stage, method, federation, beneath, watch)
            privates |= newcomers(method, federation, shared, beneath)
        else:
            method = METHODS[name]()
            shared, sites = Shared({}), {**federation.participants, **federation.newcomers}.items()
            privates = {site: method.personalise(own.site, shared, Private({}), 1) for site, own in sites}
        beside = own_tests(federation, method, shared, privates)
        found = views(federation, method, shared, privates, beside)
        for site, row in ((found["personal"] or {}).get("sites") or {}).items():
            row["gain"] = answered[site].gain(beside[site])
        yield name, found
