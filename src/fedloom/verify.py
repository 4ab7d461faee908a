r"""How exact a rule is that merges low-rank adapters.

Sites that train W + α/r B_k A_k with shares p_k of all weight have, together, the mean of what they learnt:

.. math:: W' = W + \tfrac{\alpha}{r} \sum_k p_k B_k A_k

`findings` draws factors and tells how far from it a rule leads, as a part of what the mean adds to W, and beside that
the least that any adapter of the sites' rank must lose (Eckart & Young, 1936). `assert_aggregation` raises where a rule
is further off. A product does not know the basis of its hidden units, and so may no rule: units are permuted, rotated
and scaled, and the result should stay.

    def rule(weight, factors, shares, scale): ...      # W, [(B_1, A_1), ...], [p_1, ...], α/r -> W'
    fedloom.assert_aggregation(rule)                   # or a method: assert_aggregation(FLoRA())

A method is measured end to end: on a model of one layer, from the updates of sites to what a newcomer is served; and
over later rounds, each on top of what its server kept of those before.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from fedloom import averaged
from fedloom.adapters import LoRA
from fedloom.errors import LawError, MethodError, RecipeError
from fedloom.federation import visible
from fedloom.finding import Finding, asked
from fedloom.lowrank import Factors
from fedloom.methods import METHODS, Method, Pooled
from fedloom.one_layer import IN, OUT, Rule, begun, merged, on_one_layer, rule_of, served, untrained
from fedloom.recipe import method_of, plugins
from fedloom.rows import ROWS
from fedloom.tables import Where, guess
from fedloom.tensors import generator, of_model, under

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
    of what should change nothing (`order of sites`, `permuted`, `rotated`, `scaled` units); of a method `later rounds`.

    A method whose adapter is no LoRA is held to the mean of its weights (`fedloom.averaged`).

    raises MethodError: a method that shares no whole LoRA, and so has no mean of products
    """
    _checked(ranks)
    if callable(rule):
        return list(_findings(rule, ranks, False, seed))
    if not as_lora(rule):
        return averaged.averages(rule, seed)
    common = _common(rule)
    return [*_findings(rule_of(rule), ranks, common, seed), _later_rounds(rule, ranks, common, seed)]


def _findings(rule: Rule, ranks: Sequence[int], common: bool, seed: int) -> Iterator[Finding]:
    rng = generator("verify", seed)
    W = torch.randn(OUT, IN, generator=rng)
    n, r = len(ranks), ranks[0]
    weights = [float(k + 1) for k in range(n)]

    alike = _drawn([r] * n, rng)
    if common:
        alike = [(B, alike[0][1]) for B, _ in alike]
    unlike = _drawn(ranks, rng)

    def off(name: str, factors: Sequence[Factors], weights: Sequence[float]) -> Finding:
        true = mean_of_products(factors, weights)
        best = _attainable(true, max(A.shape[0] for _, A in factors))
        return asked(name, lambda: (_answer(rule, W, factors, weights) - true).norm() / true.norm(), best)

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


def _drawn(ranks: Sequence[int], rng: torch.Generator) -> list[Factors]:
    return [
        (torch.randn(OUT, rank, generator=rng) / rank**0.5, torch.randn(rank, IN, generator=rng) / IN**0.5)
        for rank in ranks
    ]


def _attainable(product: Tensor, rank: int) -> float:
    """What the nearest matrix of a rank misses, as a part of the whole."""
    return float(torch.linalg.svdvals(product)[rank:].square().sum().sqrt() / product.norm())


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
    adapter = getattr(method, "adapter", None)
    return isinstance(adapter, LoRA) or adapter == (own[0]() if own and callable(own[0]) else adapter)


def told(method: Method) -> str | None:
    """What a person should know of what is verified; None where it is the method's own LoRA."""
    if not as_lora(method):
        return averaged.told(method)
    if isinstance(method.adapter, LoRA):
        return None
    name = type(method.adapter).__name__
    return f"Of a LoRA in place of the method's own {name}, which is no product of two factors."


def _later_rounds(method: Method, ranks: Sequence[int], common: bool, seed: int) -> Finding:
    """Whether a method keeps what the rounds before left: after each it should serve what it served before, with the
    mean of the sites' products in place of the product that they started from. The worst of so many rounds that what
    sites sent in them has more ranks than the layer, and a stack of it must have been cut."""
    rng = generator("verify", seed, "later rounds")
    n, r = len(ranks), ranks[0]
    W, weights = torch.randn(OUT, IN, generator=rng), [float(k + 1) for k in range(n)]
    drawn = [_drawn([r] * n, rng) for _ in range(2 + min(OUT, IN) // (n * r))]
    if common:
        drawn = [[(B, drawn[0][0][1]) for B, _ in factors] for factors in drawn]
    first, *later = drawn
    true = [mean_of_products(factors, weights) for factors in later]

    def error() -> Tensor:
        own, site, shared = begun(method, W, first, SCALE)
        left, off = merged(own, shared, first, weights), []
        for factors, mean in zip(later, true, strict=True):
            B, A = untrained(own, site, left)
            before, left = left, merged(own, left, factors, weights)
            change = (served(own, site, left).double() - served(own, site, before).double()) / SCALE
            off.append((change + B.double() @ A.double() - mean).norm() / mean.norm())
        return torch.stack(off).amax()

    return asked("later rounds", error, max(_attainable(mean, r) for mean in true))


def _common(method: Method) -> bool:
    """Whether all sites have one A, which is given; raises MethodError where no whole LoRA is shared."""
    if isinstance(method, Pooled):
        raise MethodError("Pooled trains at one place and aggregates nothing: there is nothing to verify.")
    own, site = on_one_layer(method, 2, SCALE, torch.zeros(OUT, IN))
    shared = visible(averaged.started(own, site, 2))
    sent, given = ({name.rpartition("/")[2] for name in part} for part in (of_model(shared), under("given", shared)))
    if "B" not in sent or "A" not in sent | given:
        raise MethodError(
            f"{type(method).__name__} shares {sorted(sent) or 'no adapter'}, where a mean of products needs A and B: "
            "there is nothing to verify."
        )
    return "A" in given


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
