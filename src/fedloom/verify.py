r"""How exact a rule is that merges low-rank adapters.

Sites that train W + α/r B_k A_k with shares p_k of all weight have, together, the mean of what they learnt:

.. math:: W' = W + \tfrac{\alpha}{r} \sum_k p_k B_k A_k

`findings` draws factors and tells how far from it a rule leads, as a part of what the mean adds to W, and beside that
the least that any adapter of the sites' rank must lose (Eckart & Young, 1936). `assert_aggregation` raises where a rule
is further off. A product does not know the basis of its hidden units, and so may no rule: units are permuted, rotated
and scaled, and the result should stay.

    def rule(weight, factors, shares, scale): ...      # W, [(B_1, A_1), ...], [p_1, ...], α/r -> W'
    fedloom.assert_aggregation(rule)                   # or a method: assert_aggregation(FLoRA())

A method is measured end to end: on a model of one layer, from the updates of sites to what a newcomer is served.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NoReturn, TypeAlias

import torch
from PIL import Image
from torch import Tensor, nn

from fedloom import averaged
from fedloom.adapters import LoRA
from fedloom.backbones.adaptable import Adaptable
from fedloom.backbones.batches import Batch, Features
from fedloom.data import Dataset
from fedloom.errors import DataError, LawError, MethodError, RecipeError
from fedloom.federation import admit, visible
from fedloom.finding import Finding, asked
from fedloom.lowrank import Factors
from fedloom.methods import METHODS, Method, Pooled
from fedloom.places import Place
from fedloom.recipe import method_of, plugins
from fedloom.rows import ROWS
from fedloom.site import Answer, Site, Update
from fedloom.tables import Where, guess
from fedloom.tasks import Ranking
from fedloom.tensors import Private, Shared, Tensors, generator, of_model, under, without
from fedloom.training import Training

Rule: TypeAlias = Callable[[Tensor, Sequence[Factors], Sequence[float], float], Tensor]

OUT, IN = 40, 32  # of the layer: unlike, so that a transpose does not fit
SCALE = 2.5  # α/r: not one, so that it cannot be forgotten


def assert_aggregation(rule: Rule | Method, ranks: Sequence[int] = (4, 8, 16), rank_limited: bool = False) -> None:
    """Hold a rule, or a method, to the mean of products.

    ranks: of the sites, where they differ; where they do not, all have the first
    rank_limited: whether the rule returns no more ranks than the largest site has, and may lose what such a rule must
    raises LawError: the first thing that is further off, and by how much; refusing unlike ranks with an UpdateError is
        no fault
    """
    for finding in findings(rule, ranks):
        if not (finding.within(rank_limited) or (finding.refused and finding.name == "unequal ranks")):
            off = "" if finding.error is None else f"{finding.error:.3g} of what the mean adds"
            raise LawError(
                f"the aggregation is not exact in '{finding.name}': {finding.said or off}; {finding.best:.3g} is "
                "attainable at the sites' largest rank."
            )


def findings(rule: Rule | Method, ranks: Sequence[int] = (4, 8, 16), seed: int = 0) -> list[Finding]:
    """Every check of a rule: of means (`mean of products`, `one site`, `equal sites`, `weights`, `unequal ranks`), and
    of what should change nothing (`order of sites`, `permuted`, `rotated`, `scaled` units).

    A method whose adapter is no LoRA is held to the mean of its weights (`fedloom.averaged`).

    raises MethodError: a method that shares no whole LoRA, and so has no mean of products
    """
    _checked(ranks)
    common = False
    if not callable(rule):
        if not as_lora(rule):
            return averaged.averages(rule, seed)
        common, rule = _common(rule), rule_of(rule)
    return list(_findings(rule, ranks, common, seed))


def _findings(rule: Rule, ranks: Sequence[int], common: bool, seed: int) -> Iterator[Finding]:
    rng = generator("verify", seed)
    W = torch.randn(OUT, IN, generator=rng)
    n, r = len(ranks), ranks[0]
    weights = [float(k + 1) for k in range(n)]

    def drawn(rank: int) -> Factors:
        return torch.randn(OUT, rank, generator=rng) / rank**0.5, torch.randn(rank, IN, generator=rng) / IN**0.5

    alike = [drawn(r) for _ in ranks]
    if common:
        alike = [(B, alike[0][1]) for B, _ in alike]
    unlike = [drawn(rank) for rank in ranks]

    def off(name: str, factors: Sequence[Factors], weights: Sequence[float]) -> Finding:
        true = mean_of_products(factors, weights)
        size, rank = true.norm(), max(A.shape[0] for _, A in factors)
        best = float(torch.linalg.svdvals(true)[rank:].square().sum().sqrt() / size)
        return asked(name, lambda: (_answer(rule, W, factors, weights) - true).norm() / size, best)

    yield off("mean of products", alike, weights)
    yield off("one site", alike[:1], weights[:1])
    yield off("equal sites", alike[:1] * n, weights)
    yield off("weights", alike, [3.0, *[0.0] * (n - 1)])
    turned = _turned(alike, common, rng)
    for name, (factors, shares) in {
        "order of sites": (alike[::-1], weights[::-1]),
        **{f"{how} units": (changed, weights) for how, changed in turned.items()},
    }.items():

        def moved(factors: Sequence[Factors] = factors, shares: Sequence[float] = shares) -> Tensor:
            before, after = _answer(rule, W, alike, weights), _answer(rule, W, factors, shares)
            change: Tensor = (after - before).norm() / mean_of_products(alike, weights).norm()
            return change

        yield asked(name, moved, 0.0)
    yield off("unequal ranks", unlike, weights)


def mean_of_products(factors: Sequence[Factors], weights: Sequence[float]) -> Tensor:
    """Σ p_k B_k A_k, float64, p_k the share of all weight."""
    products = [w * B.double() @ A.double() for (B, A), w in zip(factors, weights, strict=True)]
    return torch.stack(products).sum(0) / sum(weights)


def named(name: str) -> Method:
    """The method, or the row of a comparison, of a name; a method of one's own as package.module:Class."""
    if name not in ROWS and name not in (known := [*METHODS, *plugins()]) and ":" not in name:
        raise RecipeError(f"there is no method or row '{name}'{guess(name, dict.fromkeys([*known, *ROWS]))}")
    method: Method
    _, method = method_of(ROWS.get(name, {"method": {"name": name}})["method"], Where("verify-aggregation"))
    return method


