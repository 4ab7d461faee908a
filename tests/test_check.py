"""The battery finds what it is there to find: a method that breaks a law is named with that law."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

from fedloom.adapters import BitFit, Bottleneck, Everything, Head, LoRA, Norms, Sum
from fedloom.check import LAWS, check_method, federation
from fedloom.check.watched import origins, watch
from fedloom.errors import LawError
from fedloom.methods import METHODS, FedAvg, Local, Method
from fedloom.site import Answer, Site, Update
from fedloom.tasks import Classification
from fedloom.tensors import Private, Shared, mean

PROMPTS = Classification(("red", "green", "blue"), "a photo of a {}.")
SHAPES = Classification(("round", "square"), head="linear")
COLOURS = Classification(("red", "green", "blue"), head="linear")


@pytest.fixture(scope="module")
def sites() -> tuple[Site, ...]:
    return federation()


SMALL: Mapping[str, Mapping[str, Any]] = {"fedpia": {"probe": 1}}  # its 16 images are more than these sites have


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"pooled"}))  # which is no federation
def test_every_method_obeys(name: str, sites: tuple[Site, ...]) -> None:
    check_method(METHODS[name](**SMALL.get(name, {})), sites)


@pytest.mark.parametrize(
    "method",
    [
        FedAvg(LoRA(rank=2, gated=True)),
        FedAvg(LoRA(), mu=0.5),
        FedAvg(LoRA(), heads="shared"),
        FedAvg(Bottleneck(4)),
        FedAvg(Sum(LoRA(rank=2), Bottleneck(3))),
        FedAvg(Head()),
        FedAvg(Head(), heads="shared"),
        FedAvg(BitFit()),
        FedAvg(Norms()),
        FedAvg(Everything()),
        Local(Bottleneck(4)),
        Local(Everything()),
    ],
    ids=str,
)
def test_with_every_adapter(method: Method, sites: tuple[Site, ...]) -> None:
    check_method(method, sites)


@pytest.mark.parametrize("method", [FedAvg(), Local()], ids=str)
def test_on_class_prompts_and_on_mixed_tasks(method: Method) -> None:
    check_method(method, federation(PROMPTS))
    check_method(method, federation(COLOURS, SHAPES))


# Methods that break one law each. They are FedAvg but for one line.


@dataclass(frozen=True)
class Broken:
    """FedAvg, to be broken in one place."""

    adapter: LoRA = field(default_factory=lambda: LoRA(rank=2))
    individual: ClassVar[bool] = False
    sends: ClassVar[frozenset[str]] = frozenset()
    heads: ClassVar[Literal["private", "shared"]] = "private"

    @property
    def sound(self) -> FedAvg:
        return FedAvg(self.adapter)

    def start(self, model: Any, task: Any, sites: int, seed: int) -> Shared:
        return self.sound.start(model, task, sites, seed)

    def local_round(self, round: int, site: Site, shared: Shared, private: Private) -> tuple[Update, Private]:
        return self.sound.local_round(round, site, shared, private)

    def aggregate(self, shared: Shared, answers: Iterable[Answer]) -> tuple[Shared, Mapping[str, float]]:
        return self.sound.aggregate(shared, answers)

    def personalise(self, site: Site, shared: Shared, private: Private, epochs: int) -> Private:
        return self.sound.personalise(site, shared, private, epochs)

    def serve(self, site: Site, shared: Shared, private: Private) -> Callable[[Any], Tensor]:
        return self.sound.serve(site, shared, private)


def sent(update: Update, **changed: Tensor) -> Update:
    return replace(update, tensors=Shared({**update.tensors, **{k.replace("__", "/"): t for k, t in changed.items()}}))


class Thawed(Broken):
    """A subclass that is compared by identity."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__


class SendsItsHead(Broken):
    def local_round(self, *given: Any) -> tuple[Update, Private]:
        update, private = super().local_round(*given)
        return sent(update, head__weight=private["head/weight"]), private


class Leaks(Broken):
    """Hides its head in what it may send: `how` gets a tensor that is sent, and the head."""

    how: ClassVar[Callable[[Tensor, Tensor], Tensor]]

    def local_round(self, round: int, site: Site, shared: Shared, private: Private) -> tuple[Update, Private]:
        update, after = super().local_round(round, site, shared, private)
        name = min(update.tensors)
        told = type(self).how(update.tensors[name].clone(), after["head/weight"])
        return replace(update, tensors=Shared({**update.tensors, name: told})), after


