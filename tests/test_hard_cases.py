"""Methods that strain the type of a method, each in a few lines: what it cannot carry, it should not claim to."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedloom.adapters import IA3, Attention, Bottleneck, LoRA, Prompt
from fedloom.backbones import Adaptable, Batch
from fedloom.check import check_method, federation
from fedloom.check.tiny import tiny_clip
from fedloom.data import Dataset, Example
from fedloom.engines.local import LocalEngine, Participant
from fedloom.errors import LawError
from fedloom.federation import Schedule, federate
from fedloom.methods import Ensemble, FedAvg, FedOpt, Scaffold
from fedloom.places import Adapter
from fedloom.site import Answer, Site, Update
from fedloom.store import Store
from fedloom.tasks import Classification, Detection, Ranking, Task
from fedloom.tensors import (
    Private,
    Shared,
    Tensors,
    at,
    by_place,
    mean,
    of_model,
    only,
    squared_distance,
    under,
    without,
)
from fedloom.training import State, Training, fit, head, step

COLOURS = Classification(("red", "green", "blue"), head="linear")
Folded = tuple[Shared, Mapping[str, float]]


@dataclass(frozen=True)
class Base:
    """What the methods below have in common with FedAvg."""

    adapter: Any = field(default_factory=lambda: LoRA(rank=2))
    individual: ClassVar[bool] = False
    sends: ClassVar[frozenset[str]] = frozenset()
    heads: ClassVar[Literal["private", "shared"]] = "private"

    def start(self, model: Adaptable, task: Task | None, sites: int, seed: int) -> Shared:
        return Shared(model.init(self.adapter, seed))

    def aggregate(self, shared: Shared, answers: Iterable[Answer]) -> Folded:
        return Shared(mean((answer.update.tensors, answer.update.weight) for answer in answers)), {}

    def personalise(self, site: Site, shared: Shared, private: Private, epochs: int) -> Private:
        tuned = FedAvg(self.adapter).personalise(site, self.served(shared), private, epochs)
        return Private({**private, **tuned})

    def serve(self, site: Site, shared: Shared, private: Private) -> Callable[[Batch], Tensor]:
        return FedAvg(self.adapter).serve(site, self.served(shared), private)

    def served(self, shared: Shared) -> Shared:
        return Shared(without("control", shared))


# 1. Control variates at the server and at every site.


class Unsaid(Scaffold):
    """SCAFFOLD that does not say what it sends."""

    sends: ClassVar[frozenset[str]] = frozenset()


def test_scaffold() -> None:
    sites = tuple(replace(site, training=Training(lr=0.05, batch=2)) for site in federation())
    check_method(Scaffold(), sites)
    with pytest.raises(LawError, match="computed from 'control/'"):
        check_method(Unsaid(), sites)


def test_scaffold_s_controls_cancel_drift(tmp_path: Path) -> None:
    """With all sites in every round, the server's control is the mean of theirs: the paper's invariant."""
    sites = [
        replace(site, training=Training(lr=0.05, batch=2)) for site in federation(Classification(("red", "green")))
    ]
    shared, privates = rounds(Scaffold(), sites, 3, tmp_path)
    average = mean((at("control", under("control", private)), 1.0) for private in privates.values())
    assert any(tensor.abs().max() > 1e-4 for tensor in average.values())
    torch.testing.assert_close(at("control", under("control", shared)), average, rtol=1e-4, atol=1e-6)


# 2. Moments that only the server has.


def test_moments_of_the_server_stay_there(tmp_path: Path) -> None:
    shared, privates = rounds(FedOpt(), list(federation()), 2, tmp_path)
    assert under("server/v", shared)
    assert not any(under("server", private) for private in privates.values())


# 3. FedPIA's shape: a private adapter that is sent on purpose, a probe, matching at the site, weights by distance;
#    at the server with diagnostics, or at the site so that a mean suffices.


@dataclass(frozen=True)
class Integrating(Base):
    adapter: Bottleneck = field(default_factory=lambda: Bottleneck(6))
    matching: Literal["server", "site"] = "server"
    gamma: float = 1.0
    beta: float = 0.5
    probe: int = 2
    sends: ClassVar[frozenset[str]] = frozenset({"local"})

    @property
    def individual(self) -> bool:  # type: ignore[override]
        return self.matching == "server"

    def start(self, model: Adaptable, task: Task | None, sites: int, seed: int) -> Shared:
        beside = {"control/e": torch.ones(())} if self.matching == "site" else {}
        return Shared({**super().start(model, task, sites, seed), **beside})

    def weight(self, tensors: Tensors, shared: Tensors) -> Tensor:
        return torch.exp(-self.gamma * squared_distance(of_model(shared), tensors))

    def local_round(self, round: int, site: Site, shared: Shared, private: Private) -> tuple[Update, Private]:
        current = of_model(shared)
        local = under("local", private) or current
        order = self.matched(site, current, local)
        start = {name: (1 - self.beta) * local[name] + self.beta * order[name] for name in local}
        trained, value = fit(site, {**start, **head(site, private)}, lambda t, b: site.loss(self.adapter, t, b), round)
        sent, e = only(current, trained), torch.ones(())
        if self.matching == "site":
            e = self.weight(sent, current)
            sent = {**{name: e * tensor for name, tensor in sent.items()}, "control/e": e}
        update = Update(Shared(sent), 1.0, len(site), {"loss": value, "e": float(e)})
        return update, Private({**at("head", under("head", trained)), **at("local", only(current, trained))})

    def matched(self, site: Site, shared: Tensors, local: Tensors) -> dict[str, Tensor]:
        """The shared adapter's units in the order of the local one's, by their activations on a probe."""
        adapted, own, batch = by_place(shared), by_place(local), site.probe(min(self.probe, len(site)))
        for place, h, mask in site.model.inputs(batch, self.adapter, local):
            a, b = (self.adapter.pre(h, t[place.name])[mask].T for t in (adapted, own))
            order = torch.as_tensor(linear_sum_assignment(-torch.corrcoef(torch.cat([b, a]))[: len(b), len(b) :])[1])
            for leaf, axes in self.adapter.symmetry.items():
                adapted[place.name][leaf] = adapted[place.name][leaf].index_select(axes.index("hidden"), order)
        return {name: t for place, leaves in adapted.items() for name, t in at(place, leaves).items()}

    def aggregate(self, shared: Shared, answers: Iterable[Answer]) -> Folded:
        if self.matching == "site":
            folded = mean((answer.update.tensors, answer.update.weight) for answer in answers)
            e = folded["control/e"]
            return Shared({name: tensor / e for name, tensor in folded.items()}), {"e": float(e)}
        weighted = [(answer.update.tensors, float(self.weight(answer.update.tensors, shared))) for answer in answers]
        return Shared(mean(weighted)), {f"e/{i}": weight for i, (_, weight) in enumerate(weighted)}


@pytest.mark.parametrize("matching", ["server", "site"])
def test_private_adapters_that_are_sent_and_weighted(matching: Any) -> None:
    check_method(Integrating(matching=matching))


def test_weights_at_the_server_need_every_update() -> None:
    class Denying(Integrating):
        individual = False  # type: ignore[assignment]

    with pytest.raises(LawError, match="only the weighted mean"):
        check_method(Denying(gamma=3.0))


def test_weights_at_the_site_are_weights_at_the_server(tmp_path: Path) -> None:
    sites = list(federation())
    server, site = (
        rounds(Integrating(matching=matching), sites, 2, tmp_path / matching)[0]  # type: ignore[arg-type]
        for matching in ("server", "site")
    )
    torch.testing.assert_close(dict(server), of_model(site), rtol=1e-5, atol=1e-6)
    unweighted, _ = rounds(Integrating(gamma=0.0), sites, 2, tmp_path / "0")
    assert any(not torch.equal(tensor, server[name]) for name, tensor in unweighted.items())


# 4. FedDLP's shape: a private adapter beside the shared one, each the other's teacher, moments that go on.


@dataclass(frozen=True)
class Dual(Base):
    own: LoRA = field(default_factory=lambda: LoRA(rank=3, gated=True))

    def local_round(self, round: int, site: Site, shared: Shared, private: Private) -> tuple[Update, Private]:
        local = State(
            {**(under("local", private) or site.model.init(self.own, site.seed)), **head(site, private)},
            under("opt/local", private),
        )
        both = State(dict(shared), under("opt/shared", private))
        for batch in site.batches(round):
            teacher = site.logits(self.adapter, {**both.tensors, **at("head", under("head", local.tensors))}, batch)
            local, _ = step(local, lambda t, b=batch, z=teacher: self.taught(site, self.own, t, b, z), site.training)
            heads = {name: t for name, t in local.tensors.items() if name.startswith("head/")}
            teacher = site.logits(self.own, local.tensors, batch)
            both, value = step(
                both,
                lambda t, b=batch, z=teacher, h=heads: self.taught(site, self.adapter, {**t, **h}, b, z),
                site.training,
            )
        after = {
            **at("local", without("head", local.tensors)),
            **at("head", under("head", local.tensors)),
            **at("opt/local", local.moments),
            **at("opt/shared", both.moments),
        }
        return Update(Shared(both.tensors), len(site), len(site), {"loss": value}), Private(after)

    def taught(self, site: Site, adapter: Adapter, tensors: Tensors, batch: Batch, teacher: Tensor) -> Tensor:
        logits = site.logits(adapter, tensors, batch)
        log_p, log_q = teacher.detach().log_softmax(1), logits.log_softmax(1)
        return site.task.loss(logits, batch.targets) + (log_p.exp() * (log_p - log_q)).sum(1).mean()

    def personalise(self, site: Site, shared: Shared, private: Private, epochs: int) -> Private:
        if not epochs:
            return private
        start = {**(under("local", private) or site.model.init(self.own, site.seed)), **head(site, private)}
        tuned, _ = fit(site, start, lambda t, b: site.loss(self.own, t, b), "fine-tuning", epochs)
        return Private({**private, **at("local", without("head", tuned)), **at("head", under("head", tuned))})

    def serve(self, site: Site, shared: Shared, private: Private) -> Callable[[Batch], Tensor]:
        fresh, kept = site.task.init(site.model.dim, site.seed), at("head", under("head", private))
        if local := under("local", private):
            return lambda batch: site.logits(self.own, {**local, **fresh, **kept}, batch)
        return lambda batch: site.logits(self.adapter, {**shared, **fresh, **kept}, batch)


def test_two_adapters_that_teach_each_other(tmp_path: Path) -> None:
    check_method(Dual())
    _, privates = rounds(Dual(), list(federation()), 2, tmp_path)
    steps = {float(t) for name, t in privates["site-0"].items() if name.startswith("opt/") and "/t/" in name}
    assert steps == {6.0}  # two rounds of three batches, the moments of one adapter going on


# 5. Sites whose tasks differ in kind and in labels; a newcomer to each.


def test_mixed_tasks_with_private_heads(tmp_path: Path) -> None:
    findings = Detection(("nodule", "effusion"))
    sites = list(federation(COLOURS, findings))
    for method in (FedAvg(), Dual(), Integrating(matching="site")):
        check_method(method, sites)
    *old, new = sites
    shared, privates = rounds(FedAvg(), old, 2, tmp_path)
    assert [private["head/weight"].shape[0] for private in privates.values()] == [3, 2, 3]
    private = FedAvg().personalise(new, shared, Private({}), 1)
    assert private["head/weight"].shape[0] == 2


@pytest.mark.parametrize(
    "method", [Scaffold(), FedOpt(), Ensemble(), Integrating(), Dual()], ids=lambda m: type(m).__name__
)
def test_a_newcomer_learns_from_nothing_and_sends_nothing(method: Any, tmp_path: Path) -> None:
    *old, _ = sites = federation()
    new = replace(sites[0], name="new", training=Training(lr=0.03, batch=2, warmup_head=3))
    shared, _ = rounds(method, old, 2, tmp_path)
    seen = Shared(without("server", shared))
    private = method.personalise(new, seen, Private({}), 10)
    (whole,) = new.passes(new.train)
    before, after = (method.serve(new, seen, state)(whole) for state in (Private({}), private))
    assert new.task.loss(after, whole.targets) < 0.5 * new.task.loss(before, whole.targets)


# 6. Positions that stand in a block's sequence while it runs, in both towers; factors of what a layer returns.


@pytest.mark.parametrize("towers", [("vision",), ("vision", "text")], ids=str)
@pytest.mark.parametrize("adapter", [Prompt(3), IA3(), Attention()], ids=lambda adapter: type(adapter).__name__)
def test_adapters_that_do_not_add(adapter: Adapter, towers: tuple[str, ...]) -> None:
    task = COLOURS if towers == ("vision",) else Classification(COLOURS.labels)
    network = tiny_clip()
    network = type(network)(network.module, (network.image_processor, network.tokenizer), towers)
    model = Adaptable(network)
    check_method(FedAvg(adapter), tuple(replace(site, model=model) for site in federation(task)))


# 7. Candidate answers, ranked by the backbone (ALBEF): no head, scores from texts.


@pytest.fixture(scope="module")
def albef() -> Adaptable:
    from transformers import BertTokenizer, ViTImageProcessorPil

    from fedloom.backbones.albef import Albef
    from fedloom.backbones.albef_model import AlbefConfig, AlbefModel

    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "which", "colour", "?", "red", "green", "dark", "blue")
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    config = AlbefConfig(
        vision_config={**sizes, "num_hidden_layers": 2, "image_size": 16, "patch_size": 8},
        text_config={**sizes, "num_hidden_layers": 2, "vocab_size": len(words), "max_position_embeddings": 12},
        fusion_layers=1,
        projection_dim=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = AlbefModel(config)
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=12)
    return Adaptable(Albef(module, (ViTImageProcessorPil(size={"height": 16, "width": 16}), tokenizer)))


def asked(sites: Iterable[Site], model: Adaptable, task: Ranking) -> Iterator[Site]:
    """The same pictures, each with a question."""
    for site in sites:
        parts = (
            Dataset(tuple(Example(e.label, e.image, "which colour ?") for e in part.examples), part.pixels)
            for part in (site.train, site.held_out)
        )
        yield Site(site.name, model, task, *parts, site.training, site.seed)


@pytest.mark.parametrize("adapter", [Bottleneck(3), LoRA(rank=2, targets=("x_q_proj", "v_proj"))], ids=str)
def test_ranked_candidates(albef: Adaptable, adapter: Adapter) -> None:
    sites = tuple(asked(federation(), albef, Ranking(("red", "green", "dark blue", "blue"))))
    check_method(FedAvg(adapter), sites)
    few, many = (replace(sites[0], task=Ranking(labels)) for labels in (("red", "green"), ("green", "blue", "red")))
    tensors = albef.init(adapter, 0)
    (a,), (b,) = few.passes(few.train), many.passes(many.train)
    one, other = few.logits(adapter, tensors, a), many.logits(adapter, tensors, b)
    torch.testing.assert_close(one, other[:, [2, 0]], rtol=1e-5, atol=1e-5)  # a candidate's score is its own


def rounds(method: Any, sites: list[Site], n: int, folder: Path) -> tuple[Shared, dict[str, Private]]:
    own = {site.name: Participant(site, Store(folder / site.name), site.held_out) for site in sites}
    common = sites[0].task if all(site.task == sites[0].task for site in sites) else None
    shared = method.start(sites[0].model, common, len(sites), 0)
    for ended in federate(method, LocalEngine(method, own), shared, Schedule(tuple(own), n)):
        shared = ended.shared
    return shared, {name: Private(part.store.before(n)[1]) for name, part in own.items()}
