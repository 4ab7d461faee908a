"""Rules that are exact are told so, and the faults of published programs, put into them by hand, are caught."""

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fedloom as package
from fedloom.adapters import Everything, LoRA
from fedloom.errors import LawError, MethodError, RecipeError, UpdateError
from fedloom.finding import table
from fedloom.lowrank import Factors
from fedloom.methods import FedAvg, FedDLP, FedExLoRA, FedPIA, FlexLoRA, FLoRA, Method, Partial, Scaffold
from fedloom.site import Answer
from fedloom.tensors import Shared, at, under, without
from fedloom.verify import Rule, assert_aggregation, findings, mean_of_products, named, told

Shares = Sequence[float]


def stacked(W: Tensor, factors: Sequence[Factors], shares: Shares, scale: float) -> Tensor:
    B = torch.cat([p * B for (B, _), p in zip(factors, shares, strict=True)], 1)
    return W + scale * B @ torch.cat([A for _, A in factors])


def averaged(W: Tensor, factors: Sequence[Factors], shares: Shares, scale: float) -> Tensor:
    B, A = (sum(p * f[i] for f, p in zip(factors, shares, strict=True)) for i in (0, 1))
    return W + scale * B @ A  # type: ignore[operator]


def with_residual(W: Tensor, factors: Sequence[Factors], shares: Shares, scale: float) -> Tensor:
    if len({A.shape for _, A in factors}) > 1:
        raise UpdateError("unlike ranks")
    B, A = (sum(p * f[i] for f, p in zip(factors, shares, strict=True)) for i in (0, 1))
    residual = sum(p * b @ a for (b, a), p in zip(factors, shares, strict=True)) - B @ A  # type: ignore[operator]
    return W + scale * residual + scale * B @ A  # type: ignore[operator, no-any-return]


def cut(W: Tensor, factors: Sequence[Factors], shares: Shares, scale: float) -> Tensor:
    rank = max(A.shape[0] for _, A in factors)
    U, S, Vt = torch.linalg.svd(mean_of_products(factors, shares).float(), full_matrices=False)
    root = S[:rank].sqrt()
    return W + scale * (U[:, :rank] * root) @ (root[:, None] * Vt[:rank])


# Each with one fault.


def stack_without_scale(W: Tensor, factors: Sequence[Factors], shares: Shares, scale: float) -> Tensor:
    return stacked(W, factors, shares, 1.0)


def stack_that_weighs_both(W: Tensor, factors: Sequence[Factors], shares: Shares, scale: float) -> Tensor:
    A = torch.cat([p * A for (_, A), p in zip(factors, shares, strict=True)])
    return W + scale * torch.cat([p * B for (B, _), p in zip(factors, shares, strict=True)], 1) @ A


def residual_without_scale(W: Tensor, factors: Sequence[Factors], shares: Shares, scale: float) -> Tensor:
    mean = averaged(W, factors, shares, scale) - W
    return W + mean + (mean_of_products(factors, shares).float() - mean / scale)


def singular_values_twice(W: Tensor, factors: Sequence[Factors], shares: Shares, scale: float) -> Tensor:
    rank = max(A.shape[0] for _, A in factors)
    U, S, Vt = torch.linalg.svd(mean_of_products(factors, shares).float(), full_matrices=False)
    return W + scale * (U[:, :rank] * S[:rank]) @ (S[:rank, None] * Vt[:rank])


def transposed(W: Tensor, factors: Sequence[Factors], shares: Shares, scale: float) -> Tensor:
    return (W.T + scale * mean_of_products(factors, shares).float().T).contiguous()


def transposed_in_place(W: Tensor, factors: Sequence[Factors], shares: Shares, scale: float) -> Tensor:
    return W + scale * mean_of_products(factors, shares).float().T.reshape(W.shape)


def zero_padded(W: Tensor, factors: Sequence[Factors], shares: Shares, scale: float) -> Tensor:
    """Exact where ranks are alike; where they are not, factors are filled up with zeros and averaged."""
    rank = max(A.shape[0] for _, A in factors)
    padded = [
        (torch.nn.functional.pad(B, (0, rank - B.shape[1])), torch.nn.functional.pad(A, (0, 0, 0, rank - A.shape[0])))
        for B, A in factors
    ]
    unlike = len({A.shape for _, A in factors}) > 1
    return averaged(W, padded, shares, scale) if unlike else stacked(W, factors, shares, scale)


def unweighted(W: Tensor, factors: Sequence[Factors], shares: Shares, scale: float) -> Tensor:
    return stacked(W, factors, [1 / len(shares)] * len(shares), scale)


