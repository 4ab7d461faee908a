"""A frozen backbone that takes adapters from outside.

The backbone is a plain Hugging Face model in eval mode, wrapped in a `Network` that says where adapters may go and how
a batch becomes features. Adapters are put in for the length of one call: added, scaled and inserted ones by forward
hooks, replaced ones by `torch.func.functional_call`. One backbone in memory serves every site and every adapter.

The backbone may be on an accelerator. All that goes in and comes out is on the CPU: adapters are small, and so nothing
outside has to know where the pass runs.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedloom.adapters import Everything, Head
from fedloom.backbones.batches import Batch, Features, form, joined
from fedloom.backbones.network import Junction, Network
from fedloom.errors import AdapterError
from fedloom.fused import FUSED, Fused
from fedloom.parted import Parted
from fedloom.places import Adapter, Added, Inserted, Place, Replaced, Scaled
from fedloom.tensors import RESERVED, Tensors, by_place, generator, padded

CPU = torch.device("cpu")

Kernels = Literal["plain", "fused", "short"]
Use = Callable[[Place, Tensor, Tensor], Tensor]  # (place, input, output) -> output
Call = tuple[Batch, Adapter, Tensors]
Insert = Callable[[Place], Tensor | None]  # place -> positions, (n, dim)


class Adaptable:
    """A network whose layers take an adapter from outside. Holds no state between calls but which kernels it uses."""

    def __init__(self, network: Network, checkpointing: bool = False):
        network.module.requires_grad_(False).eval()
        self.network = network
        self.dim = network.dim
        self.places: tuple[Place, ...] = tuple(network.places)
        weight = next(network.module.parameters())
        self.dtype, self.device = weight.dtype, weight.device
        self._names = frozenset(place.name for place in self.places)
        self.use("plain")
        self._use: Use | None = None
        self._insert: Insert | None = None
        for place, module in network.places.items():
            module.register_forward_hook(self._hook(place))
        for place, module in network.sequences.items():
            if place.kind == "words":
                module.register_forward_hook(self._worded(place))
                continue
            module.register_forward_pre_hook(self._entering(place), with_kwargs=True)
            module.register_forward_hook(self._leaving(place))
        self._wrapped = _Wrapped(network)
        self._paths = {module: name for name, module in network.module.named_modules()}
        # Where in the Hugging Face model a linear place or a block place is.
        self.modules: Mapping[str, str] = {
            place.name: self._paths[module] for place, module in network.places.items() if module in self._paths
        }
        self._replaceable = frozenset(self._parameters(Everything()))
        self._checkpointing = checkpointing
        if checkpointing:
            self._checkpoint()

    def use(self, kernels: Kernels) -> None:
        """Whether an adapter runs as its own formula or, where there is one, as a function of `fedloom.fused`; short:
        the latter, and of the last block no more than the pooled features read, which differs by rounding."""
        self._kernels: Mapping[type, Fused] = {Parted: FUSED[Parted]} if kernels == "plain" else FUSED
        self._short = kernels == "short"

    def init(self, adapter: Adapter, *seed: object) -> dict[str, Tensor]:
        """Fresh tensors: at each place a function of (seed, place) alone; of a replaced adapter, the model's own."""
        if isinstance(adapter, Replaced):
            taken = self._parameters(adapter)
            if not taken:
                raise AdapterError(f"{adapter} finds no parameter to train in the adapted towers of this backbone.")
            return {name: parameter.detach().cpu().float().clone() for name, parameter in taken.items()}
        tensors: dict[str, Tensor] = {}
        places = self.network.sequences if isinstance(adapter, Inserted) else self.places
        for place in filter(adapter.at, places):
            rng = generator(*seed, place.name)
            tensors |= {f"{place.name}/{leaf}": t for leaf, t in adapter.init(place, rng).items()}
        if not tensors and not isinstance(adapter, Head):
            layers = sorted({place.layer for place in self.places if place.kind == "linear"})
            raise AdapterError(f"{adapter} finds no place in the adapted towers; their linear layers are {layers}.")
        return tensors

    def __call__(self, batch: Batch, adapter: Adapter, tensors: Tensors) -> Features:
        """Features of a batch under an adapter. Tensors under a reserved first part (a head, moments) are left out."""
        return self._features(batch.to(self.device), adapter, tensors).to(CPU)

    def _features(self, batch: Batch, adapter: Adapter, tensors: Tensors) -> Features:
        if isinstance(adapter, Replaced):
            return self._replaced(batch, tensors)
        own, put = self._own(tensors), adapter

        def use(place: Place, h: Tensor, out: Tensor) -> Tensor:
            leaves = own.get(place.name)
            if leaves is None:
                return out
            if isinstance(put, Scaled):
                return out * put.factor(out.float(), leaves).to(out.dtype)
            if (fused := self._kernels.get(type(put))) is not None:
                return fused(put, h, out, leaves)
            return out + put(h.float(), leaves).to(out.dtype)  # type: ignore[operator]  # it is `Added`

        def insert(place: Place) -> Tensor | None:
            leaves = own.get(place.name)
            return None if leaves is None else put.positions(leaves)  # type: ignore[union-attr]  # it is `Inserted`

        short = not self._checkpointing and (self._short or isinstance(put, Parted))
        with self._using(None, insert) if isinstance(put, Inserted) else self._using(use, short=short):
            return self.network.features(batch, {place.tower for place in self.places if place.name in own})

    def together(self, asked: Sequence[Call]) -> list[Features]:
        """What each of these calls gives, in one pass over all their rows where they can share one.

        They can where batches are of one form, and adapters are added at the same places of the trunk. What lies below
        all adapters runs once for a batch that all calls share, the last block as in `short`. It differs from one after
        the other by rounding.
        """
        batches, adapters, tensors = zip(*asked, strict=True)
        own = [self._own(one) for one in tensors]
        alike = all(places.keys() == own[0].keys() for places in own) and len({form(batch) for batch in batches}) == 1
        trunk = all(place.tower == self.network.trunk for place in self.places if place.name in own[0])
        if not (alike and trunk and all(isinstance(adapter, Added) for adapter in adapters)):
            return [self(*one) for one in asked]
        parts = {
            f"{place}/{i}/{leaf}": tensor
            for i, places in enumerate(own)
            for place, leaves in places.items()
            for leaf, tensor in leaves.items()
        }
        if all(batch is batches[0] for batch in batches):
            batches = (self.begun(batches[0], adapters),) * len(batches)
        whole = self(joined(batches), Parted(adapters), parts)
        n = len(batches[0])
        scores = [None] * len(asked) if whole.scores is None else torch.split(whole.scores, n)
        return [Features(*pair) for pair in zip(torch.split(whole.pooled, n), scores, strict=True)]

    def begun(self, batch: Batch, adapters: Sequence[Adapter]) -> Batch:
        """The batch for several calls: what lies below all these adapters runs once, with the same bits."""
        frozen = [self.frozen_blocks(adapter) for adapter in adapters]
        if batch.prefix or None in frozen:
            return batch
        kept = self.prefix([batch], min(blocks for blocks in frozen if blocks is not None))
        return replace(batch, images=None, prefix=kept) if kept else batch

    def inputs(self, batch: Batch, adapter: Added, tensors: Tensors) -> Iterator[tuple[Place, Tensor, Tensor]]:
        """What the adapter reads at each place, (m, positions, in_dim), and which positions are not padding."""
        own, batch = self._own(tensors), batch.to(self.device)
        read: list[tuple[Place, Tensor]] = []

        def spy(place: Place, h: Tensor, out: Tensor) -> Tensor:
            if place.name not in own:
                return out
            read.append((place, h.float()))
            return out + adapter(h.float(), own[place.name]).to(out.dtype)

        with torch.no_grad(), self._using(spy):
            self.network.features(batch, {place.tower for place in self.places})
        for place, h in read:
            yield place, h.cpu(), self.network.mask(place, batch, h).cpu()

    def frozen_blocks(self, adapter: Adapter) -> int | None:
        """How many of the first blocks an adapter leaves as they are, so that their result may be kept; None: not even
        the embeddings."""
        if isinstance(adapter, Replaced):
            return None
        trunk = [place for place in self.places if place.tower == self.network.trunk]
        return self.network.blocks - max((place.height for place in trunk if adapter.at(place)), default=0)

    @torch.no_grad()
    def prefix(self, batches: Sequence[Batch], blocks: int) -> dict[str, Tensor]:
        """What the first frozen blocks make of these batches, one after the other, filled up to the longest example."""
        parts = [self.network.prefix(batch.to(self.device), blocks) for batch in batches]
        return {name: padded([part[name].cpu() for part in parts]) for name in parts[0]}

    def _own(self, tensors: Tensors) -> dict[str, dict[str, Tensor]]:
        """By place, on the backbone's device."""
        own = {
            place: {leaf: tensor.to(self.device) for leaf, tensor in leaves.items()}
            for place, leaves in by_place(tensors).items()
            if place not in RESERVED
        }
        if unknown := own.keys() - self._names:
            raise AdapterError(
                f"the adapter has tensors at '{min(unknown)}', and this backbone has no such place "
                f"(it has {self.places[0].name} ... {self.places[-1].name}): they are of another backbone or tower."
            )
        return own

    def _hook(self, place: Place) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            if self._use is None:
                return out
            reads_output = place.kind == "block" and not isinstance(module, Junction)
            return self._use(place, out if reads_output else args[0], out)

        return hook

    def _entering(self, place: Place) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
            positions = None if self._insert is None else self._insert(place)
            if positions is None:
                return None
            h, *rest = args
            n = len(positions)
            longer = torch.cat([positions.to(h.dtype).expand(len(h), -1, -1), h], 1)
            return (longer, *(_seen(x, n) for x in rest)), {name: _seen(x, n) for name, x in given.items()}

        return hook

    def _leaving(self, place: Place) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
            positions = None if self._insert is None else self._insert(place)
            if positions is None:
                return out
            n = len(positions)
            return (out[0][:, n:], *out[1:]) if isinstance(out, tuple) else out[:, n:]

        return hook

    def _worded(self, place: Place) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            words = None if self._insert is None else self._insert(place)
            if words is None:
                return out
            n = len(words)
            if not (torch.compiler.is_exporting() or _begin_alike(out, n)):
                raise AdapterError(
                    f"the texts do not all begin with the same {n} words, in place of which {n} are learned: begin the "
                    f"task's template with as many, as in '{'X ' * n}{{}}.'"
                )
            return torch.cat([words.to(out.dtype).expand(len(out), -1, -1), out[:, n:]], 1)

        return hook

    @contextlib.contextmanager
    def _using(self, use: Use | None, insert: Insert | None = None, short: bool = False) -> Iterator[None]:
        before = self._use, self._insert, self.network.short
        self._use, self._insert, self.network.short = use, insert, short
        try:
            yield
        finally:
            self._use, self._insert, self.network.short = before

    def _parameters(self, adapter: Replaced) -> dict[str, nn.Parameter]:
        taken: dict[nn.Parameter, str] = {}  # a tied parameter once, under its first name
        for root in self.network.adapted:
            for module in root.modules():
                for leaf, parameter in module.named_parameters(recurse=False):
                    if adapter.takes(module, leaf):
                        taken.setdefault(parameter, f"{self._paths[module]}/{leaf}")
        return {name: parameter for parameter, name in taken.items()}

    def _replaced(self, batch: Batch, tensors: Tensors) -> Features:
        parameters = {}
        for name, tensor in tensors.items():
            place, _, leaf = name.partition("/")
            if place in RESERVED:
                continue
            if name not in self._replaceable:
                raise AdapterError(
                    f"the adapter replaces '{name}', and the adapted towers of this backbone have no such parameter: "
                    "it was made for another backbone or tower."
                )
            parameters[f"module.{place}.{leaf}".replace("..", ".")] = tensor.to(self.device, self.dtype)
        features: Features = torch.func.functional_call(self._wrapped, parameters, (batch, self._towers()))
        return features

    def _towers(self) -> set[str]:
        return {place.tower for place in self.places}

    def _checkpoint(self) -> None:
        """Recompute each block in the backward pass, under the adapter that was in use in the forward pass."""

        def contexts() -> tuple[Any, Any]:
            return contextlib.nullcontext(), self._using(self._use, self._insert)

        self.network.module.activation_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})  # type: ignore[operator]
        for module in self.network.module.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True  # which is when Hugging Face checkpoints; its layers stay in eval mode


def _seen(mask: Any, n: int) -> Any:
    """An attention mask (rows, heads, positions, positions), additive or boolean, for n positions more, that all see;
    what is no mask, as it is."""
    if not (isinstance(mask, Tensor) and mask.dim() == 4):
        return mask
    return F.pad(mask, (n, 0, n, 0), value=float(mask.dtype == torch.bool))


def _begin_alike(words: Tensor, n: int) -> bool:
    """Whether all texts have n words, and the same ones."""
    first = words[:, :n]
    return first.shape[1] == n and torch.equal(first, first[:1].expand_as(first))


class _Wrapped(nn.Module):
    """A forward pass for `functional_call`, which needs a module's."""

    def __init__(self, network: Network):
        super().__init__()
        self.module = network.module
        self.network = network

    def forward(self, batch: Batch, live: Collection[str]) -> Features:
        return self.network.features(batch, live)
