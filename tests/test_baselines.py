"""Baselines that train or serve in another way, each held against a plain implementation that shares no code with
it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw

from fedloom import training
from fedloom.adapters import Bottleneck, LoRA, Sum
from fedloom.engines.local import LocalEngine, Participant
from fedloom.federation import Schedule, federate, visible
from fedloom.methods import METHODS, Ditto, Ensemble, FedAvg, FedDAT, FedOpt, FedPIA, Local, Method, Scaffold
from fedloom.methods.ensemble import logits_of, separate
from fedloom.site import Answer, Site, Update
from fedloom.store import Store
from fedloom.tasks import VQA, Classification, Detection
from fedloom.tensors import Private, Shared, Tensors, at, only, squared_distance, under
from fedloom.training import Training

Make = Callable[..., Site]
ADAPTER = LoRA(rank=2)
BY_HEAD = Classification(("cat", "dog", "bird"), head="linear")
SGD = Training(lr=0.05, optimiser="sgd", batch=2)
ADAMW = Training(lr=0.01, batch=2)


def rounds(method: Method, sites: list[Site], n: int, folder: Path) -> tuple[Shared, dict[str, Private]]:
    """What `shared` and each site's private state are after n rounds."""
    own = {site.name: Participant(site, Store(folder / site.name), site.held_out) for site in sites}
    shared = method.start(sites[0].model, sites[0].task, len(sites), seed=3)
    for ended in federate(method, LocalEngine(method, own), shared, Schedule(tuple(own), n)):
        shared = ended.shared
    return shared, {name: Private(part.store.before(n)[1]) for name, part in own.items()}


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("frozen", "majority", "pooled")])
def test_every_method_takes_the_steps_of_torch_s_plain_adamw(
    site: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The fused kernel reads memory in its order, and a method can make a gradient that lies there in another."""
    sites = [site(training=ADAMW), site("paris", 4, training=ADAMW)]
    method = FedPIA(probe=2) if name == "fedpia" else METHODS[name]()
    shared, privates = rounds(method, sites, 1, tmp_path)  # so that what a server leaves beside an adapter is there
    fused, own = method.local_round(1, sites[0], visible(shared), privates["oxford"])
    monkeypatch.setattr(training, "adamw", lambda *args, **kwargs: adamw(*args, **{**kwargs, "fused": False}))
    plain, other = method.local_round(1, sites[0], visible(shared), privates["oxford"])
    torch.testing.assert_close({**fused.tensors, **own}, {**plain.tensors, **other}, rtol=0, atol=ADAMW.lr / 100)


# An ensemble of everyone's adapters, and its distillation.


def test_an_ensemble_s_members_train_as_local_ones_and_serve_together(site: Make, tmp_path: Path) -> None:
    sites = [site("St. Mary's / east"), site("paris", 4), site("rome", 2)]
    shared, privates = rounds(Ensemble(ADAPTER), sites, 2, tmp_path / "ensemble")
    _, alone = rounds(Local(ADAPTER), sites, 2, tmp_path / "local")
    assert all(same(privates[name], alone[name]) for name in alone)  # all start alike: site.seed is the federation's
    for own in sites:
        batch = own.batch(own.held_out, [0, 1])
        head = at("head", under("head", alone[own.name]))
        adapters = [under("local", private) for private in alone.values()]
        each = [own.logits(ADAPTER, {**adapter, **head}, batch).softmax(1) for adapter in adapters]
        served = Ensemble(ADAPTER).serve(own, shared, privates[own.name])(batch)
        torch.testing.assert_close(served.softmax(1), sum(each) / 3, rtol=1e-4, atol=1e-6)
        assert not torch.equal(each[0], each[1])


def test_an_ensemble_of_one_is_local_training(site: Make, tmp_path: Path) -> None:
    oxford = site()
    shared, privates = rounds(Ensemble(ADAPTER), [oxford], 2, tmp_path)
    batch = oxford.batch(oxford.held_out, [0, 1])
    served = Ensemble(ADAPTER).serve(oxford, shared, privates["oxford"])(batch)
    alone = Local(ADAPTER).serve(oxford, Shared({}), privates["oxford"])(batch)
    torch.testing.assert_close(served.softmax(1), alone.softmax(1), rtol=1e-4, atol=1e-6)


def test_an_ensemble_is_of_adapters_of_any_rank(site: Make, tmp_path: Path) -> None:
    oxford, paris = site(), site("paris", 4)
    wide = replace(paris, initial=paris.model.init(replace(ADAPTER, rank=5), 3, "wide"))
    shared, privates = rounds(Ensemble(ADAPTER), [oxford, wide], 2, tmp_path)
    assert {t.shape[0] for name, t in shared.items() if "paris" in name and name.endswith("/A")} == {5}
    (batch,) = oxford.passes(oxford.train)
    assert Ensemble(ADAPTER).serve(oxford, shared, privates["oxford"])(batch).isfinite().all()


def test_a_site_s_newest_adapter_takes_the_place_of_the_one_it_sent(site: Make, tmp_path: Path) -> None:
    sites, method = [site(), site("paris", 4)], Ensemble(ADAPTER)
    shared, privates = rounds(method, sites, 1, tmp_path)
    tuned = method.personalise(sites[0], shared, privates["oxford"], 3)
    batch = sites[0].batch(sites[0].held_out, [0, 1])
    head = at("head", under("head", tuned))
    adapters = [under("local", tuned), under("local", privates["paris"])]
    each = [sites[0].logits(ADAPTER, {**adapter, **head}, batch).softmax(1) for adapter in adapters]
    served = method.serve(sites[0], shared, tuned)(batch)
    torch.testing.assert_close(served.softmax(1), sum(each) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "task", [BY_HEAD, Detection(("a", "b", "c")), VQA(("a", "b")), VQA(("a", "b"), objective="cross_entropy")], ids=str
)
def test_logits_have_the_scores_they_were_made_of(task: Any) -> None:
    scores = task.scores(torch.tensor([[0.3, -1.0, 2.0], [1.0, 1.0, -3.0]]))
    torch.testing.assert_close(task.scores(logits_of(scores, separate(task))), scores)


def test_what_is_distilled_comes_near_the_ensemble_and_is_one_adapter(site: Make, tmp_path: Path) -> None:
    training = Training(lr=2e-2, batch=2, epochs=4, warmup_head=2)
    sites = [site(name, 6, training=training) for name in ("oxford", "paris")]
    method = Ensemble(ADAPTER, distil=True)
    shared, privates = rounds(method, sites, 3, tmp_path)
    own, private = sites[0], privates["oxford"]
    assert private.keys() == {"head/weight", "head/bias"}
    (batch,) = own.passes(own.train)
    head = dict(private)
    members = [under(name, under("given", shared)) for name in ("oxford", "paris")]
    teacher = sum(own.logits(ADAPTER, {**member, **head}, batch).softmax(1) for member in members) / 2
    served = method.serve(own, shared, private)(batch)
    student = {name: t for name, t in shared.items() if not name.startswith(("given/", "local/"))}
    assert torch.equal(served, own.logits(ADAPTER, {**student, **head}, batch))
    before = own.logits(ADAPTER, {**own.model.init(ADAPTER, 3), **head}, batch)

    def away(logits: Tensor) -> Tensor:
        return F.kl_div(logits.log_softmax(1), teacher, reduction="batchmean")

    assert away(served) < 0.5 * away(before)


# Plain implementations: loops over tensors, with autograd and the pixels of fedloom alone.


def descended(
    site: Site, tensors: Tensors, round: int, change: Callable[[str, Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """A round of SGD; `change` (name, value, gradient) is what is stepped along."""
    tensors = dict(tensors)
    for batch in site.batches(round):
        free = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        logits = site.task.logits(site.model(batch, ADAPTER, free), free)
        grads = torch.autograd.grad(F.cross_entropy(logits, batch.targets), list(free.values()))
        for (name, tensor), g in zip(list(tensors.items()), grads, strict=True):
            tensors[name] = tensor - site.training.lr * change(name, tensor, g)
    return tensors


def started(site: Site) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return site.model.init(ADAPTER, 3), dict(site.task.init(site.model.dim, 3))


@pytest.mark.parametrize("eta", [1.0, 0.7])
def test_scaffold_is_the_paper_s_algorithm_with_option_two(site: Make, tmp_path: Path, eta: float) -> None:
    sites = [site("oxford", 6, training=SGD), site("paris", 3, training=SGD), site("rome", 2, training=SGD)]
    x, _ = started(sites[0])
    c = {name: torch.zeros_like(t) for name, t in x.items()}
    own = [dict(c) for _ in sites]
    heads = [started(one)[1] for one in sites]
    for round in range(3):
        moved, changed = [], []
        for k, one in enumerate(sites):

            def corrected(name: str, value: Tensor, g: Tensor, k: int = k, c: Tensors = c) -> Tensor:
                return g - own[k][name] + c[name] if name in c else g

            y = descended(one, {**x, **heads[k]}, round, corrected)
            heads[k] = {name: y[name] for name in heads[k]}
            steps = -(-len(one) // 2)
            after = {name: own[k][name] - c[name] + (x[name] - y[name]) / (steps * 0.05) for name in x}
            moved.append({name: y[name] - x[name] for name in x})
            changed.append({name: after[name] - own[k][name] for name in x})
            own[k] = after
        x = {name: x[name] + eta * sum(dy[name] for dy in moved) / 3 for name in x}
        c = {name: c[name] + sum(dc[name] for dc in changed) / 3 for name in x}
    shared, privates = rounds(Scaffold(ADAPTER, eta=eta), sites, 3, tmp_path)
    torch.testing.assert_close({name: shared[name] for name in x}, x, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(under("control", shared), c, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(under("control", privates["rome"]), own[2], rtol=1e-3, atol=1e-5)
    assert max(float(t.abs().max()) for t in c.values()) > 1e-3


def test_scaffold_s_control_moves_by_the_share_that_answered(site: Make) -> None:
    method, oxford = Scaffold(ADAPTER), site(training=SGD)
    shared = method.start(oxford.model, oxford.task, 4, seed=3)
    update, _ = method.local_round(0, oxford, shared, Private({}))
    following, _ = method.aggregate(shared, [Answer("oxford", update)])
    change = under("control", update.tensors)
    torch.testing.assert_close(under("control", following), {name: t / 4 for name, t in change.items()})


def test_scaffold_without_drift_is_fedavg(site: Make, tmp_path: Path) -> None:
    """One site: its control is the server's, and corrects nothing."""
    oxford = site(training=SGD)
    shared, _ = rounds(Scaffold(ADAPTER), [oxford], 3, tmp_path / "a")
    plain, _ = rounds(FedAvg(ADAPTER), [oxford], 3, tmp_path / "b")
    torch.testing.assert_close(only(plain, shared), dict(plain), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lam", [0.0, 0.8])
def test_ditto_is_the_paper_s_algorithm(site: Make, tmp_path: Path, lam: float) -> None:
    sites = [site("oxford", 6, training=SGD), site("paris", 2, training=SGD)]
    w, _ = started(sites[0])
    heads = [started(one)[1] for one in sites]
    v = [{**w, **head} for head in heads]
    for round in range(3):
        trained = []
        for k, one in enumerate(sites):
            y = descended(one, {**w, **heads[k]}, round, lambda name, value, g: g)
            heads[k] = {name: y[name] for name in heads[k]}
            trained.append(y)

            def held(name: str, value: Tensor, g: Tensor, w: Tensors = w) -> Tensor:
                return g + lam * (value - w[name]) if name in w else g

            v[k] = descended(one, v[k], round, held)
        w = {name: (6 * trained[0][name] + 2 * trained[1][name]) / 8 for name in w}
    shared, privates = rounds(Ditto(ADAPTER, lam=lam), sites, 3, tmp_path)
    torch.testing.assert_close(dict(shared), w, rtol=1e-4, atol=1e-6)
    for k, one in enumerate(sites):
        torch.testing.assert_close(under("local", privates[one.name]), v[k], rtol=1e-4, atol=1e-6)
        batch = one.batch(one.held_out, [0, 1])
        served = Ditto(ADAPTER).serve(one, shared, privates[one.name])(batch)
        torch.testing.assert_close(served, one.logits(ADAPTER, v[k], batch), rtol=1e-4, atol=1e-5)


def test_ditto_s_shared_adapter_is_fedavg_s_and_its_own_is_local_where_nothing_holds_it(
    site: Make, tmp_path: Path
) -> None:
    sites = [site(), site("paris", 3)]
    shared, privates = rounds(Ditto(ADAPTER, lam=0.0), sites, 2, tmp_path / "ditto")
    assert same(shared, rounds(FedAvg(ADAPTER), sites, 2, tmp_path / "avg")[0])
    _, alone = rounds(Local(ADAPTER), sites, 2, tmp_path / "local")
    own = under("local", privates["paris"])
    assert same(own, {**under("local", alone["paris"]), **at("head", under("head", alone["paris"]))})
    held = (rounds(Ditto(ADAPTER, lam=lam), sites, 2, tmp_path / str(lam))[1]["paris"] for lam in (0.0, 5.0))
    far, near = (squared_distance(shared, under("local", private)) for private in held)
    assert near < 0.8 * far


# Optimisers at the server, against torch's own.


def answered(*values: Tensor) -> list[Answer]:
    return [Answer(str(i), Update(Shared({"vision.0.q_proj/A": t}), i + 1.0, 1)) for i, t in enumerate(values)]


def stepped(method: FedOpt, optimiser: Callable[[list[Tensor]], torch.optim.Optimizer]) -> tuple[Tensor, Tensor]:
    """x after some rounds by the method and by an optimiser of torch given -Δ for a gradient."""
    rng = torch.Generator().manual_seed(0)
    name, x = "vision.0.q_proj/A", torch.randn(3, 4, generator=rng)
    shared = Shared(
        {name: x, f"server/m/{name}": torch.zeros(3, 4), f"server/v/{name}": torch.full((3, 4), method.tau**2)}
    )
    plain = x.clone().requires_grad_()
    torch_s = optimiser([plain])
    for _ in range(4):
        a, b = torch.randn(2, 3, 4, generator=rng).unbind()
        target = (a + 2 * b) / 3
        shared, _ = method.aggregate(shared, answered(a, b))
        plain.grad = plain.detach() - target
        torch_s.step()
    return shared[name], plain.detach()


def test_the_server_s_momentum_is_torch_s(site: Make) -> None:
    ours, theirs = stepped(
        FedOpt(ADAPTER, "momentum", eta=0.3), lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, dampening=0)
    )
    torch.testing.assert_close(ours, theirs)


def test_the_server_starts_at_tau_squared_and_has_no_second_moment_without_need(site: Make) -> None:
    oxford = site()
    shared = FedOpt(ADAPTER, tau=0.1).start(oxford.model, oxford.task, 1, 3)
    assert all(torch.equal(v, torch.full_like(v, 0.1**2)) for v in under("server/v", shared).values())
    assert under("server/v", shared).keys() == oxford.model.init(ADAPTER, 3).keys()
    assert not under("server/v", FedOpt(ADAPTER, "momentum").start(oxford.model, oxford.task, 1, 3))


def test_momentum_of_nothing_is_fedavg(site: Make, tmp_path: Path) -> None:
    sites = [site(), site("paris", 3)]
    shared, _ = rounds(FedOpt(ADAPTER, "momentum", eta=1.0, beta1=0.0), sites, 2, tmp_path / "a")
    plain, _ = rounds(FedAvg(ADAPTER), sites, 2, tmp_path / "b")
    torch.testing.assert_close(only(plain, shared), dict(plain), rtol=1e-5, atol=1e-7)


def test_the_server_s_adagrad_is_torch_s() -> None:
    method = FedOpt(ADAPTER, "adagrad", eta=0.3, beta1=0.0, tau=0.1)
    ours, theirs = stepped(method, lambda p: torch.optim.Adagrad(p, lr=0.3, initial_accumulator_value=0.1**2, eps=0.1))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("server", ["adam", "yogi"])
def test_the_server_s_adam_and_yogi_are_the_paper_s_numbers_by_hand(server: Any) -> None:
    method = FedOpt(ADAPTER, server, eta=0.1, beta1=0.5, beta2=0.75, tau=0.5)
    name = "vision.0.q_proj/A"
    shared = Shared(
        {name: torch.zeros(1), f"server/m/{name}": torch.zeros(1), f"server/v/{name}": torch.full((1,), 0.25)}
    )
    shared, _ = method.aggregate(shared, answered(torch.tensor([1.0])))
    # Δ = 1, m = 1/2; adam: v = 3/4 · 1/4 + 1/4 = 7/16; yogi: v = 1/4 - 1/4 · sign(1/4 - 1) = 1/2
    v = 7 / 16 if server == "adam" else 1 / 2
    torch.testing.assert_close(shared[name], torch.tensor([0.1 * 0.5 / (v**0.5 + 0.5)]))
    x = float(shared[name])
    shared, _ = method.aggregate(shared, answered(torch.tensor([x + 0.1])))
    m = 0.5 * 0.5 + 0.5 * 0.1
    # Δ² = 1/100 is below v: adam forgets geometrically, yogi subtracts
    v = 3 / 4 * 7 / 16 + 1 / 4 / 100 if server == "adam" else 1 / 2 - 1 / 4 / 100
    torch.testing.assert_close(shared[name], torch.tensor([x + 0.1 * m / (v**0.5 + 0.5)]))


# FedDAT, with two adapters put side by side rather than into one.

DUAL = Bottleneck(3, std=0.3)


def both_halves(own: Tensors, shared: Tensors) -> dict[str, Tensor]:
    """Tensors of Sum(DUAL, DUAL) that add the mean of the two."""
    return {
        f"{place}/{part}/{leaf}": t / 2 if leaf.startswith("up") else t
        for part, tensors in (("a", own), ("b", shared))
        for name, t in tensors.items()
        for place, _, leaf in [name.partition("/")]
    }


def test_feddat_is_the_authors_order_of_steps(site: Make, tmp_path: Path) -> None:
    oxford = site("oxford", 6, training=SGD)
    sent = oxford.model.init(DUAL, 3)
    ours, own, head = sent, sent, dict(oxford.task.init(oxford.model.dim, 3))

    def logits(adapter: Any, tensors: Tensors, batch: Any) -> Tensor:
        return oxford.task.logits(oxford.model(batch, adapter, tensors), tensors)

    def kl(student: Tensor, teacher: Tensor) -> Tensor:
        p, q = (teacher / 3).softmax(1), (student / 3).log_softmax(1)
        return F.kl_div(q, p, reduction="batchmean") * 9

    def stepped_on(tensors: Tensors, loss: Callable[[Tensors], Tensor]) -> dict[str, Tensor]:
        free = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        grads = torch.autograd.grad(loss(free), list(free.values()))
        return {name: t - 0.05 * g for (name, t), g in zip(tensors.items(), grads, strict=True)}

    for batch in oxford.batches(0):
        with torch.no_grad():
            taught = logits(Sum(DUAL, DUAL), {**both_halves(own, sent), **head}, batch)
            given = logits(DUAL, {**ours, **head}, batch)

        def shared_loss(t: Tensors, batch: Any = batch, taught: Tensor = taught) -> Tensor:
            z = logits(DUAL, t, batch)
            return (F.cross_entropy(z, batch.targets) + kl(z, taught)) / 2

        def own_loss(t: Tensors, batch: Any = batch, given: Tensor = given) -> Tensor:
            mine = {name: x for name, x in t.items() if not name.startswith("head/")}
            z = logits(Sum(DUAL, DUAL), {**both_halves(mine, sent), **at("head", under("head", t))}, batch)
            return (F.cross_entropy(z, batch.targets) + kl(z, given)) / 2

        moved = stepped_on({**ours, **head}, shared_loss)
        ours, head = only(ours, moved), only(head, moved)
        moved = stepped_on({**own, **head}, own_loss)
        own, head = only(own, moved), only(head, moved)
    shared, privates = rounds(FedDAT(DUAL), [oxford], 1, tmp_path)
    torch.testing.assert_close(dict(shared), ours, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(dict(privates["oxford"]), {**head, **at("local", own)}, rtol=1e-4, atol=1e-6)
    held = oxford.batch(oxford.held_out, [0, 1])
    served = FedDAT(DUAL).serve(oxford, shared, privates["oxford"])(held)
    expected = logits(Sum(DUAL, DUAL), {**both_halves(own, ours), **head}, held)
    torch.testing.assert_close(served, expected, rtol=1e-4, atol=1e-5)
    assert not same(own, ours)


def test_feddat_fine_tunes_its_own_half_alone(site: Make, tmp_path: Path) -> None:
    oxford, method = site(), FedDAT(DUAL)
    shared, privates = rounds(method, [oxford, site("paris", 3)], 1, tmp_path)
    tuned = method.personalise(oxford, shared, privates["oxford"], 4)
    (batch,) = oxford.passes(oxford.train)
    before, after = (method.serve(oxford, shared, own)(batch) for own in (privates["oxford"], tuned))
    assert oxford.task.loss(after, batch.targets) < oxford.task.loss(before, batch.targets)


def test_feddat_without_exchange_is_a_federation_of_each_site(site: Make, tmp_path: Path) -> None:
    sites, alone = [site(), site("paris", 4)], FedDAT(DUAL, exchange=False)
    shared, privates = rounds(alone, sites, 2, tmp_path / "alone")
    assert shared == {}
    for one in sites:
        federation, own = rounds(FedDAT(DUAL), [one], 2, tmp_path / one.name)
        (batch,) = one.passes(one.train)
        tuned = alone.personalise(one, shared, privates[one.name], 1)
        expected = FedDAT(DUAL).personalise(one, federation, own[one.name], 1)
        assert same(tuned, {**expected, **at("unsent", federation)})
        assert alone.serve(one, shared, tuned)(batch).equal(FedDAT(DUAL).serve(one, federation, expected)(batch))


def test_the_two_halves_may_have_any_adapter_with_hidden_units(site: Make, tmp_path: Path) -> None:
    oxford, method = site(), FedDAT(LoRA(rank=2, gated=True))
    shared, privates = rounds(method, [oxford], 1, tmp_path)
    batch = oxford.batch(oxford.held_out, [0, 1])
    served = method.serve(oxford, shared, privates["oxford"])(batch)
    halves = [(under("local", privates["oxford"]), 0.5), (shared, 0.5)]
    summed = {
        f"{place}/{part}/{leaf}": t * w if leaf == "B" else t
        for part, (half, w) in zip("ab", halves, strict=True)
        for name, t in half.items()
        for place, _, leaf in [name.partition("/")]
    }
    adapter = Sum(method.adapter, method.adapter)  # type: ignore[arg-type]
    head = at("head", under("head", privates["oxford"]))
    torch.testing.assert_close(served, oxford.logits(adapter, {**summed, **head}, batch), rtol=1e-4, atol=1e-5)