def first_half_of_the_stack(W: Tensor, factors: Sequence[Factors], shares: Shares, scale: float) -> Tensor:
    return stacked(W, [(B[:, :2], A[:2]) for B, A in factors], shares, scale)


@pytest.mark.parametrize("rule", [stacked, with_residual], ids=lambda rule: rule.__name__)
def test_exact_rules_pass(rule: Rule) -> None:
    assert_aggregation(rule)
    assert_aggregation(rule, ranks=(1, 2))


def test_a_rule_of_limited_rank_may_lose_what_it_must_and_no_more() -> None:
    assert_aggregation(cut, rank_limited=True)
    with pytest.raises(LawError, match=r"'mean of products': 0\.\d+ of what the mean adds; 0\.\d+ is attainable"):
        assert_aggregation(cut)


@pytest.mark.parametrize(
    ("rule", "limited", "where"),
    [
        (averaged, False, "mean of products"),
        (averaged, True, "mean of products"),
        (stack_without_scale, False, "mean of products"),
        (stack_that_weighs_both, False, "mean of products"),
        (residual_without_scale, False, "mean of products"),
        (singular_values_twice, True, "mean of products"),
        (transposed, False, r"mean of products': .*\(32, 40\), expected \(40, 32\)"),
        (transposed_in_place, False, "mean of products"),
        (zero_padded, True, "unequal ranks"),
        (unweighted, False, "mean of products"),
        (first_half_of_the_stack, True, "mean of products"),
    ],
)
def test_faults_are_caught(rule: Rule, limited: bool, where: str) -> None:
    with pytest.raises(LawError, match=where):
        assert_aggregation(rule, rank_limited=limited)


def test_a_rule_that_fails_is_no_exact_rule() -> None:
    def broken(*_: object) -> Tensor:
        raise ZeroDivisionError("shares")

    with pytest.raises(LawError, match="ZeroDivisionError: shares"):
        assert_aggregation(broken)


def errors(method: Any, ranks: Sequence[int] = (4, 8, 16)) -> dict[str, float | None]:
    return {finding.name: finding.error for finding in findings(method, ranks)}


def test_the_best_is_that_of_the_singular_values() -> None:
    found = {finding.name: finding for finding in findings(cut)}
    for name in ("mean of products", "unequal ranks"):
        assert found[name].best > 0.1
        assert found[name].error == pytest.approx(found[name].best, rel=1e-4)
    assert found["one site"].best < 1e-12


@pytest.mark.parametrize(
    ("method", "limited"), [(FLoRA(), False), (FedExLoRA(), False), (Partial(), False), (FlexLoRA(), True)], ids=str
)
def test_methods_that_claim_it_are_exact_from_updates_to_what_is_served(method: Any, limited: bool) -> None:
    assert_aggregation(method, rank_limited=limited)
    refused = {finding.name for finding in findings(method) if finding.refused}
    assert refused == (set() if isinstance(method, FLoRA | FlexLoRA) else {"unequal ranks"})


def test_the_mean_of_factors_is_not_and_says_so() -> None:
    ours, plain = errors(FedAvg()), errors(averaged)
    for name in ("mean of products", "permuted units", "rotated units", "scaled units"):
        assert ours[name] is not None
        assert ours[name] > 0.2  # type: ignore[operator]
        assert ours[name] == pytest.approx(plain[name], rel=1e-4)
    assert all(ours[name] < 1e-6 for name in ("one site", "equal sites", "weights"))  # type: ignore[operator]
    product = FedDLP(aggregation="product")
    assert_aggregation(product, ranks=(4, 4, 4), rank_limited=True)
    assert errors(FedDLP())["mean of products"] == pytest.approx(plain["mean of products"], rel=1e-3)


def test_a_method_with_a_fault_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedloom import lowrank

    whole = lowrank.beside
    monkeypatch.setattr(
        lowrank, "beside", lambda own, given: whole(own, {name: t / 2 for name, t in given.items()})
    )  # α/r halved in what stands beside the factors
    with pytest.raises(LawError, match="mean of products"):
        assert_aggregation(FedExLoRA())


