"""Pooled training: of one site it is federated training, of several one stream of all their batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.adapters import LoRA
from fedloom.assembly import Federation, assemble, planned
from fedloom.errors import MethodError
from fedloom.methods import FedAvg, Pooled
from fedloom.recipe import load
from fedloom.rounds import train
from fedloom.runs import Run, run
from fedloom.site import Site
from fedloom.tensors import Private, Shared, Tensors

ADAPTER = LoRA(rank=2)
Assembled = Callable[..., Federation]


@pytest.fixture
def assembled(recipe: Path) -> Assembled:
    def make(**changes: object) -> Federation:
        named = {key.replace("__", "."): value for key, value in changes.items()}
        return assemble(planned(load(recipe, named)))

    return make


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def pool(federation: Federation, folder: Path, method: Pooled) -> tuple[Shared, dict[str, Private]]:
    return train("pooled", method, federation, folder, lambda event: None)


def only_site(federation: Federation) -> Site:
    (own,) = federation.participants.values()
    return own.site


@pytest.mark.parametrize("heads", ["private", "shared"])
def test_of_one_site_a_round_is_a_round_of_fedavg(assembled: Assembled, tmp_path: Path, heads: Any) -> None:
    one = assembled(data__partition={"kind": "whole"}, federation__rounds=1, method__heads=heads)
    site, method = only_site(one), one.method
    assert isinstance(method, FedAvg)
    shared, privates = pool(one, tmp_path, Pooled(method.adapter, heads))
    update, private = method.local_round(0, site, method.start(one.model, one.task, 1, 0), Private({}))
    tuned = method.personalise(site, update.tensors, private, 1)
    for got, expected in ((shared, update.tensors), (privates["all"], tuned)):
        assert same(got, expected)
        assert any(tensor.any() for tensor in got.values())


def test_every_site_has_a_head_and_all_one_adapter(assembled: Assembled, tmp_path: Path) -> None:
    three = assembled(training__finetune=0, federation__rounds=3)
    shared, privates = pool(three, tmp_path / "a", Pooled(ADAPTER))
    assert privates.keys() == three.participants.keys()
    assert all({name.partition("/")[0] for name in private} == {"head"} for private in privates.values())
    assert len({tuple(private["head/bias"].tolist()) for private in privates.values()}) == 3
    assert same(shared, pool(three, tmp_path / "b", Pooled(ADAPTER))[0])
    start = three.model.init(ADAPTER, 0)
    assert not same(shared, start)
    alone = assembled(training__finetune=0, federation__rounds=3, data__where={"site": ["oslo"]})
    assert not same(shared, pool(alone, tmp_path / "c", Pooled(ADAPTER))[0])


def test_a_full_batch_of_all_sites_follows_the_gradient_of_one_site_at_a_time(
    assembled: Assembled, tmp_path: Path
) -> None:
    plain = {"training__optimiser": "sgd", "training__batch": 99, "training__finetune": 0, "training__warmup_head": 0}
    two = assembled(**plain, federation__rounds=1, data__where={"site": ["oslo", "rome"]}, method__heads="shared")
    sites = [own.site for own in two.participants.values()]
    method = Pooled(ADAPTER, heads="shared")
    shared, privates = pool(two, tmp_path, method)
    assert all(private == {} for private in privates.values())
    ends = []
    for order in (sites, sites[::-1]):
        tensors = dict(method.start(two.model, two.task, 2, 0))
        for site in order:
            free = {name: t.clone().requires_grad_() for name, t in tensors.items()}
            (batch,) = site.batches(0)
            slope = torch.autograd.grad(site.loss(ADAPTER, free, batch), list(free.values()))
            tensors = {name: free[name].detach() - 0.01 * g for (name, g) in zip(free, slope, strict=True)}
        ends.append(tensors)
    assert [same(end, shared) for end in ends].count(True) == 1


def test_it_stands_beside_a_run(fedloom: Callable[..., tuple[int, str, str]], groups: Path, tmp_path: Path) -> None:
    rows = '["pooled"]'
    code, out, err = fedloom("run", groups, "--out", tmp_path / "run", "--set", f"reference.rows={rows}")
    assert (code, err) == (0, "")
    assert "pooled: all training data at one place" in out
    (head,) = (line for line in out.splitlines() if line.startswith("site "))
    assert head.split() == ["site", "test", "pooled", "fedavg"]  # no gain is told against it


def test_it_runs_by_itself_as_it_stands_beside_a_run(recipe: Path, tmp_path: Path) -> None:
    beside = run(load(recipe, {"reference.rows": ["pooled"]}), tmp_path / "beside").summary["references"]["pooled"]
    alone = run(load(recipe, {"method.name": "pooled"}), tmp_path / "alone")
    for row in beside["personal"]["sites"].values():
        del row["gain"]  # of the method that it stands beside
    assert alone.summary["views"] == beside
    assert (alone.summary["bytes_up"], alone.rounds) == (0, [])
    again = Run(tmp_path / "alone")
    assert again.evaluate() == alone.evaluate()
    resumed = run(load(recipe, {"method.name": "pooled"}), tmp_path / "alone", resume=True)
    assert resumed.summary == alone.summary


def test_no_site_takes_part_in_it(assembled: Assembled) -> None:
    site = only_site(assembled(data__partition={"kind": "whole"}))
    with pytest.raises(MethodError, match=r"'all' takes no part in pooled training: .* no federation may do"):
        Pooled(ADAPTER).local_round(0, site, Shared({}), Private({}))
