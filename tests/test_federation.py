"""Rounds: who is asked, who is refused, when a round counts, and that stopping and going on changes no bit."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedloom.adapters import Bottleneck, LoRA
from fedloom.check import federation
from fedloom.engines.local import LocalEngine, Participant
from fedloom.errors import DataError, QuorumError, UpdateError
from fedloom.federation import End, Engine, Round, Schedule, federate, predict, site_evaluate, site_round
from fedloom.methods import FedAvg, Method
from fedloom.site import Answer, Reply, Silence, Site, Update
from fedloom.store import Store
from fedloom.tensors import Private, Shared, from_bytes, to_bytes

ROSTER = ("ada", "bob", "cyd", "dan")
METHOD = FedAvg(LoRA(rank=2))


@dataclass(frozen=True)
class Scripted:
    """An engine whose sites answer as a test says; each answers with its number where nothing is said."""

    said: Mapping[str, Any] = field(default_factory=dict)
    asked: list[tuple[str, ...]] = field(default_factory=list)

    def round(self, round: int, shared: Shared, sites: Sequence[str]) -> Iterator[Reply]:
        self.asked.append(tuple(sites))
        for name in sites:
            says = self.said.get(name, float(ROSTER.index(name)))
            yield Silence(name, says) if isinstance(says, str) else answer(name, says)

    def evaluate(self, round: int, shared: Shared, split: str, sites: Sequence[str]) -> Iterator[Reply]:
        return iter(())


def answer(name: str, says: Any, weight: float = 1.0) -> Answer:
    tensors = says if isinstance(says, dict) else {"0.q/A": torch.full((2, 3), says)}
    return Answer(name, Update(Shared(tensors), weight, examples=1))


START = Shared({"0.q/A": torch.zeros(2, 3)})


def run(
    engine: Engine, method: Method = METHOD, first: int = 0, shared: Shared = START, **schedule: Any
) -> list[Round]:
    roster = schedule.pop("roster", ROSTER)
    return list(federate(method, engine, shared, Schedule(roster, schedule.pop("rounds", 1), **schedule), first))


def test_a_round_folds_what_was_sent() -> None:
    (ended,) = run(Scripted())
    assert torch.equal(ended.shared["0.q/A"], torch.full((2, 3), 1.5))
    assert ended.asked == tuple(ended.answers) == ROSTER
    assert ended.silent == {}
    assert all(not answer.update.tensors for answer in ended.answers.values())  # folded and dropped
    assert all(answer.update.weight == 1 for answer in ended.answers.values())


BAD = {
    "nan": (torch.tensor([[0.0, 1, 2], [3, torch.nan, 5]]), r"'0.q/A' with values that are not finite"),
    "infinite": (torch.full((2, 3), torch.inf), r"'0.q/A' with values that are not finite"),
    "shape": (torch.zeros(2, 4), r"'0.q/A' as \(2, 4\) torch.float32, expected "),
    "dtype": (
        torch.zeros(2, 3, dtype=torch.float64),
        r"'0.q/A' as \(2, 3\) torch.float64, expected ",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_tensor_that_does_not_fit_is_refused_by_name_and_the_round_goes_on(bad: str) -> None:
    tensor, message = BAD[bad]
    engine = Scripted({"bob": {"0.q/A": tensor}})
    (ended,) = run(engine, quorum=0.75)
    assert list(ended.answers) == ["ada", "cyd", "dan"]
    assert ended.silent.keys() == {"bob"}
    torch.testing.assert_close(ended.shared["0.q/A"], torch.full((2, 3), 5 / 3))
    with pytest.raises(
        QuorumError, match=f"round 1: 3 of 4 sites answered, the quorum is 4.*refused: site 'bob' sent {message}"
    ):
        run(engine)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({**START, "head/weight": torch.zeros(1)}, "site 'bob' sent 'head/weight', which does not fit"),
        ({**START, "server/m": torch.zeros(1)}, "site 'bob' sent 'server/m'"),
        ({}, "site 'bob' did not send '0.q/A'"),
        ({"0.q/B": torch.zeros(2, 3)}, "site 'bob' did not send '0.q/A'"),
    ],
)
def test_a_name_too_many_or_too_few_is_refused(tensors: dict[str, Tensor], message: str) -> None:
    (ended,) = run(Scripted({"bob": tensors}), quorum=0.5)
    assert message in ended.silent["bob"]
    assert "bob" not in ended.answers


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    class Weighted(Scripted):
        def round(self, round: int, shared: Shared, sites: Sequence[str]) -> Iterator[Reply]:
            yield from (answer(name, 1.0, weight if name == "bob" else 1.0) for name in sites)

    (ended,) = run(Weighted(), quorum=0.5)
    assert f"the weight {weight}" in ended.silent["bob"]


def test_a_name_too_many_is_refused_also_under_what_a_method_sends() -> None:
    class Publishing(FedAvg):
        sends = frozenset({"local"})

    engine = Scripted({"bob": {"0.q/A": torch.zeros(2, 3), "local/junk": torch.ones(())}})
    with pytest.raises(QuorumError, match="sent 'local/junk', which does not fit"):
        run(engine, Publishing(), roster=("bob",))


WIDE = {"0.block/down": torch.zeros(5, 8), "0.block/down_bias": torch.zeros(5), "0.block/up": torch.zeros(8, 5)}
NARROW = {"0.block/down": torch.ones(3, 8), "0.block/down_bias": torch.ones(3), "0.block/up": torch.ones(8, 3)}


class Each(FedAvg):
    """A method that sees each update by itself, and makes do with any width."""

    individual = True
    any_width = True

    def aggregate(self, shared: Shared, answers: Iterable[Answer]) -> tuple[Shared, Mapping[str, float]]:
        return shared, {a.site: float(a.update.tensors["0.block/down"].shape[0]) for a in answers}


@pytest.mark.parametrize(
    ("sent", "refusal"),
    [
        (NARROW, None),
        (WIDE, None),
        ({n: torch.ones([8 if s == 5 else s for s in t.shape]) for n, t in WIDE.items()}, None),
        ({**NARROW, "0.block/up": torch.ones(8, 4)}, "as (8, 4) torch.float32, expected (8, 3)"),  # unlike in a place
        ({**NARROW, "0.block/down": torch.ones(3, 7)}, "as (3, 7) torch.float32, expected (3, 8)"),  # another backbone
        ({n: torch.ones([9 if s == 5 else s for s in t.shape]) for n, t in WIDE.items()}, "as (9, 8) torch.float32"),
        ({n: torch.ones([0 if s == 5 else s for s in t.shape]) for n, t in WIDE.items()}, "as (0, 8) torch.float32"),
        ({**NARROW, "0.block/down_bias": torch.ones(3, 1)}, "as (3, 1) torch.float32, expected (5,)"),
    ],
)
def test_another_width_is_taken_by_a_method_that_sees_each_update(sent: Any, refusal: str | None) -> None:
    engine = Scripted(dict.fromkeys(ROSTER, WIDE) | {"bob": sent})
    (ended,) = run(engine, Each(Bottleneck(5)), shared=Shared(WIDE), quorum=0.5)
    assert ("bob" in ended.metrics) is (refusal is None)
    if refusal is not None:
        assert refusal in ended.silent["bob"]
    (ended,) = run(engine, FedAvg(Bottleneck(5)), shared=Shared(WIDE), quorum=0.5)
    assert ("bob" in ended.answers) is (sent is WIDE)  # a mean needs one width


def test_a_reply_that_was_not_asked_for_counts_for_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Eager(Scripted):
        def round(self, round: int, shared: Shared, sites: Sequence[str]) -> Iterator[Reply]:
            yield from super().round(round, shared, sites)
            yield answer("ada", 100.0)  # a second time
            yield answer("eve", 100.0)

    (ended,) = run(Eager())
    assert torch.equal(ended.shared["0.q/A"], torch.full((2, 3), 1.5))
    assert tuple(ended.answers) == ROSTER
    assert [record.args for record in caplog.records] == [("ada",), ("eve",)]


def test_silent_sites_are_named_and_a_quorum_counts_them() -> None:
    engine = Scripted({"ada": "it is offline", "dan": "its disk is full"})
    (ended,) = run(engine, quorum=0.5)
    assert ended.silent == {"ada": "it is offline", "dan": "its disk is full"}
    assert torch.equal(ended.shared["0.q/A"], torch.full((2, 3), 1.5))
    with pytest.raises(QuorumError, match=r"2 of 4 sites answered, the quorum is 3.*ada: it is offline; dan: its disk"):
        run(engine, quorum=0.51)


class Impatient(FedAvg):
    """Fails in its own way where there is nothing to fold."""

    def aggregate(self, shared: Shared, answers: Iterable[Answer]) -> tuple[Shared, Mapping[str, float]]:
        next(iter(answers))
        return shared, {}


class Unmoved(FedAvg):
    """Does not mind that there is nothing to fold."""

    def aggregate(self, shared: Shared, answers: Iterable[Answer]) -> tuple[Shared, Mapping[str, float]]:
        return shared, {"answers": len(list(answers))}


@pytest.mark.parametrize("method", [FedAvg(), Impatient(), Unmoved()], ids=lambda method: type(method).__name__)
def test_nothing_answered_is_no_success(method: Method) -> None:
    engine = Scripted(dict.fromkeys(ROSTER, "gone"))
    with pytest.raises(
        QuorumError, match=r"round 1: 0 of 4 sites answered, the quorum is 1. ada, bob, cyd, dan: gone\.$"
    ):
        run(engine, method, quorum=0.0)


def test_a_round_that_fails_leaves_those_before_it() -> None:
    class Failing(Scripted):
        def round(self, round: int, shared: Shared, sites: Sequence[str]) -> Iterator[Reply]:
            if round < 2:
                yield from super().round(round, shared, sites)

    rounds = federate(METHOD, Failing(), START, Schedule(ROSTER, 5))
    assert [next(rounds).round, next(rounds).round] == [0, 1]
    with pytest.raises(QuorumError, match=r"round 3: 0 of 4.*: no reply"):
        next(rounds)


def test_a_site_of_which_nothing_is_heard_did_not_answer() -> None:
    class Mute(Scripted):
        def round(self, round: int, shared: Shared, sites: Sequence[str]) -> Iterator[Reply]:
            return super().round(round, shared, sites[1:])

    with pytest.raises(QuorumError, match=r"3 of 4 sites answered, the quorum is 4. ada: no reply"):
        run(Mute())


def test_answers_that_a_method_has_no_use_for_are_taken_all_the_same() -> None:
    class Deaf(FedAvg):
        def aggregate(self, shared: Shared, answers: Iterable[Answer]) -> tuple[Shared, Mapping[str, float]]:
            return shared, {}

    (ended,) = run(Scripted(), Deaf())
    assert tuple(ended.answers) == ROSTER
    assert ended.silent == {}


def test_an_error_of_the_method_is_not_taken_for_silence() -> None:
    class Confused(FedAvg):
        def aggregate(self, shared: Shared, answers: Iterable[Answer]) -> tuple[Shared, Mapping[str, float]]:
            next(iter(answers))
            raise UpdateError("these do not go together")

    with pytest.raises(UpdateError, match="these do not go together"):
        run(Scripted(), Confused())


@given(st.integers(0, 50), st.integers(0, 1000), st.floats(0.01, 1.0), st.integers(1, 30))
def test_participation_is_a_function_of_seed_and_round(round: int, seed: int, share: float, sites: int) -> None:
    roster = tuple(f"site-{i}" for i in range(sites))
    asked = Schedule(roster, 1, seed=seed, participation=share).asked(round)
    torch.manual_seed(seed + 1)
    assert asked == Schedule(roster, 99, seed=seed, participation=share).asked(round)
    assert len(asked) == max(1, -(-round_up(share * sites) // 1))
    assert list(asked) == [name for name in roster if name in asked]  # in roster order, each once


def round_up(x: float) -> int:
    return int(x) + (x - int(x) > 1e-9)


def test_everyone_is_asked_now_and_then() -> None:
    drawn = [Schedule(ROSTER, 1, seed=seed, participation=0.5).asked(round) for seed in (0, 1) for round in range(20)]
    assert {name for asked in drawn for name in asked} == set(ROSTER)
    assert len(set(drawn)) == 6  # every pair of four
    assert drawn[:20] != drawn[20:]


def test_the_quorum_is_of_the_asked() -> None:
    schedule = Schedule(ROSTER, 1, participation=0.5)
    one, other = schedule.asked(0)
    (ended,) = run(Scripted({one: "gone"}), participation=0.5, quorum=0.5)
    assert list(ended.answers) == [other]
    assert ended.asked == (one, other)


def test_who_joins_late_is_not_asked_before() -> None:
    engine = Scripted()
    run(engine, rounds=4, joins={"bob": 2, "dan": 3})
    assert engine.asked == [("ada", "cyd"), ("ada", "cyd"), ("ada", "bob", "cyd"), ROSTER]
    with pytest.raises(QuorumError, match="0 of 0"):
        run(Scripted(), roster=("bob",), joins={"bob": 1})


# The engine in this process, on real sites.


@pytest.fixture(scope="module")
def sites() -> tuple[Site, ...]:
    return federation()


def engine(sites: Sequence[Site], folder: Path, method: Method = METHOD) -> LocalEngine:
    own = {site.name: Participant(site, Store(folder / site.name), site.held_out) for site in sites}
    return LocalEngine(method, own)


def start(sites: Sequence[Site], method: Method = METHOD) -> Shared:
    return method.start(sites[0].model, sites[0].task, len(sites), 0)


def bits(tensors: Mapping[str, Tensor]) -> bytes:
    return to_bytes(dict(sorted(tensors.items())))


def names(sites: Iterable[Site]) -> tuple[str, ...]:
    return tuple(site.name for site in sites)


def test_replies_come_in_the_order_asked_and_that_order_changes_no_answer(sites: Any, tmp_path: Path) -> None:
    shared = start(sites)
    forth = list(engine(sites, tmp_path / "a").round(0, shared, names(sites)))
    back = list(engine(sites, tmp_path / "b").round(0, shared, names(sites)[::-1]))
    assert [reply.site for reply in forth] == [reply.site for reply in reversed(back)] == list(names(sites))
    for one, other in zip(forth, reversed(back), strict=True):
        assert isinstance(one, Answer)
        assert isinstance(other, Answer)
        assert bits(one.update.tensors) == bits(other.update.tensors)
        assert one.bytes_up == len(bits(one.update.tensors))
        assert one.bytes_down == len(bits(shared))
        assert one.seconds > 0


def test_stopped_anywhere_and_gone_on_ends_with_the_same_bits(sites: Any, tmp_path: Path) -> None:
    schedule = {"roster": names(sites), "rounds": 3, "participation": 0.5, "seed": 2}
    whole = run(engine(sites, tmp_path / "whole"), shared=start(sites), **schedule)
    for stop in (1, 2):
        folder = tmp_path / f"stop-{stop}"
        ended = run(engine(sites, folder), shared=start(sites), **{**schedule, "rounds": stop})
        half = engine(sites, folder).round(stop, ended[-1].shared, whole[stop].asked)
        next(half)  # killed in the midst of a round, after its first site
        resumed = run(engine(sites, folder), first=stop, shared=ended[-1].shared, **schedule)
        assert bits(resumed[-1].shared) == bits(whole[-1].shared)
        for name in names(sites):
            kept, expected = (Store(tmp_path / at / name).before(9) for at in (folder.name, "whole"))
            assert kept[0] == expected[0]
            assert bits(kept[1]) == bits(expected[1])


def test_a_site_round_asked_twice_gives_the_same_bits(sites: Any, tmp_path: Path) -> None:
    store, shared = Store(tmp_path), start(sites)
    given = to_bytes(shared)
    site_round(METHOD, sites[0], End(store), 0, given)
    once = site_round(METHOD, sites[0], End(store), 1, given)
    kept = store.before(2)
    _, before = store.before(1)
    update, private = METHOD.local_round(1, sites[0], shared, Private(before))
    assert kept[0] == 1
    assert bits(kept[1]) == bits(private)
    assert bits(from_bytes(once[1])) == bits(update.tensors)
    twice = site_round(METHOD, sites[0], End(store), 1, given)
    assert once == twice
    assert bits(kept[1]) == bits(store.before(2)[1])
    assert bits(kept[1]) != bits(store.before(1)[1])


def test_a_site_that_fails_is_silent_with_its_reason(sites: Any, tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Failing(FedAvg):
        error: type[Exception] = DataError

        def local_round(self, round: int, site: Site, shared: Shared, private: Private) -> tuple[Update, Private]:
            if site.name == "site-1":
                raise self.error("its images are gone")
            return super().local_round(round, site, shared, private)

    method = Failing(LoRA(rank=2))
    (ended,) = run(engine(sites, tmp_path, method), method, shared=start(sites), roster=names(sites), quorum=0.5)
    assert ended.silent == {"site-1": "its images are gone"}
    assert Store(tmp_path / "site-1").before(9) == (-1, {})
    broken = replace(method, error=ZeroDivisionError)  # a bug is no silence
    with pytest.raises(ZeroDivisionError):
        run(engine(sites, tmp_path, broken), broken, shared=start(sites), roster=names(sites))


def test_server_state_never_reaches_a_site(sites: Any, tmp_path: Path) -> None:
    seen: list[Mapping[str, Tensor]] = []

    class Watching(FedAvg):
        def local_round(self, round: int, site: Site, shared: Shared, private: Private) -> tuple[Update, Private]:
            seen.append(shared)
            return super().local_round(round, site, shared, private)

        def serve(self, site: Site, shared: Shared, private: Private) -> Callable[[Any], Tensor]:
            seen.append(shared)
            return super().serve(site, shared, private)

        def aggregate(self, shared: Shared, answers: Iterable[Answer]) -> tuple[Shared, Mapping[str, float]]:
            folded, metrics = super().aggregate(shared, answers)
            return Shared({**folded, "server/m": shared["server/m"] + 1}), metrics

    method = Watching(LoRA(rank=2))
    own = engine(sites, tmp_path, method)
    shared = Shared({**start(sites), "server/m": torch.zeros(())})
    *_, last = run(own, method, shared=shared, roster=names(sites), rounds=2)
    list(own.evaluate(1, last.shared, "held_out", names(sites)))
    assert float(last.shared["server/m"]) == 2
    assert len(seen) == 2 * 4 + 3
    assert not any(name.startswith("server/") for given in seen for name in given)


def test_evaluation_is_of_the_state_after_that_round(sites: Any, tmp_path: Path) -> None:
    own = engine(sites, tmp_path)
    *_, last = run(own, shared=start(sites), roster=names(sites), rounds=2)
    for round in (0, 1):
        replies = {reply.site: reply for reply in own.evaluate(round, last.shared, "train", names(sites))}
        for site in sites:
            private = Private(own.participants[site.name].store.before(round + 1)[1])
            reply = replies[site.name]
            assert isinstance(reply, Answer)
            assert reply.update.metrics == site_evaluate(METHOD, site, private, last.shared, site.train)
            assert reply.update.examples == len(site)
    (silent,) = own.evaluate(1, last.shared, "held_out", ["site-3"])
    assert silent == Silence("site-3", "it has no held_out examples")


def test_predictions_are_those_of_the_served_predictor_example_by_example(sites: Any) -> None:
    site, shared = sites[0], start(sites)
    serve = METHOD.serve(site, shared, Private({}))
    logits = predict(METHOD, site, Private({}), shared, site.train)
    assert not logits.requires_grad
    for row in range(len(site)):
        torch.testing.assert_close(logits[row : row + 1], serve(site.batch(site.train, [row])), rtol=1e-5, atol=1e-6)
