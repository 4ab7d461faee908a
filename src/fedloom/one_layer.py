"""A method on a model of one linear layer: what it makes of sites' factors, as a rule that merges them."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn, TypeAlias

import torch
from PIL import Image
from torch import Tensor, nn

from fedloom.adapters import LoRA
from fedloom.backbones.adaptable import Adaptable
from fedloom.backbones.batches import Batch, Features
from fedloom.data import Dataset, Example
from fedloom.errors import DataError, FedloomError, MethodError
from fedloom.federation import admit, visible
from fedloom.lowrank import Factors
from fedloom.methods import Method
from fedloom.places import Place
from fedloom.quiet import quiet
from fedloom.site import Answer, Site, Update
from fedloom.tasks import Ranking
from fedloom.tensors import Private, Shared, Tensors, generator, of_model, under, without
from fedloom.training import Training

Rule: TypeAlias = Callable[[Tensor, Sequence[Factors], Sequence[float], float], Tensor]  # W, (B, A), p, α/r -> W'

OUT, IN = 40, 32  # of the layer: unlike, so that a transpose does not fit


class _Layer:
    """One linear layer as a `Network`; an example is what the layer reads."""

    processor: Sequence[Any] = ()
    fuses, short, trunk, blocks = False, False, "probe", 1

    def __init__(self, weight: Tensor):
        self.module: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.module.weight = nn.Parameter(weight.clone())
        self.dim = weight.shape[0]
        self.places: Mapping[Place, nn.Module] = {
            Place("probe.0.layer", "linear", weight.shape[1], self.dim, 1): self.module
        }
        self.sequences: Mapping[Place, nn.Module] = {}
        self.adapted: Sequence[nn.Module] = [self.module]

    def features(self, batch: Batch, live: Collection[str]) -> Features:
        out = self.module(batch.prefix["x"])
        return Features(out, out)

    def decode(self, image: Image.Image) -> NoReturn:
        raise DataError("a single layer reads no pictures.")

    def mask(self, place: Place, batch: Batch, h: Tensor) -> Tensor:
        return torch.ones(h.shape[:2], dtype=torch.bool)

    def prefix(self, batch: Batch, blocks: int) -> Tensors:
        return batch.prefix


def rule_of(method: Method) -> Rule:
    """What a method makes of sites' factors: the weight that it serves to a site that has no private state."""

    def rule(weight: Tensor, factors: Sequence[Factors], shares: Sequence[float], scale: float) -> Tensor:
        own, site, shared = begun(method, weight, factors, scale)
        return served(own, site, merged(own, shared, factors, shares))

    return rule


def begun(method: Method, weight: Tensor, factors: Sequence[Factors], scale: float) -> tuple[Method, Site, Shared]:
    """A method on one layer, a site without private state, and what sites are sent before their first round.

    Frozen halves are the common ones of the factors.
    """
    own, site = on_one_layer(method, max(A.shape[0] for _, A in factors), scale, weight)
    shared = own.start(site.model, site.task, len(factors), 0)
    given = {f"given/{name}": factors[0][1] for name in under("given", shared) if name.endswith("/A")}
    return own, site, Shared({**shared, **given})


def merged(own: Method, shared: Shared, factors: Sequence[Factors], shares: Sequence[float]) -> Shared:
    """What a server has after sites with these factors and weights have answered to `shared`."""
    answers = [
        Answer(f"site-{k}", Update(Shared(filled(shared, B, A)), share, 1))
        for k, ((B, A), share) in enumerate(zip(factors, shares, strict=True))
    ]
    for answer in answers:  # as a server does: what it refuses never comes to a method
        admit(answer, shared, own)
    return own.aggregate(shared, answers)[0]


def served(own: Method, site: Site, shared: Shared) -> Tensor:
    """The layer's weight, (out, in), as a site without private state gets it served."""
    units = Batch(torch.zeros(IN), prefix={"x": torch.eye(IN)})
    with torch.no_grad():
        return own.serve(site, visible(shared), Private({}))(units).T


def untrained(own: Method, site: Site, shared: Shared) -> Factors:
    """What a site without private state answers with that has learnt nothing: the factors that it starts from."""
    with quiet():  # of a site that holds nothing out
        update, _ = own.local_round(1, site, visible(shared), Private({}))
    leaves = {name.rpartition("/")[2]: t for name, t in {**under("given", shared), **of_model(update.tensors)}.items()}
    return leaves["B"], leaves["A"]


def on_one_layer(method: Method, rank: int, scale: float, weight: Tensor) -> tuple[Method, Site]:
    """A method with a LoRA of this rank, α/r = `scale`, and a site that has one layer of this weight, (out, in).

    raises MethodError: the method takes no LoRA
    """
    changes: dict[str, Any] = {"adapter": LoRA(rank=rank, alpha=scale * rank, targets=("layer",))}
    if hasattr(method, "rank"):  # of a second adapter, which is the one that is shared
        changes["rank"] = rank
    try:
        own: Method = replace(method, **changes)  # type: ignore[type-var]
    except TypeError:
        raise MethodError(f"{type(method).__name__} takes no LoRA, and has no mean of products to verify.") from None
    except FedloomError:
        raise
    except Exception as e:  # code that is not ours can fail in any way
        raise MethodError(f"{type(method).__name__} takes no LoRA of rank {rank}: {type(e).__name__}: {e}.") from e
    task, n = Ranking(tuple(map(str, range(weight.shape[0])))), weight.shape[1]
    drawn = torch.randn(n, n, generator=generator("one layer"))
    units = Dataset(tuple(Example(label="0", image=f"{i}") for i in range(n)), prefix={"x": drawn})
    still = Training(lr=1e-12)  # float32 does not see such steps
    return own, Site("newcomer", Adaptable(_Layer(weight)), task, units, Dataset(()), still, 0)


def filled(shared: Shared, B: Tensor, A: Tensor) -> dict[str, Tensor]:
    """An update with these factors; what steers training is zero."""
    template = without("given", visible(shared))
    factors = {"A": A, "B": B}
    return {
        name: torch.zeros_like(t) if name.startswith("control/") else factors[name.rpartition("/")[2]].clone()
        for name, t in template.items()
    }
