r"""FedPIA: permuting and integrating adapters (Saha et al., 2024, arXiv 2412.14424).

Every site k has an adapter W_k of its own. Each round, place by place:

1. **Permute at the server.** The hidden units of each W_k take the order of the global adapter W_G: optimal transport,
   of units that are alike in their weights. **Integrate** what is aligned, so that a distant site counts for less:

   .. math:: W_G \leftarrow \sum_k w_k \tilde W_k, \qquad w_k \propto p_k\, e^{-\gamma d_k / s}, \quad
             d_k = \lVert \tilde W_k - W_G \rVert^2

2. **Permute at the site.** The units of W_G take the order of the site's own W_k: of units that fire alike on a probe
   of its images. **Integrate** the two, W_k <- (1 - β) W_k + β W̃_G, and train the result; that is sent next.

`FedPIA.paper()` is the method as published, as far as it is. Our defaults deviate, each for a measured reason:

- The published weights are not normalised: Σ_k p_k e^{-γ d_k} <= 1 shrinks the global adapter towards zero, round after
  round. `normalized` divides by the sum; `literal` is as published; `delta` moves W_G by the weighted differences.
- d_k is a sum over parameters, so that γ has no meaning across adapters: d_k is divided by a scale s, the mean d of the
  round before (in the first, the squared norm of the fresh adapter: parameters times variance).
- Two units can be matched by chance. A match is kept only where it gains on features that it was not made on
  (`accept`, see `alignment.split_gain`); the paper always permutes.
- Squared distances, whose barycenter is the mean, and of all weights of a unit (`in+out`); the paper names the
  Euclidean distance between incoming ones. Correlation of pre-activations at the site; the paper names similarity.

`fedloom verify-aggregation` finds 0.93 against the mean of products (0.51 is attainable), 0.79 in later rounds (0.53),
1.00 with unequal ranks (0.19); 0.12 for permuted units, 0.11 for rotated and 0.16 for scaled ones (0).
With adapters that start alike and short rounds units hardly move, and FedPIA is averaging with weights. They move where
adapters started apart (`init = "independent"`, sites that bring their own) and under long local training.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal, TypeAlias

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from fedloom import alignment, choice, rotation, transport
from fedloom.adapters import Bottleneck, LoRA
from fedloom.backbones.adaptable import Adaptable
from fedloom.backbones.batches import Batch
from fedloom.errors import MethodError
from fedloom.integration import Fold, combined, distances, exponents, norm, per_tensor, sizes
from fedloom.permuting import Permuting
from fedloom.serving import Served
from fedloom.site import Answer, Site, Update
from fedloom.statistics import means
from fedloom.tasks import Task
from fedloom.tensors import Private, Shared, Tensors, at, mean, of_model, only, part, same, shapes, under
from fedloom.training import Positive, fit, head
from fedloom.transport import Order, Plans

LOWEST = -60.0  # exponent of a weight that a site computes: below it, a float32 product of weight and tensor loses bits

Share: TypeAlias = Annotated[float, Ge(0), Le(1)]
Blend: TypeAlias = Annotated[float, Gt(0), Le(1)]


@dataclass(frozen=True)
class FedPIA:
    adapter: Bottleneck | LoRA = field(default_factory=Bottleneck)
    init: Literal["shared", "independent"] = "shared"  # whether sites start from one adapter
    # permute
    permute: Literal["both", "server", "client", "neither"] = "both"
    cost: alignment.Weights = "in+out"  # what of a unit's weights is compared
    squared: bool = True  # W2; False: W1
    similarity: Literal["correlation", "euclidean"] = "correlation"  # of pre-activations; of post-activations
    probe: int = 16  # images on which a site compares units
    probe_inputs: Literal["shared", "own"] = "shared"  # whether both read the same there, or each in its own network
    # procrustes: no permutation, but the best rotation of a LoRA's balanced factors, whatever it gains
    solver: Literal["exact", "emd", "sinkhorn", "random", "procrustes"] = "exact"
    accept: Literal["always", "gain", "split-half"] = "split-half"  # when a match is believed
    least_gain: Share = 0.0  # over the identity
    every: Positive = 1  # rounds from one matching to the next; between them the last match holds
    iterations: Positive = 1  # of the barycenter: align to the mean, average, again
    # integrate
    gamma: float = 1.0  # γ: how fast a distant site loses its say
    integration: Literal["normalized", "literal", "delta"] = "normalized"
    scale: Literal["previous", "median", "parameters", "one"] = "previous"  # s: what d_k is divided by
    distance: Literal["adapter", "layer"] = "adapter"  # d_k of the whole adapter, or of each layer by itself
    weighting: Literal["uniform", "examples"] = "uniform"  # p_k
    beta: tuple[Share, ...] = (0.8,)  # β, round by round; the last one holds
    choose: tuple[Blend, ...] = ()  # β's that a site may choose by its held-out loss, or none
    # where
    matching: Literal["server", "site"] = "server"  # who aligns and weights the adapters
    predict_with: Literal["local", "integrated", "global"] = "local"

    sends: ClassVar[frozenset[str]] = frozenset({"local"})  # the adapter: that is what is federated
    heads: ClassVar[Literal["private"]] = "private"

    @classmethod
    def paper(cls) -> "FedPIA":
        """As published; γ, β and the probe's size are not, nor which of the three adapters is evaluated."""
        published = cls(cost="in", squared=False, similarity="euclidean", probe_inputs="own", accept="always")
        return replace(published, gamma=1e-3, integration="literal", scale="one")

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < math.inf:
            raise MethodError(f"gamma is {self.gamma}; FedPIA needs a finite gamma >= 0 (0 weighs all sites alike).")
        if self.probe < 1:
            raise MethodError(f"probe is {self.probe}; a site compares units on one image at least.")
        if not self.beta:
            raise MethodError("beta is empty; give one value, or one a round.")
        if self.solver == "procrustes" and isinstance(self.adapter, Bottleneck):
            raise MethodError(
                "solver = 'procrustes' rotates the factors of a linear adapter, and a bottleneck is not linear; "
                "use 'exact', or adapter.kind = 'lora'."
            )
        if self.every > 1 and (self.solver in ("sinkhorn", "procrustes") or self.matching == "site"):
            raise MethodError(
                f"every = {self.every} holds a permutation from round to round, which needs solver = 'exact', 'emd' or "
                "'random', and matching = 'server'."
            )
        if self.matching == "site" and (self.scale == "median" or self.iterations > 1 or self.init == "independent"):
            raise MethodError(
                "matching = 'site' needs what every site knows beforehand: not scale = 'median', iterations > 1, nor "
                "init = 'independent', whose first order comes from a site's adapter; use matching = 'server'."
            )

    @property
    def individual(self) -> bool:
        return self.matching == "server"

    any_width = individual

    def start(self, model: Adaptable, task: Task | None, sites: int, seed: int) -> Shared:
        fresh = model.init(self.adapter, seed)
        zero = {name: torch.zeros_like(tensor) for name, tensor in fresh.items()}
        scale = distances(fresh, zero, self.by_layer)  # parameters times variance
        if self.matching == "site":
            return Shared({**fresh, "control/distance": scale, "control/weight": torch.ones_like(scale)})
        ordered = torch.tensor(self.init == "shared")
        return Shared({**fresh, "server/distance": scale, "server/ordered": ordered, "server/round": torch.tensor(0)})

    @property
    def permuting(self) -> Permuting:
        compared = (self.adapter, self.cost, self.squared, self.similarity, self.probe, self.probe_inputs)
        return Permuting(*compared, self.solver, self.accept, self.least_gain)

    @property
    def by_layer(self) -> bool:
        return self.distance == "layer"

    # At a site.

    def local_round(self, round: int, site: Site, shared: Shared, private: Private) -> tuple[Update, Private]:
        if self.permute in ("both", "client") and not private:
            site.probe(self.probe)  # a site that is too small for it learns so in its first round
        own, heads = self._own(site, private), head(site, private)
        apart = self.init == "independent" and not own  # a first round alone; what comes of it is aligned like any
        own = own or (site.model.init(self.adapter, site.seed, site.name) if apart else of_model(shared))
        held = {**private, **at("local", own), **heads}
        beta = self.beta[min(round, len(self.beta) - 1)]
        start, chosen, told = (own, {}, {}) if apart else self._integrated(site, shared, held, beta, round)
        trained, loss = fit(site, {**start, **heads}, lambda t, b: site.loss(self.adapter, t, b), round)
        after = only(start, trained)
        sent, more = self._aligned(site, shared, after) if self.matching == "site" else (after, {})
        weight = 1.0 if self.weighting == "uniform" else float(len(site))
        update = Update(Shared(sent), weight, examples=len(site), metrics={"loss": loss, **told, **more})
        return update, Private({**only(heads, trained), **at("local", after), **chosen})

    def personalise(self, site: Site, shared: Shared, private: Private, epochs: int) -> Private:
        if not epochs:
            return private
        own, heads = self._own(site, private) or of_model(shared), head(site, private)
        held = {**private, **at("local", own), **heads}
        start, chosen, _ = self._integrated(site, shared, held, self.beta[-1])
        tuned, _ = fit(site, {**start, **heads}, lambda t, b: site.loss(self.adapter, t, b), "fine-tuning", epochs)
        # What was tuned is served, whatever `predict_with` says.
        chosen |= {"choice/tuned": torch.ones(())}
        return Private({**only(heads, tuned), **at("local", only(start, tuned)), **chosen})

    def serve(self, site: Site, shared: Shared, private: Private) -> Callable[[Batch], Tensor]:
        own, adapter = under("local", private), of_model(shared)
        if own and (self.predict_with == "local" or "choice/tuned" in private):
            adapter = own
        elif own and self.predict_with == "integrated":
            adapter, _, _ = self._integrated(site, shared, private, self.beta[-1])
        fresh = site.task.init(site.model.dim, site.seed)
        tensors = {**fresh, **part("head", private), **adapter}
        return Served(site, self.adapter, tensors)

    def _own(self, site: Site, private: Tensors) -> dict[str, Tensor]:
        """The adapter that the site trained, or brought; empty where it has none."""
        return under("local", private) or dict(site.initial)

    def _integrated(
        self, site: Site, shared: Tensors, held: Tensors, beta: float, round: int | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
        """(1 - β) W_k + β W̃_G, the global adapter's units in the order of the site's own; `held`: head and own."""
        current, own = of_model(shared), under("local", held)
        if same(current, own):
            return own, {}, {}
        if self.solver == "procrustes":
            own = rotation.evened(own)  # a blend of factors is one of updates only in one basis, and of one scale
        plans = self._kept(round, under("choice/client", held), current, own)
        plans = plans or self._by_activations(site, current, own)
        turned = self.permuting.carried(current, plans)
        if self.choose and len(site.held_out):
            # Its own adapter, or a blend with the global one, aligned or as it came.
            others = [other for other in (turned, current) if shapes(other) == shapes(own)]
            heads, blends = part("head", held), [(_blend(own, other, b), b) for other in others for b in self.choose]
            every = [({**adapter, **heads}, b) for adapter, b in [(own, 0.0), *blends]]
            best, beta = choice.best(site, self.adapter, every)
            start = only(own, best)
        else:
            start = _blend(own, turned, beta)
        told = transport.told("client", plans, under("choice/client", held))
        return start, at("choice/client", transport.units(plans)), {**told, "beta": beta}

    def _by_activations(self, site: Site, current: Tensors, own: Tensors) -> Plans:
        """Where the global adapter's units go among the site's own."""
        if self.permute in ("server", "neither") and shapes(current) == shapes(own):
            return {}
        return self.permuting.by_activations(current, own, site)

    def _aligned(self, site: Site, shared: Tensors, own: Tensors) -> tuple[dict[str, Tensor], dict[str, float]]:
        """What makes a mean at the server enough: e_k W̃_k, and beside it e_k and d_k."""
        current = of_model(shared)
        aligned, plans = self._permuted(site.name, own, current)
        d = distances(aligned, current, self.by_layer)
        e = exponents(self.gamma, d, self._scale(shared["control/distance"], current)).clamp_min(LOWEST).exp()
        by_name = per_tensor(e, aligned)
        sent = {name: (tensor.double() * by_name[name]).to(tensor.dtype) for name, tensor in aligned.items()}
        return {**sent, "control/distance": d, "control/weight": e}, transport.told("server", plans, {})

    # At the server.

    def aggregate(self, shared: Shared, answers: Iterable[Answer]) -> tuple[Shared, Mapping[str, float]]:
        if self.matching == "site":
            return self._merged(shared, answers)
        current, state = of_model(shared), under("server", shared)
        ordered, round = bool(state["ordered"]), int(state["round"])
        if self.iterations > 1 or self.scale == "median":
            answers = list(answers)  # the only cases in which updates are held
        if not ordered:
            current, answers = self._first(current, answers)
        target = current
        for _ in range(self.iterations - 1):
            target = mean((self._permuted_of(answer, target), answer.update.weight) for answer in answers)
        scale = self._scale(state["distance"], current)
        if self.scale == "median":
            far_of = [distances(self._permuted_of(answer, target), current, self.by_layer) for answer in answers]
            scale = torch.stack(far_of).median(0).values
        fold, told, far = Fold(current), [], []
        orders: dict[str, Tensor] = {}
        for answer in answers:
            before = under(f"match/{answer.site}", state)
            aligned, plans = self._permuted(answer.site, answer.update.tensors, target, round, before)
            d = distances(aligned, current, self.by_layer)
            fold.add(answer.site, aligned, answer.update.weight, exponents(self.gamma * ordered, d, scale))
            far.append(({"distance": d}, answer.update.weight))
            told.append(transport.told("server", plans, before))
            orders |= at(f"match/{answer.site}", transport.units(plans))
        following = fold.integrated(self.integration)
        matched = {name: order for name, order in state.items() if name.startswith("match/")} | orders
        done = {"ordered": torch.tensor(True), "round": torch.tensor(round + 1)}
        server = at("server", {**matched, **mean(far), **done})
        return Shared({**following, **server}), {**means(told), **fold.told(), "norm": norm(following)}

    def _merged(self, shared: Shared, answers: Iterable[Answer]) -> tuple[Shared, Mapping[str, float]]:
        """The same, of the mean of what sites have aligned and weighted themselves."""
        current, told = of_model(shared), []

        def updates(answers: Iterable[Answer]) -> Iterable[tuple[Tensors, float]]:
            for answer in answers:
                told.append({name: x for name, x in answer.update.metrics.items() if name.startswith("server/")})
                yield answer.update.tensors, answer.update.weight

        folded = mean(updates(answers))
        e = folded["control/weight"]
        following = combined(self.integration, current, folded, e, torch.ones_like(e))
        control = {name: folded[name] for name in ("control/distance", "control/weight")}
        metrics = {"sum": float(e.mean()), "norm": norm(following)}
        return Shared({**following, **control}), {**means(told), **metrics}

    def _first(self, drawn: Tensors, answers: Iterable[Answer]) -> tuple[dict[str, Tensor], Iterable[Answer]]:
        """The first order where adapters started apart: that of the first site, as near the drawn one as may be."""
        answers = iter(answers)
        first = next(answers, None)
        if first is None:
            return dict(drawn), []
        rest = itertools.chain([first], answers)
        return self._permuted_of(first, drawn), list(rest) if self.iterations > 1 or self.scale == "median" else rest

    def _permuted(
        self, site: str, own: Tensors, target: Tensors, round: int | None = None, before: Tensors | None = None
    ) -> tuple[dict[str, Tensor], Plans]:
        """W̃_k: a site's units in the order of the target's."""
        if self.permute in ("client", "neither") and shapes(own) == shapes(target):
            return dict(own), {}
        plans = self._kept(round, before or {}, own, target) or self.permuting.by_weights(own, target, site)
        return self.permuting.carried(own, plans), plans

    def _permuted_of(self, answer: Answer, target: Tensors) -> dict[str, Tensor]:
        return self._permuted(answer.site, answer.update.tensors, target)[0]

    def _scale(self, previous: Tensor, current: Tensors) -> Tensor:
        match self.scale:
            case "parameters":
                return sizes(current, self.by_layer)
            case "one":
                return torch.ones_like(previous)
            case _:
                return previous

    # At both.

    def _kept(self, round: int | None, orders: Tensors, source: Tensors, target: Tensors) -> Plans:
        """The match of an earlier round, where it holds in this one; its gain is not measured again."""
        if round is None or round % self.every == 0 or shapes(source) != shapes(target):
            return {}
        return {place: (Order(order.long()), None) for place, order in orders.items()}


def _blend(own: Tensors, other: Tensors, beta: float) -> dict[str, Tensor]:
    return {name: (1 - beta) * own[name] + beta * other[name] for name in own}
