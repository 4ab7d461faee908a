"""The laws that every method obeys, to be run on one's own method as on ours.

    check_method(MyMethod(beta=0.3))

It makes a federation of four tiny sites in memory, a CLIP of random weights among generated images, puts the method
through every law of `LAWS`, and raises `LawError` at the first that is broken. It takes a few seconds.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch

from fedloom.check.tiny import SEED, federation
from fedloom.check.watched import origins, watch
from fedloom.engines.local import LocalEngine, Participant
from fedloom.errors import LawError, UpdateError
from fedloom.federation import Schedule, admit, federate, visible
from fedloom.methods import Method
from fedloom.site import Answer, Site, Update
from fedloom.store import Store
from fedloom.tensors import Private, Shared, Tensors, mean

__all__ = ["LAWS", "check_method", "federation"]

NOT_SHARED = frozenset({"local", "opt", "wire"})  # first parts that stay at a site unless `sends` names them


@dataclass(frozen=True)
class Trial:
    """A method, and what came of its first round."""

    method: Method
    sites: tuple[Site, ...]

    @cached_property
    def shared(self) -> Shared:
        return start(self.method, self.sites)

    @cached_property
    def first(self) -> tuple[list[Answer], dict[str, Private]]:
        return self.round(0, self.shared, {}, self.sites)

    @cached_property
    def following(self) -> Shared:
        return self.method.aggregate(self.shared, self.first[0])[0]

    @cached_property
    def second(self) -> tuple[list[Answer], dict[str, Private]]:
        return self.round(1, self.following, self.first[1], self.sites)

    def round(
        self, round: int, shared: Shared, privates: Mapping[str, Private], sites: Iterable[Site]
    ) -> tuple[list[Answer], dict[str, Private]]:
        """What these sites answer, one after the other, and every site's private state after it."""
        answers, after = [], dict(privates)
        for site in sites:
            given = privates.get(site.name, Private({}))
            update, after[site.name] = self.method.local_round(round, site, visible(shared), given)
            answers.append(Answer(site.name, update))
        return answers, after


Law: TypeAlias = Callable[[Trial], Iterator[str]]  # yields what breaks it


def check_method(method: Method, sites: Sequence[Site] | None = None) -> None:
    """Put a method through every law.

    sites: another federation than `federation()`, for a method that needs another backbone or another task
    raises LawError: the first law that is broken, and what broke it
    """
    trial = Trial(method, tuple(sites or federation()))
    for law in LAWS:
        cause: Exception | None = None
        try:
            found = next(law(trial), None)
        except Exception as e:  # code that is not ours can fail in any way
            found, cause = f"{type(e).__name__}: {e}", e
        if found is not None:
            sentence = " ".join((law.__doc__ or "").split())
            raise LawError(f"{type(method).__name__} breaks a law. {sentence} Found: {found}") from cause


def frozen(trial: Trial) -> Iterator[str]:
    """A method is a frozen dataclass, equal to its copy."""
    method: Any = trial.method
    parameters = getattr(method, "__dataclass_params__", None)
    if parameters is None or not parameters.frozen:
        yield "it is no @dataclass(frozen=True)."
    elif replace(method) != method:
        yield "dataclasses.replace(method) is not equal to it: it compares by identity, or keeps state."


def without_server_state(trial: Trial) -> Iterator[str]:
    """A site works on `shared` without its server/ names, which never leave the server."""
    for answer in trial.first[0]:
        if sent := [name for name in answer.update.tensors if name.startswith("server/")]:
            yield f"site '{answer.site}' sent '{sent[0]}'."


def fitting(trial: Trial) -> Iterator[str]:
    """An update has the names, shapes and dtypes of `shared`, finite values and a weight."""
    for answers, shared in ((trial.first[0], trial.shared), (trial.second[0], trial.following)):
        yield from refused(answers, shared, trial.method)


def private(trial: Trial) -> Iterator[str]:
    """Nothing that was computed from a private tensor is in an update, except where `sends` says so, and except through
    a gradient."""
    watched = {site: Private(watch(tensors)) for site, tensors in trial.first[1].items()}
    for answer in trial.round(1, trial.following, watched, trial.sites)[0]:
        for name, tensor in answer.update.tensors.items():
            if leaked := sorted(origins([tensor]) - trial.method.sends):
                yield f"site '{answer.site}' sent '{name}', computed from '{leaked[0]}/' of its private state."


