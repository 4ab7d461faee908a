r"""Pruning of low-rank adapters: gates that a proximal step draws to zero (SoRA, Ding et al., 2023, arXiv 2311.11696),
or a budget of ranks; and compaction, which takes dead ranks out of every tensor that has them.

Each rank i of y = W x + (α/r) B (g ∘ A x) is dead where g_i = 0. `alpha / rank` is a constant, so that taking a dead
rank away changes no output. What it saves is bytes, on disk and wherever a local adapter is sent; a step takes hardly
less time.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal, TypeAlias

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from fedloom.adapters import LoRA
from fedloom.tensors import Tensors, at, by_place, only, under
from fedloom.training import Positive, State, Training, descend, stage
from fedloom.transport import Order, carried

log = logging.getLogger(__name__)

Strength: TypeAlias = Annotated[float, Ge(0)]
Rate: TypeAlias = Annotated[float, Gt(0)]
Share: TypeAlias = Annotated[float, Gt(0), Lt(1)]


@dataclass(frozen=True)
class Pruning:
    r"""How ranks die.

    Gates take Adam's step, whatever optimiser the rest has, at a learning rate of their own and unclipped. After each
    comes the proximal step of λ‖g‖_1:

    .. math:: g \leftarrow \mathrm{sign}(g) \max(|g| - \lambda, 0)

    `operator = "sora"` is that of SoRA's program, three assignments one after the other: above λ down by λ, below -λ up
    by λ, then all below λ in size to zero. Its dead zone is |g| < 2λ, and beyond it the two are equal.

    An Adam step moves a gate by about `lr`: with λ above it, useful gates die with the others.

    A budget keeps the ranks of greatest ‖A_i‖ |g_i| ‖B_i‖, the norm of what rank i adds, among all layers: `rank` a
    layer in the mean, a number or a share of those at the start, and as many as go into `bytes` of adapter (float32);
    where both are set, both hold. How many gates λ kills depends on how many steps there are: one that Adam does not
    move dies after 1/λ of them, one that it draws down, earlier. What a budget leaves does not.
    """

    sparsity: Strength = 5e-3  # λ, a step
    lr: Rate = 1e-2  # of the gates
    operator: Literal["soft", "sora"] = "soft"
    l1: Strength = 0.0  # times the mean |g|, in the loss (SoRA: 10)
    rank: Share | Positive | None = 0.5  # at most so many ranks a layer, in the mean
    bytes: Positive | None = None  # at most so many bytes of adapter
    schedule: Literal["constant", "linear", "log-linear"] = "linear"  # of λ; of a budget linear where not constant
    first: Rate = 1e-6  # λ in the first round of a schedule
    rounds: Positive = 10  # that a schedule takes; a shorter run ends on the way, or at its end by fine-tuning
    compact: bool = True  # dead ranks leave the tensors at a round's end; else their gates may come back

    def greet(self) -> None:
        """What is said before the first round."""
        if self.lr <= self.sparsity:
            log.warning(
                "[method.pruning] lr %g is not above sparsity %g: the proximal step outweighs a step of the gates, and "
                "useful ranks die with the others; raise lr, or lower sparsity.",
                self.lr,
                self.sparsity,
            )
        if self.rank is not None and self.bytes is not None:
            log.warning(
                "[method.pruning] rank %g and bytes %d are two budgets, which both hold; rank = 'none' leaves one.",
                *(self.rank, self.bytes),
            )

    def progress(self, round: int | str) -> float:
        """How far a schedule is in a round, 0 to 1; at its end after the last round."""
        done = self.schedule == "constant" or isinstance(round, str)
        return 1.0 if done else min(1.0, int(round) / self.rounds)

    def threshold(self, round: int | str) -> float:
        """λ of a round; 0 in all of them where it is 0 at the end."""
        if not self.sparsity:
            return 0.0
        s = self.progress(round)
        if self.schedule == "log-linear":
            return float(self.first ** (1 - s) * self.sparsity**s)
        return (1 - s) * self.first + s * self.sparsity

    def penalty(self, tensors: Tensors) -> Tensor:
        """The L1 term of the loss: `l1` times the mean |g| over all gates; a scalar."""
        gates = torch.cat([leaves["gate"] for leaves in by_place(tensors).values() if "gate" in leaves])
        return self.l1 * gates.abs().sum() / max(1, len(gates))

    def descending(self, round: int | str) -> Callable[[State, Tensors, Training], State]:
        """`training.descend` for a state with gates: they take their own step, unclipped, and the proximal one."""

        def step(state: State, slope: Tensors, training: Training) -> State:
            gates = [f"{place}/gate" for place, own in by_place(slope).items() if "gate" in own]
            adam = replace(training, optimiser="adamw", lr=self.lr, clip=None)
            moved = descend(state, only(gates, slope), adam)
            shrunk = {name: self.shrunk(moved.tensors[name], self.threshold(round)) for name in gates}
            others = {name: g for name, g in slope.items() if name not in shrunk}
            return descend(State({**moved.tensors, **shrunk}, moved.moments), others, training)

        return step

    def shrunk(self, gate: Tensor, threshold: float) -> Tensor:
        """A gate after the proximal step of λ = `threshold`."""
        if self.operator == "soft":
            return F.softshrink(gate, threshold)
        moved = torch.where(gate > threshold, gate - threshold, gate)
        moved = torch.where(moved < -threshold, moved + threshold, moved)
        return torch.where(moved.abs() < threshold, 0.0, moved)

    def ended(self, round: int | str, site: str, began: Tensors, trained: State, whole: Mapping[str, int]) -> State:
        """What a round leaves: the state within its budget, without dead ranks; a layer that lost its last one is told.

        site: its name; began: the tensors before the round; whole: the rank of each layer before any pruning
        """
        within = replace(trained, tensors=self.budgeted(trained.tensors, round, whole))
        before, left = ranks(began), ranks(within.tensors)
        if dead := [place for place, n in left.items() if not n and before[place]]:
            log.warning(
                "site '%s', %s: no rank is left at %s; there the local branch is the frozen model.",
                *(site, stage(round), ", ".join(dead)),
            )
        return compacted(within) if self.compact else within

    def budgeted(self, tensors: Tensors, round: int | str, whole: Mapping[str, int]) -> dict[str, Tensor]:
        """The tensors, the gates of the ranks for which the budget has no room at zero.

        whole: the rank of each layer before any pruning
        """
        gated = {place: leaves for place, leaves in by_place(tensors).items() if "gate" in leaves}
        cost = {place: 4 * (ls["A"].shape[1] + ls["B"].shape[0] + 1) for place, ls in gated.items()}  # a rank's bytes
        count = self.rank and self.rank * (sum(whole[place] for place in gated) if self.rank < 1 else len(gated))
        for most, costs in ((self.bytes, cost), (count, dict.fromkeys(gated, 1))):
            if most is not None:
                full = sum(whole[place] * costs[place] for place in gated)
                room = full - max(0, full - most) * self.progress(round)
                gated = {
                    place: {**leaves, "gate": gate}
                    for (place, leaves), gate in zip(gated.items(), _best(gated, costs, room), strict=True)
                }
        return {**tensors, **{f"{place}/gate": leaves["gate"] for place, leaves in gated.items()}}


def penalty(pruning: Pruning | None, tensors: Tensors) -> Tensor | float:
    """What pruning adds to the loss."""
    return 0.0 if pruning is None else pruning.penalty(tensors)


def descending(pruning: Pruning | None, round: int | str) -> Callable[[State, Tensors, Training], State]:
    """How a step is taken under pruning, or without."""
    return descend if pruning is None else pruning.descending(round)


def _best(gated: Mapping[str, Tensors], costs: Mapping[str, int], room: float) -> list[Tensor]:
    """The gates, those at zero that come too late in the order of importance."""
    worth = torch.cat([importance(leaves) for leaves in gated.values()])
    spent = torch.tensor([costs[place] for place, leaves in gated.items() for _ in leaves["gate"]])
    order = worth.argsort(descending=True, stable=True)
    kept = torch.empty_like(worth)
    kept[order] = (spent[order].cumsum(0) <= room).to(worth)
    parts = torch.split(kept, [len(leaves["gate"]) for leaves in gated.values()])
    return [leaves["gate"] * part for leaves, part in zip(gated.values(), parts, strict=True)]


def importance(leaves: Tensors) -> Tensor:
    """‖A_i‖ |g_i| ‖B_i‖ of each rank of one place, (r)."""
    worth: Tensor = leaves["A"].norm(dim=1) * leaves["gate"].abs() * leaves["B"].norm(dim=0)
    return worth


def ranks(tensors: Tensors) -> dict[str, int]:
    """How many ranks are alive, by place."""
    return {
        place: int(leaves["gate"].count_nonzero()) if "gate" in leaves else leaves["A"].shape[0]
        for place, leaves in by_place(tensors).items()
        if "A" in leaves
    }


def compacted(state: State) -> State:
    """The state without dead ranks: A, B and gates, and their moments. A layer without a rank keeps tensors of width 0,
    which add nothing."""
    gated = {place: own["gate"] for place, own in by_place(state.tensors).items() if "gate" in own}
    alive = {place: (Order(gate.nonzero()[:, 0]), 0.0) for place, gate in gated.items()}
    parts = {key: carried(under(key, state.moments), alive, LoRA.symmetry) for key in "mv"}
    moments = {name: tensor for key, part in parts.items() for name, tensor in at(key, part).items()}
    return State(carried(state.tensors, alive, LoRA.symmetry), {**state.moments, **moments})