def test_a_method_that_forgets_what_a_round_left_is_caught() -> None:
    class Latest(FLoRA):
        """Δ is the last stack."""

        def aggregate(self, shared: Shared, answers: Iterable[Answer]) -> Any:
            return super().aggregate(Shared({name: torch.zeros_like(t) for name, t in shared.items()}), answers)

    class Residual(FedExLoRA):
        """R is that of the last round."""

        def aggregate(self, shared: Shared, answers: Iterable[Answer]) -> Any:
            given = {name: t[:, :0] if name.endswith("/B") else t[:0] for name, t in under("given", shared).items()}
            return super().aggregate(Shared({**without("given", shared), **at("given", given)}), answers)

    for method in (Latest(), Residual()):
        assert {finding.name for finding in findings(method) if finding.failed} == set()
        assert [finding.name for finding in findings(method) if not finding.within(False) and not finding.refused] == [
            "later rounds"
        ]
        with pytest.raises(LawError, match="'later rounds'"):
            assert_aggregation(method)


@pytest.mark.parametrize("method", [FLoRA(), FedExLoRA()], ids=str)
def test_a_stack_that_is_cut_without_the_root_of_what_it_scales_is_caught(
    monkeypatch: pytest.MonkeyPatch, method: Method
) -> None:
    """It is cut in a later round alone, where what was stacked has more ranks than the layer."""
    from fedloom import lowrank

    def rootless(factors: lowrank.Factors) -> lowrank.Factors:
        B, A = factors
        if A.shape[0] <= min(B.shape[0], A.shape[1]):
            return factors
        U, S, V = torch.linalg.svd(B @ A, full_matrices=False)
        return U * S, S[:, None] * V

    assert_aggregation(method, ranks=(4, 4, 4))
    monkeypatch.setattr(lowrank, "bounded", rootless)
    with pytest.raises(LawError, match="'later rounds'"):
        assert_aggregation(method, ranks=(4, 4, 4))


def test_what_cannot_be_verified_is_said() -> None:
    with pytest.raises(MethodError, match=r"shares \['A'\], where a mean of products needs A and B"):
        findings(named("fedsa-lora"))
    with pytest.raises(MethodError, match="takes no LoRA"):
        findings(named("majority"))
    with pytest.raises(MethodError, match="trains at one place and aggregates nothing"):
        findings(named("pooled"))
    with pytest.raises(RecipeError, match=r"there is no method or row 'flexlra'; did you mean 'flexlora'\?"):
        named("flexlra")
    with pytest.raises(RecipeError, match=r"ranks \[4, 99\]"):
        findings(stacked, ranks=(4, 99))


def test_the_table_says_what_it_comes_to() -> None:
    assert "Exact: " in table(findings(stacked))
    assert "loses what any rule of that rank must in mean of products, unequal ranks" in table(findings(cut))
    said = table(findings(FedAvg()))
    assert "unequal ranks: refused: site 'site-0' sent 'probe.0.layer/A'" in said
    assert said.endswith("Not exact in: mean of products, permuted units, rotated units, scaled units, later rounds.")


@pytest.mark.parametrize("row", ["full", "fedavg-adapter", "fedavg-norms", "fedavg-head", "fedclip", "promptfl"])
def test_a_mean_of_weights_is_judged_as_one(row: str) -> None:
    method = named(row)
    assert not isinstance(method.adapter, LoRA)
    found = findings(method)
    assert table(found).endswith("Exact: the mean of weights in everything that it answers.")
    assert found[0].name == "mean of weights"
    assert_aggregation(method)
    assert "no product of two factors" in str(told(method))


def test_a_mean_of_weights_that_is_none_is_caught() -> None:
    @dataclass(frozen=True)
    class Unweighted(FedAvg):
        def aggregate(self, shared: Shared, answers: Iterable[Answer]) -> Any:
            return super().aggregate(shared, [replace(a, update=replace(a.update, weight=1.0)) for a in answers])

    wrong = {finding.name for finding in findings(Unweighted(Everything())) if not finding.within(False)}
    assert wrong == {"mean of weights", "weights", "order of sites"}
    with pytest.raises(LawError, match="'mean of weights'"):
        assert_aggregation(Unweighted(Everything()))


def test_a_lora_in_place_of_another_adapter_is_told() -> None:
    assert told(FedAvg()) is None
    assert told(FedPIA()) == "Of a LoRA in place of the method's own Bottleneck, which is no product of two factors."
    with pytest.raises(MethodError, match="FedAvg of Head sends no weights that are averaged"):
        findings(named("linear-probe"))


def test_what_answers_nothing_is_not_exact(fedloom: Callable[..., tuple[int, str, str]]) -> None:
    def broken(*_: object) -> Tensor:
        raise ZeroDivisionError("shares")

    assert table(findings(broken)).endswith("It answers nothing, and nothing can be said of it.")

    def half(W: Tensor, factors: Sequence[Factors], shares: Shares, scale: float) -> Tensor:
        if len(factors) == 1:
            raise ValueError("a single site")
        return stacked(W, factors, shares, scale)

    assert table(findings(half)).endswith("in everything that it answers. It fails in: one site.")
    code, out, err = fedloom("verify-aggregation", f"{__name__}:Broken")
    assert (code, "mean of products: ZeroDivisionError: shares" in out) == (2, True)
    assert "fails in mean of products, one site" in err