def names(trial: Trial) -> Iterator[str]:
    """A name is place/leaf. In `shared`, head/ follows `heads`, and local/, opt/ and wire/ follow `sends`; nothing
    private is named server/."""
    for tensors in (trial.shared, trial.following, *trial.first[1].values()):
        yield from (f"the name '{name}'." for name in tensors if not all(name.partition("/")))
    hidden = NOT_SHARED - trial.method.sends | ({"head"} if trial.method.heads == "private" else set())
    for shared in (trial.shared, trial.following):
        yield from (f"'{name}' in `shared`." for name in shared if _first(name) in hidden)
    for private in trial.first[1].values():
        yield from (f"'{name}' in `private`." for name in private if _first(name) == "server")


def inputs_left_alone(trial: Trial) -> Iterator[str]:
    """State goes in and comes out: no function writes into what it was given."""
    method, (answers, privates) = trial.method, trial.second
    shared = trial.following
    site, given = trial.sites[0], privates[trial.sites[0].name]
    sent = answers[0].update.tensors
    batch = site.batch(site.train, range(len(site)))
    calls: dict[str, Callable[[], object]] = {
        "local_round": lambda: method.local_round(2, site, visible(shared), given),
        "aggregate": lambda: method.aggregate(shared, answers),
        "personalise": lambda: method.personalise(site, visible(shared), given, 1),
        "serve": lambda: method.serve(site, visible(shared), given)(batch),
    }
    for name, call in calls.items():
        before = [{key: tensor.clone() for key, tensor in state.items()} for state in (shared, given, sent)]
        call()
        for state, old, new in zip(("shared", "private", "an update"), before, (shared, given, sent), strict=True):
            if changed := differing(old, new):
                yield f"{name} changed '{changed}' of {state}."


def retried(trial: Trial) -> Iterator[str]:
    """A round is a function of (round, shared, private, data, seed): asked again, a site gives the same bits."""
    again = trial.round(1, trial.following, trial.first[1], trial.sites)
    yield from _unlike(trial, trial.second, again, "a second time")
    for site in trial.sites:
        once, twice = (
            trial.method.personalise(site, visible(trial.following), trial.first[1][site.name], 1) for _ in range(2)
        )
        if changed := differing(once, twice):
            yield f"site '{site.name}' personalised to another '{changed}' the second time."


def any_order(trial: Trial) -> Iterator[str]:
    """The order in which sites work changes no bit, and the order in which answers are folded nothing above 1e-6."""
    again = trial.round(1, trial.following, trial.first[1], reversed(trial.sites))
    yield from _unlike(trial, trial.second, again, "when the sites worked in another order")
    folded, turned = (
        trial.method.aggregate(trial.following, answers)[0] for answers in (trial.second[0], trial.second[0][::-1])
    )
    if changed := differing(folded, turned, 1e-6):
        yield f"'{changed}' of `shared` depends on the order of the answers."


def mean_suffices(trial: Trial) -> Iterator[str]:
    """Where a method is not `individual`, the server needs only the weighted mean of the updates (to 1e-6)."""
    if trial.method.individual:
        return
    updates = [answer.update for answer in trial.second[0]]
    weight, examples = sum(update.weight for update in updates), sum(update.examples for update in updates)
    merged = Update(Shared(mean((update.tensors, update.weight) for update in updates)), weight, examples)
    each = trial.method.aggregate(trial.following, trial.second[0])[0]
    once = trial.method.aggregate(trial.following, [Answer("merged", merged)])[0]
    if changed := differing(each, once, 1e-6):
        yield f"'{changed}' of `shared` differs; set individual = True, or let a mean suffice."


def resumed(trial: Trial) -> Iterator[str]:
    """A run that is started afresh, or stopped and resumed from its files, ends with the same bits."""
    fresh: Any = trial.method
    with tempfile.TemporaryDirectory() as folder:
        kept = {site.name: Participant(site, Store(Path(folder) / site.name), site.held_out) for site in trial.sites}
        engine = LocalEngine(replace(fresh), kept)
        shared = start(engine.method, trial.sites)
        for rounds in (1, 2):
            (ended,) = federate(engine.method, engine, shared, Schedule(tuple(kept), rounds), rounds - 1)
            server = Store(Path(folder) / "server")
            server.after(rounds - 1, ended.shared)
            shared = Shared(server.before(rounds)[1])
        straight = trial.method.aggregate(trial.following, trial.second[0])[0]
        if changed := differing(straight, shared):
            yield f"'{changed}' of `shared`."
        for name, own in kept.items():
            if changed := differing(trial.second[1][name], own.store.before(2)[1]):
                yield f"'{changed}' of the private state of site '{name}'."