def copied(t: Tensor, head: Tensor) -> Tensor:
    flat = t.flatten().tolist()
    return torch.cat([head.flatten(), t.flatten()[head.numel() :]])[: len(flat)].view_as(t)


def added_in_place(t: Tensor, head: Tensor) -> Tensor:
    t.add_(1e-6 * head.mean())
    return t


def written_into(t: Tensor, head: Tensor) -> Tensor:
    t[0, 0] = head[0, 0]
    return t


def averaged(t: Tensor, head: Tensor) -> Tensor:
    return mean([({"t": t}, 1.0), ({"t": head.flatten()[: t.numel()].sum().expand_as(t).clone()}, 1.0)])["t"]


def written_out(t: Tensor, head: Tensor) -> Tensor:
    return torch.add(t, head.flatten()[0], out=torch.empty_like(t))


@pytest.mark.parametrize("how", [copied, added_in_place, written_into, averaged, written_out])
def test_a_leak_is_found_however_it_is_hidden(how: Callable[..., Tensor], sites: tuple[Site, ...]) -> None:
    leaking = type("Leaking", (Leaks,), {"how": how})
    with pytest.raises(LawError, match=r"Leaking breaks a law.*private tensor.*computed from 'head/'"):
        check_method(leaking(), sites)
    allowed = type("Allowed", (Leaks,), {"how": how, "sends": frozenset({"head"})})
    check_method(allowed(), sites)


class LeaksAtSecondHand(Broken):
    """Its private memory of a fine head is what it sends."""

    def local_round(self, round: int, site: Site, shared: Shared, private: Private) -> tuple[Update, Private]:
        update, after = super().local_round(round, site, shared, private)
        name = min(update.tensors)
        shift = private.get("control/shift", torch.zeros(()))
        after = Private({**after, "control/shift": after["head/bias"].sum()})
        return replace(update, tensors=Shared({**update.tensors, name: update.tensors[name] + shift})), after


class WritesIntoShared(Broken):
    def local_round(self, round: int, site: Site, shared: Shared, private: Private) -> tuple[Update, Private]:
        update, after = super().local_round(round, site, shared, private)
        shared[min(shared)].mul_(0.5)
        return update, after


class WritesIntoUpdates(Broken):
    def aggregate(self, shared: Shared, answers: Iterable[Answer]) -> tuple[Shared, Mapping[str, float]]:
        answers = list(answers)
        folded = super().aggregate(shared, answers)
        answers[0].update.tensors[min(shared)].zero_()
        return folded


class Rolls(Broken):
    """Draws from the global generator."""

    def local_round(self, *given: Any) -> tuple[Update, Private]:
        update, private = super().local_round(*given)
        name = min(update.tensors)
        noisy = update.tensors[name] + 1e-3 * torch.randn(update.tensors[name].shape)
        return replace(update, tensors=Shared({**update.tensors, name: noisy})), private


class Counts(Broken):
    """Remembers outside of its values which sites have worked."""

    seen: ClassVar[list[str]] = []

    def local_round(self, round: int, site: Site, shared: Shared, private: Private) -> tuple[Update, Private]:
        update, private = super().local_round(round, site, shared, private)
        if site.name not in self.seen[-1:]:
            self.seen.append(site.name)
        return replace(update, weight=float(len(self.seen))), private


class Peeks(Broken):
    """One site counts for more where another has worked before it."""

    before: ClassVar[list[str]] = []

    def local_round(self, round: int, site: Site, shared: Shared, private: Private) -> tuple[Update, Private]:
        update, private = super().local_round(round, site, shared, private)
        follows = site.name == "site-2" and self.before[-1:] == ["site-1"]
        self.before.append(site.name)
        return replace(update, weight=2.0 if follows else 1.0), private


class LastCounts(Broken):
    individual: ClassVar[bool] = True

    def aggregate(self, shared: Shared, answers: Iterable[Answer]) -> tuple[Shared, Mapping[str, float]]:
        return list(answers)[-1].update.tensors, {}