def as_lora(method: Any) -> bool:
    """Whether a method is asked for a mean of products: of a LoRA, its own or in place of the adapter that it has by
    default; one that was given to it is judged as it is."""
    own = [part.default_factory for part in fields(method) if part.name == "adapter"]
    default = own[0]() if own and callable(own[0]) else method.adapter
    return isinstance(method.adapter, LoRA) or method.adapter == default


def told(method: Method) -> str | None:
    """What a person should know of what is verified; None where it is the method's own LoRA."""
    if not as_lora(method):
        return averaged.told(method)
    if isinstance(method.adapter, LoRA):
        return None
    name = type(method.adapter).__name__
    return f"Of a LoRA in place of the method's own {name}, which is no product of two factors."


# A method as a rule.


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
        rank = max(A.shape[0] for _, A in factors)
        own, site = _on_one_layer(method, rank, scale, weight)
        shared = own.start(site.model, site.task, len(factors), 0)
        # Frozen halves are the common ones of the factors.
        given = {f"given/{name}": factors[0][1] for name in under("given", shared) if name.endswith("/A")}
        shared = Shared({**shared, **given})
        answers = [
            Answer(f"site-{k}", Update(Shared(_filled(shared, B, A)), share, 1))
            for k, ((B, A), share) in enumerate(zip(factors, shares, strict=True))
        ]
        for answer in answers:  # as a server does: what it refuses never comes to a method
            admit(answer, shared, own)
        following, _ = own.aggregate(shared, answers)
        units = Batch(torch.zeros(IN), prefix={"x": torch.eye(weight.shape[1])})
        with torch.no_grad():
            return own.serve(site, visible(following), Private({}))(units).T

    return rule