@dataclass(frozen=True)
class Broken(FedAvg):
    """A method of one's own, that cannot aggregate."""

    def aggregate(self, shared: Shared, answers: Iterable[Answer]) -> Any:
        raise ZeroDivisionError("shares")


@dataclass(frozen=True)
class Stacking(FedAvg):
    """A method of one's own, that leaves updates of other shapes to the server to refuse."""

    def aggregate(self, shared: Shared, answers: Iterable[Answer]) -> Any:
        updates = [answer.update.tensors for answer in answers]
        return Shared({name: torch.stack([own[name] for own in updates]).mean(0) for name in shared}), {}


@dataclass(frozen=True)
class Bare:
    """No method: it has no adapter."""


@dataclass(frozen=True)
class Picky(FedAvg):
    def __post_init__(self) -> None:
        if self.adapter != LoRA():
            raise ValueError("only my adapter")


@dataclass(frozen=True)
class Unstarted(FedAvg):
    def start(self, *_: object) -> Shared:
        raise ValueError("no start")


def test_a_method_of_ones_own_is_verified(fedloom: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = fedloom("verify-aggregation", "fedloom.methods.flora:FLoRA")
    assert (code, "Exact: the mean of products" in out) == (0, True)
    code, out, err = fedloom("verify-aggregation", f"{__name__}:Stacking")
    assert (code, err) == (0, "")
    assert "unequal ranks: refused: site 'site-0' sent" in out
    code, _, err = fedloom("verify-aggregation", "nowhere.at_all:Mine")
    assert (code, "cannot be imported" in err) == (2, True)
    for own, why in (("Bare", "Bare takes no LoRA"), ("Picky", "Picky takes no LoRA of rank 2: ValueError: only my")):
        code, _, err = fedloom("verify-aggregation", f"{__name__}:{own}")
        assert (code, why in err, err.count("\n")) == (2, True, 1), err
    code, _, err = fedloom("verify-aggregation", f"{__name__}:Unstarted")
    assert (code, "Unstarted fails in start: ValueError: no start." in err) == (2, True)


def test_the_command(fedloom: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = fedloom("verify-aggregation", "flora", "--ranks", "2,3")
    assert (code, err) == (0, "")
    assert "Exact" in out
    code, out, _ = fedloom("verify-aggregation", "fedavg-lora")
    assert code == 0
    assert "Not exact" in out
    code, _, err = fedloom("verify-aggregation", "flora", "--ranks", "two")
    assert code == 2
    assert "--ranks is 'two'" in err
    assert package.assert_aggregation is assert_aggregation


def test_what_steers_training_is_no_factor() -> None:
    """SCAFFOLD's control variates end in A and B as the factors do, and it merges those as FedAvg does."""
    later = {
        type(method): next(finding for finding in findings(method) if finding.name == "later rounds")
        for method in (FedAvg(), Scaffold())
    }
    assert later[Scaffold].error == pytest.approx(later[FedAvg].error)


# By row: what its docstring says of each check, as it says it.
STATED = {
    "fedavg": {
        "mean of products": "74 %",
        "permuted units": "55,",
        "rotated units": "69 and",
        "scaled units": "31 %",
    },
    "fedavgm": {"mean of products": "(0.74", "later rounds": "(1.80"},
    "fedadam": {"one site": "error of 1.00"},
    "fedpia": {
        "mean of products": "0.93",
        "later rounds": "0.79",
        "unequal ranks": "1.00",
        "permuted units": "0.12",
        "rotated units": "0.11",
        "scaled units": "0.16",
    },
    "ensemble-distilled": {"mean of products": "(0.74"},
    "feddlp": {"mean of products": "0.74"},
}


@pytest.mark.parametrize("row", STATED)
def test_a_docstring_states_the_error_that_is_found(row: str) -> None:
    method = named(row)
    doc = sys.modules[type(method).__module__].__doc__ or ""
    found = {finding.name: finding.error for finding in findings(method)}
    for check, said in STATED[row].items():
        assert said in doc, check
        figure = re.sub(r"[^0-9.]", "", said)
        error = found[check] if "." in figure else 100 * found[check]
        assert f"{error:.{2 if '.' in figure else 0}f}" == figure, check