class Median(Broken):
    """Needs every update, and does not say so."""

    def aggregate(self, shared: Shared, answers: Iterable[Answer]) -> tuple[Shared, Mapping[str, float]]:
        states = [answer.update.tensors for answer in answers]
        return Shared({name: torch.stack([state[name] for state in states]).median(0).values for name in shared}), {}


class MedianSaysSo(Median):
    individual: ClassVar[bool] = True


class Explodes(Broken):
    def local_round(self, *given: Any) -> tuple[Update, Private]:
        update, private = super().local_round(*given)
        return update, Private({**private, "opt/rate": torch.tensor(float("inf"))})


class NeedsItsPast(Broken):
    def serve(self, site: Site, shared: Shared, private: Private) -> Callable[[Any], Tensor]:
        private["head/weight"]
        return super().serve(site, shared, private)


class NeverRests(Broken):
    def personalise(self, site: Site, shared: Shared, private: Private, epochs: int) -> Private:
        return super().personalise(site, shared, private, max(1, epochs))


class AsksTheServer(Broken):
    def start(self, model: Any, task: Any, sites: int, seed: int) -> Shared:
        return Shared({**super().start(model, task, sites, seed), "server/step": torch.zeros(())})

    def local_round(self, round: int, site: Site, shared: Shared, private: Private) -> tuple[Update, Private]:
        shared["server/step"]
        return super().local_round(round, site, shared, private)


class Nameless(Broken):
    def local_round(self, *given: Any) -> tuple[Update, Private]:
        update, private = super().local_round(*given)
        return update, Private({**private, "beta": torch.ones(())})


class NeedsEveryRound(Broken):
    """A site that sat out fails when it comes back."""

    def local_round(self, round: int, site: Site, shared: Shared, private: Private) -> tuple[Update, Private]:
        if round and float(private["control/last"]) != round - 1:
            raise ValueError(f"round {round - 1} is missing")
        update, after = super().local_round(round, site, shared, private)
        return update, Private({**after, "control/last": torch.tensor(float(round))})


BROKEN = {
    Thawed: "equal to its copy",
    SendsItsHead: "names, shapes and dtypes of `shared`",
    LeaksAtSecondHand: "private tensor",
    WritesIntoShared: "writes into what it was given.*local_round changed",
    WritesIntoUpdates: "writes into what it was given.*aggregate changed",
    Rolls: "asked again, a site gives the same bits",
    Counts: "asked again, a site gives the same bits.*another weight",
    Peeks: "order in which sites work.*site 'site-2' sent another weight",
    LastCounts: "order in which answers are folded.*depends on the order",
    Median: "only the weighted mean",
    Explodes: "finite.*opt/rate",
    NeedsItsPast: "also with none.*KeyError",
    NeverRests: "0 epochs gives back",
    AsksTheServer: "without its server/ names.*KeyError",
    Nameless: "place/leaf.*'beta'",
    NeedsEveryRound: "sit out a round.*round 1 is missing",
}


@pytest.mark.parametrize("method", BROKEN, ids=lambda method: method.__name__)
def test_a_broken_law_is_named(method: type[Method], sites: tuple[Site, ...]) -> None:
    with pytest.raises(LawError, match=f"{method.__name__} breaks a law.*{BROKEN[method]}"):
        check_method(method(), sites)


def test_a_method_that_owns_up_passes(sites: tuple[Site, ...]) -> None:
    check_method(Broken(), sites)
    check_method(MedianSaysSo(), sites)


def test_every_law_says_what_it_is() -> None:
    assert all(law.__doc__ and law.__doc__.endswith(".") for law in LAWS)
    assert len({law.__doc__ for law in LAWS}) == len(LAWS)


def test_watching_follows_values_and_stops_at_gradients() -> None:
    clean = torch.ones(3, requires_grad=True)
    secret = watch({"head/w": torch.ones(3), "opt/m": torch.ones(3)})
    assert origins([secret["head/w"] * clean + secret["opt/m"]]) == {"head", "opt"}
    assert origins([clean * 2]) == frozenset()
    loss = (secret["head/w"] * clean).sum()
    assert origins([loss]) == {"head"}
    (gradient,) = torch.autograd.grad(loss, [clean])
    assert origins([gradient]) == frozenset()
    torch.testing.assert_close(gradient, torch.ones(3))