def _on_one_layer(method: Method, rank: int, scale: float, weight: Tensor) -> tuple[Method, Site]:
    changes: dict[str, Any] = {"adapter": LoRA(rank=rank, alpha=scale * rank, targets=("layer",))}
    if hasattr(method, "rank"):  # of a second adapter, which is the one that is shared
        changes["rank"] = rank
    try:
        own: Method = replace(method, **changes)  # type: ignore[type-var]
    except TypeError:
        raise MethodError(f"{type(method).__name__} takes no LoRA, and has no mean of products to verify.") from None
    task = Ranking(tuple(map(str, range(weight.shape[0]))))
    return own, Site("newcomer", Adaptable(_Layer(weight)), task, Dataset(()), Dataset(()), Training(), 0)


def _common(method: Method) -> bool:
    """Whether all sites have one A, which is given; raises MethodError where no whole LoRA is shared."""
    if isinstance(method, Pooled):
        raise MethodError("Pooled trains at one place and aggregates nothing: there is nothing to verify.")
    own, site = _on_one_layer(method, 2, SCALE, torch.zeros(OUT, IN))
    shared = visible(averaged.started(own, site, 2))
    sent, given = ({name.rpartition("/")[2] for name in part} for part in (of_model(shared), under("given", shared)))
    if "B" not in sent or "A" not in sent | given:
        raise MethodError(
            f"{type(method).__name__} shares {sorted(sent) or 'no adapter'}, where a mean of products needs A and B: "
            "there is nothing to verify."
        )
    return "A" in given


def _filled(shared: Shared, B: Tensor, A: Tensor) -> dict[str, Tensor]:
    """An update with these factors; what steers training is zero."""
    template = without("given", visible(shared))
    factors = {"A": A, "B": B}
    return {
        name: torch.zeros_like(t) if name.startswith("control/") else factors[name.rpartition("/")[2]].clone()
        for name, t in template.items()
    }


def _turned(factors: Sequence[Factors], common: bool, rng: torch.Generator) -> dict[str, list[Factors]]:
    """The same products in other bases: each site's own, or one for all where they have one A."""
    r = factors[0][1].shape[0]
    bases: dict[str, list[Tensor]] = {"permuted": [], "rotated": [], "scaled": []}
    for _ in factors:
        bases["permuted"].append(torch.eye(r)[torch.randperm(r, generator=rng)])
        bases["rotated"].append(torch.linalg.qr(torch.randn(r, r, generator=rng)).Q)
        bases["scaled"].append(torch.diag(torch.rand(r, generator=rng) * 2 + 0.5))
    return {
        how: [
            (B @ torch.linalg.inv(G), G @ A)
            for (B, A), G in zip(factors, each[:1] * len(each) if common else each, strict=True)
        ]
        for how, each in bases.items()
    }


def _answer(rule: Rule, W: Tensor, factors: Sequence[Factors], weights: Sequence[float]) -> Tensor:
    """What a rule adds to W, by α/r, float64."""
    copies = [(B.clone(), A.clone()) for B, A in factors]
    total = sum(weights)
    answer = rule(W.clone(), copies, [w / total for w in weights], SCALE)
    if answer.shape != W.shape:
        raise LawError(f"it returned {tuple(answer.shape)}, expected {tuple(W.shape)} = (out, in)")
    return (answer.double() - W.double()) / SCALE


def _checked(ranks: Sequence[int]) -> None:
    if len(ranks) == 1:
        raise RecipeError(f"a mean needs two sites, and --ranks {ranks[0]} is one; give a rank for each: --ranks 4,4.")
    if not ranks or min(ranks) < 1 or max(ranks) > min(OUT, IN):
        raise RecipeError(
            f"ranks {list(ranks)} were asked for; expected some between 1 and {min(OUT, IN)}: --ranks 4,8,16."
        )
