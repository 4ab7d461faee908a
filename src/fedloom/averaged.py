"""How exact a method is that merges what is no product of two factors: the model's own weights, a bottleneck, prompts.

What sites send is drawn beside what they were given; `averages` tells how far what the server makes of it is from the
mean, tensor by tensor, as a part of what that mean changes.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedloom.adapters import IA3, Head
from fedloom.backbones.clip import TOWERS
from fedloom.check.tiny import federation
from fedloom.errors import FedloomError, MethodError
from fedloom.federation import visible
from fedloom.finding import Finding, asked
from fedloom.methods import Method
from fedloom.places import Replaced
from fedloom.site import Answer, Site, Update
from fedloom.tensors import Shared, Tensors, generator, mean, only, without

SITES = 3


def averages(method: Method, seed: int = 0) -> list[Finding]:
    """Every check of a method's mean: `mean of weights`, `one site`, `equal sites`, `weights`, `order of sites`.

    raises MethodError: nothing of an adapter or a head is sent
    """
    site = federation(towers=TOWERS)[0]  # learned words are in the text tower alone
    shared = started(method, site, SITES)
    sent = without("given", without("control", visible(shared)))
    if not sent:
        raise MethodError(f"{_said(method)} sends no weights that are averaged: there is nothing to verify.")
    return list(_averages(method, shared, sent, seed))


def started(method: Method, site: Site, sites: int) -> Shared:
    """What a method starts with. Raises MethodError where its code fails."""
    try:
        return method.start(site.model, site.task, sites, 0)
    except FedloomError:
        raise
    except Exception as e:  # code that is not ours can fail in any way
        raise MethodError(f"{type(method).__name__} fails in start: {type(e).__name__}: {e}.") from e


def _averages(method: Method, shared: Shared, sent: Tensors, seed: int) -> Iterator[Finding]:
    rng = generator("averages", seed)
    drawn = [{name: t + torch.randn(t.shape, generator=rng) for name, t in sent.items()} for _ in range(SITES)]
    weights = [float(k + 1) for k in range(SITES)]
    steering = {name: torch.zeros_like(t) for name, t in visible(shared).items() if name.startswith("control/")}

    def merged(updates: Sequence[Tensors], weights: Sequence[float]) -> Tensor:
        answers = [
            Answer(f"site-{k}", Update(Shared({**own, **steering}), weight, 1))
            for k, (own, weight) in enumerate(zip(updates, weights, strict=True))
        ]
        return _flat(only(sent, method.aggregate(shared, answers)[0]))

    def off(name: str, updates: Sequence[Tensors], weights: Sequence[float]) -> Finding:
        true = _flat(mean(zip(updates, weights, strict=True)))
        return asked(name, lambda: (merged(updates, weights) - true).norm() / (true - _flat(sent)).norm(), 0.0)

    yield off("mean of weights", drawn, weights)
    yield off("one site", drawn[:1], weights[:1])
    yield off("equal sites", drawn[:1] * SITES, weights)
    yield off("weights", drawn, [3.0, *[0.0] * (SITES - 1)])
    yield off("order of sites", drawn[::-1], weights[::-1])


def told(method: Method) -> str:
    """What is averaged, and of what its mean is the mean."""
    what = f"{_said(method)}: no product of two factors. What sites send is averaged as it is"
    if isinstance(method.adapter, Replaced | IA3 | Head):
        return f"{what}; a layer is linear in it, so that a layer of the mean is the mean of the sites' layers."
    return (
        f"{what}, and what the adapter computes is not linear in it: the mean of weights is not the mean of what sites "
        "have learnt, and how far it is from that is not measured here."
    )


def _said(method: Method) -> str:
    """A method and its adapter."""
    return f"{type(method).__name__} of {type(method.adapter).__name__}"


def _flat(tensors: Tensors) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])