def finite(trial: Trial) -> Iterator[str]:
    """Every tensor and every metric is finite."""
    folded, metrics = trial.method.aggregate(trial.following, trial.second[0])
    for tensors in (folded, *trial.second[1].values()):
        yield from (f"'{name}'." for name, tensor in tensors.items() if not torch.isfinite(tensor).all())
    for figures in (metrics, *(answer.update.metrics for answer in trial.second[0])):
        yield from (f"the metric '{name}' is {x}." for name, x in figures.items() if not abs(float(x)) < float("inf"))


def serves_anyone(trial: Trial) -> Iterator[str]:
    """`serve` gives finite logits (n, labels) with whatever private state a site has, also with none."""
    for site in trial.sites:
        kept = trial.first[1][site.name]
        tuned = trial.method.personalise(site, visible(trial.following), kept, 1)
        for state, given in (("an empty", Private({})), ("its", kept), ("a personalised", tuned)):
            batch = site.batch(site.train, range(len(site)))
            logits = trial.method.serve(site, visible(trial.following), given)(batch)
            if logits.shape != (len(batch), len(site.task.labels)) or not torch.isfinite(logits).all():
                yield f"with {state} private state site '{site.name}' got {tuple(logits.shape)} or what is not finite."


def nothing_for_nothing(trial: Trial) -> Iterator[str]:
    """`personalise` of 0 epochs gives back the private state that it was given, also an empty one."""
    for site in trial.sites:
        for given in (trial.first[1][site.name], Private({})):
            if changed := differing(given, trial.method.personalise(site, visible(trial.following), given, 0)):
                yield f"site '{site.name}' got another '{changed}'."


def comes_and_goes(trial: Trial) -> Iterator[str]:
    """A site may sit out a round and come back, may come late, or be the only one."""
    stayed, late = trial.sites[1:-1], trial.sites[-1]
    answers, privates = trial.round(1, trial.following, trial.first[1], stayed)
    shared = trial.method.aggregate(trial.following, answers)[0]
    privates.pop(late.name)
    answers, _ = trial.round(2, shared, privates, trial.sites)
    yield from refused(answers, shared, trial.method)
    alone = Trial(trial.method, trial.sites[:1])
    yield from refused(alone.second[0], alone.following, trial.method)


LAWS: tuple[Law, ...] = (
    frozen,
    without_server_state,
    fitting,
    private,
    names,
    inputs_left_alone,
    retried,
    any_order,
    mean_suffices,
    resumed,
    finite,
    serves_anyone,
    nothing_for_nothing,
    comes_and_goes,
)


def start(method: Method, sites: Sequence[Site]) -> Shared:
    """What these sites agree on before the first round."""
    task = sites[0].task
    common = task if all(site.task == task for site in sites) else None
    return method.start(sites[0].model, common, len(sites), SEED)


def refused(answers: Iterable[Answer], shared: Shared, method: Method) -> Iterator[str]:
    """Why the server would not fold each of the answers that it would not fold."""
    for answer in answers:
        try:
            admit(answer, shared, method)
        except UpdateError as e:
            yield str(e)


def differing(a: Tensors, b: Tensors, tolerance: float = 0.0) -> str | None:
    """The first name that only one has, or whose tensors are not equal: to the bit, or to a tolerance."""
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b or a[name].shape != b[name].shape or a[name].dtype != b[name].dtype:
            return name
        apart = (a[name].double() - b[name].double()).abs() > tolerance * (1 + b[name].double().abs())
        if bool(apart.any()):
            return name
    return None


def _first(name: str) -> str:
    return name.partition("/")[0]


Outcome: TypeAlias = tuple[list[Answer], dict[str, Private]]


def _unlike(trial: Trial, one: Outcome, other: Outcome, when: str) -> Iterator[str]:
    updates = {answer.site: answer.update for answer in other[0]}
    for answer in one[0]:
        if changed := differing(answer.update.tensors, updates[answer.site].tensors):
            yield f"site '{answer.site}' sent another '{changed}' {when}."
        if answer.update.weight != updates[answer.site].weight:
            yield f"site '{answer.site}' sent another weight {when}."
        if changed := differing(one[1][answer.site], other[1][answer.site]):
            yield f"site '{answer.site}' kept another '{changed}' {when}."
