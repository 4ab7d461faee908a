"""The wire: what crosses is what was meant, sooner or later; never more bytes than the budget; no frame is believed."""

import contextlib
import json
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from fedloom import coding
from fedloom.adapters import Bottleneck, LoRA
from fedloom.check import differing, federation, start
from fedloom.check.watched import origins, watch
from fedloom.engines.local import LocalEngine, Participant
from fedloom.errors import RecipeError, RunError, UpdateError
from fedloom.estimate import estimate
from fedloom.federation import Round, Schedule, admit, federate, longest, own_state, visible
from fedloom.methods import METHODS, FedAvg, FedPIA, Method
from fedloom.recipe import load
from fedloom.report.figures import on_the_wire
from fedloom.runs import run
from fedloom.site import Answer, Silence, Site, Update
from fedloom.store import Store
from fedloom.tensors import Private, Shared, Tensors, at, from_bytes, generator, part, to_bytes, under, without
from fedloom.wire import Stage, Wire

LOSSLESS: tuple[Stage, ...] = ("shuffle", "zstd")
INT8 = Wire(up=("delta", "int8", "zstd"))
BF16 = Wire(up=("delta", "bf16", "shuffle", "zstd"))
BOTH = Wire(up=("delta", "int8", "zstd"), down=("bf16", "shuffle", "zstd"))
WIRES = [Wire(), Wire(LOSSLESS, LOSSLESS), INT8, BF16, BOTH, Wire(up=("delta", "bf16")), Wire(up=("delta", *LOSSLESS))]
ROOM = 1 << 20
NAMES = [name for name in METHODS if name != "pooled"]  # it has no rounds
SMALL: Mapping[str, Mapping[str, Any]] = {"fedpia": {"probe": 1}}  # its 16 images are more than these sites have


def numbers(key: object, scale: float = 1.0) -> dict[str, Tensor]:
    """An update of every kind: factors, a vector, what is small, what is no float, a change of a control."""
    shapes = {"a/A": (4, 50), "a/B": (60, 4), "b/bias": (40,), "b/gate": (4,), "control/a/A": (4, 50)}
    rng = generator(key)
    return {name: scale * torch.randn(shape, generator=rng) for name, shape in shapes.items()} | {
        "b/count": torch.arange(40)
    }


def crossed(wire: Wire, sent: Tensors, given: Tensors, left: Tensors) -> tuple[Shared, dict[str, Tensor]]:
    """What arrives at the server, and what is left."""
    frame, left = wire.send("oslo", sent, given, left)
    return wire.receive("oslo", frame, given, ROOM), left


# The chain


@pytest.mark.parametrize("tensors", [numbers(0), {}, {"a/x": torch.randn(0, 5)}], ids=["all", "none", "empty"])
def test_no_chain_is_safetensors(tensors: Tensors) -> None:
    assert Wire().send("oslo", tensors, {}, {}) == (to_bytes(tensors), {})
    assert Wire().give(tensors) == to_bytes(tensors)


def test_the_stages_come_one_after_the_other() -> None:
    sent, base = numbers(1), numbers(2)
    change = {name: t - base[name] if name in ("a/A", "a/B", "b/bias") else t for name, t in sent.items()}
    half, whole = to_bytes(coding.bf16(change)), to_bytes(coding.int8(change))
    assert BF16.send("oslo", sent, base, {})[0] == coding.compressed(coding.shuffled(half, 2))
    assert INT8.send("oslo", sent, base, {})[0] == coding.compressed(whole)
    assert Wire(up=("delta", *LOSSLESS)).send("oslo", sent, base, {})[0] == coding.compressed(
        coding.shuffled(to_bytes(change), 4)
    )
    assert BOTH.give(sent) == coding.compressed(coding.shuffled(to_bytes(coding.bf16(sent)), 2))


@pytest.mark.parametrize("tensors", [numbers(0), {}, {"a/x": torch.randn(0, 5)}], ids=["all", "none", "empty"])
def test_what_rounds_nothing_loses_no_bit(tensors: Tensors) -> None:
    wire = Wire(LOSSLESS, LOSSLESS)
    assert differing(crossed(wire, tensors, {}, {})[0], tensors) is None
    assert differing(wire.given(wire.give(tensors)), tensors) is None


@pytest.mark.parametrize("wire", WIRES[2:], ids=str)
def test_what_is_small_or_no_float_crosses_to_the_bit(wire: Wire) -> None:
    sent = numbers(1)
    there = crossed(wire, sent, numbers(2), {})[0]
    assert differing(*({name: of[name] for name in ("b/gate", "b/count")} for of in (there, sent))) is None


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ({"up": ("zstd", "delta")}, r"in this order: \['delta', 'zstd'\]"),
        ({"up": ("zstd", "zstd")}, "each stage stands once"),
        ({"up": ("delta", "bf16", "int8")}, "rounds twice"),
        ({"up": ("delta", "bf16", "shuffle")}, "leave it out"),
        ({"up": ("delta", "int8", "shuffle", "zstd")}, "leave it out"),
        ({"down": ("delta",)}, "sites may sit out"),
        ({"up": ("int8",)}, "begin with 'delta'"),
        ({"down": ("bf16",)}, "begin with 'delta'"),
        ({"up": ("delta", "int8"), "budget": 1000}, "needs 'delta' and 'zstd'"),
        ({"up": ("delta", "zstd"), "budget": "10 parsecs"}, "expected bytes"),
        ({"up": ("delta", "zstd"), "budget": "0.1 bytes"}, "expected bytes"),
    ],
)
def test_a_chain_that_makes_no_sense_is_refused(said: dict[str, Any], found: str) -> None:
    with pytest.raises(RecipeError, match=found):
        Wire(**said)


@pytest.mark.parametrize(("said", "most"), [(123, 123), ("200 kB", 200_000), ("1.5MB", 1_500_000), ("7 bytes", 7)])
def test_a_budget_is_in_bytes(said: int | str, most: int) -> None:
    assert Wire(up=("delta", "zstd"), budget=said).most == most


# Feedback


@pytest.mark.parametrize("wire", [INT8, BF16, BOTH, replace(INT8, budget=500), Wire(("delta", "zstd"), budget=900)])
@settings(max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_what_was_sent_tracks_what_was_meant(wire: Wire, seed: int) -> None:
    """Sum of what arrived + what is left = sum of what was meant, whatever was given from round to round."""
    left: Mapping[str, Tensor] = {}
    meant = {name: torch.zeros(t.shape).double() for name, t in numbers(0).items()}
    arrived = dict(meant)
    for round in range(6):
        base, sent = numbers((seed, round, "given")), numbers((seed, round), 10.0 ** (round % 3 - 1))
        there, left = crossed(wire, sent, base, left)
        arrived = {name: total + there[name] for name, total in arrived.items()}
        meant = {name: total + sent[name] for name, total in meant.items()}
    assert left.keys() == {"a/A", "a/B", "b/bias", "control/a/A"}
    for name, e in left.items():
        assert_close(arrived[name] + e, meant[name], atol=1e-4, rtol=1e-5)


def test_a_step_below_the_rounding_arrives_in_time() -> None:
    base = {"a/x": torch.zeros(1, 50)}
    step = torch.full((1, 50), 1e-3)
    step[0, 0] = 1.0  # of a row whose scale is 1 / 127: 1e-3 is rounded to nothing
    assert not coding.unrounded(coding.int8({"a/x": step}))["a/x"][0, 1:].any()
    left: Mapping[str, Tensor] = {}
    total = torch.zeros(1, 50)
    for _ in range(40):
        there, left = crossed(INT8, {"a/x": step}, base, left)
        total += there["a/x"]
    assert_close(total, 40 * step, atol=1.1 / 127, rtol=0)


def test_rounding_on_the_way_down_does_not_stay_in_the_model() -> None:
    """A site that changes nothing leaves the server's tensors as they are, to the rounding of float32."""
    shared = numbers(3)
    seen = BOTH.given(BOTH.give(shared))
    assert not torch.equal(seen["a/A"], shared["a/A"])
    frame, left = BOTH.send("oslo", seen, seen, {})
    there = BOTH.receive("oslo", frame, shared, ROOM)
    assert differing(without("control", there), without("control", shared)) is None
    assert not any(tensor.any() for tensor in without("control", left).values())


def test_another_shape_than_the_one_given_crosses_whole_and_without_feedback() -> None:
    sent, base = {"a/A": torch.randn(6, 50)}, {"a/A": torch.randn(4, 50)}
    there, left = crossed(INT8, sent, base, {"a/A": torch.ones(6, 50)})
    assert left == {}
    assert_close(there["a/A"], sent["a/A"], atol=float(sent["a/A"].abs().max()) / 250, rtol=0)
    assert crossed(INT8, sent, sent, {"a/A": torch.ones(4, 50)})[1]["a/A"].shape == (6, 50)


# The budget


@settings(max_examples=60)
@given(
    budget=st.integers(300, 1500),
    seed=st.integers(0, 10**6),
    up=st.sampled_from([("delta", "int8", "zstd"), ("delta", "bf16", "shuffle", "zstd"), ("delta", "zstd")]),
)
def test_a_budget_is_never_exceeded(budget: int, seed: int, up: tuple[Stage, ...]) -> None:
    wire, free = Wire(up, budget=budget), Wire(up)
    left: Mapping[str, Tensor] = {}
    for round in range(3):
        sent, base = numbers((seed, round)), numbers((seed, "given"))
        meant = free.meant(sent, base, left)
        nothing = {name: torch.zeros_like(t) if coding.large(t) else t for name, t in sent.items()}
        if len(free.send("oslo", nothing, {}, {})[0]) > budget:
            with pytest.raises(UpdateError, match="site 'oslo' has to send"):
                wire.send("oslo", sent, base, left)
            return
        frame, left = wire.send("oslo", sent, base, left)
        assert len(frame) <= budget
        there = wire.receive("oslo", frame, base, ROOM)
        without_base = free.meant(there, base, {})
        rows = [
            (float(line.norm()), bool(came.any()))
            for name in left
            for line, came in zip(coding.rows(meant[name]), coding.rows(left[name] != meant[name]), strict=True)
        ]
        kept, cut = ([norm for norm, here in rows if here is came] for came in (True, False))
        assert min(kept, default=torch.inf) >= max(cut, default=0.0) * (1 - 1e-6)
        for name, e in left.items():
            assert_close(without_base[name] + e, meant[name], atol=1e-5, rtol=1e-5)


def test_as_many_rows_are_sent_as_there_is_room_for() -> None:
    sent = {"a/A": torch.randn(40, 100, generator=generator(1))}
    base = {"a/A": torch.zeros(40, 100)}
    sizes = []
    for budget in range(400, 4400, 500):
        frame, _ = replace(INT8, budget=budget).send("oslo", sent, base, {})
        assert budget - 250 < len(frame) <= budget  # a row is 100 bytes and its scale
        sizes.append(len(frame))
    assert sizes == sorted(sizes)


# Nothing that a peer sends is believed


@pytest.mark.parametrize("wire", [INT8, BF16, Wire(LOSSLESS), Wire()], ids=str)
def test_a_damaged_frame_is_refused_or_read_and_never_a_crash(wire: Wire) -> None:
    sent, base = numbers(1), numbers(2)
    frame = bytearray(wire.send("oslo", sent, base, {})[0])
    rng = generator("damage")
    for _ in range(150):
        bad = bytearray(frame)
        for i in torch.randint(0, len(frame), (3,), generator=rng).tolist():
            bad[i] = int(torch.randint(0, 256, (), generator=rng))
        cut = int(torch.randint(0, len(frame) + 1, (), generator=rng))
        for received in (bytes(bad), bytes(frame[:cut])):
            with contextlib.suppress(UpdateError):
                there = wire.receive("oslo", received, base, ROOM)
                admit(Answer("oslo", Update(there, 1.0, 1)), Shared(base), FedAvg())


def test_a_bomb_of_a_site_is_refused_before_it_is_unpacked() -> None:
    shared = Shared(numbers(0))
    bomb = coding.compressed(to_bytes({"a/A": torch.zeros(4, 1 << 22)}))
    tracemalloc.start()
    with pytest.raises(UpdateError, match=r"site 'oslo' sent a frame .* more than \d+ bytes, unpacked; let both run"):
        Wire(LOSSLESS[1:]).receive("oslo", bomb, shared, longest(shared, FedAvg()))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_bomb_of_the_server_is_refused() -> None:
    with pytest.raises(UpdateError, match="the server sent a frame"):
        BOTH.given(coding.compressed(bytes(1 << 27)))


@pytest.mark.parametrize(
    "sent", [{"a/x": torch.tensor(torch.nan)}, {"server/x": torch.ones(3)}, {"wire/x": torch.ones(3)}]
)
def test_a_server_that_sends_what_it_may_not_is_named(sent: Tensors) -> None:
    with pytest.raises(UpdateError, match=f"the server sent '{min(sent)}'"):
        Wire().given(to_bytes(sent))


@pytest.mark.parametrize("kind", ["F4", "F8_E8M0", "F8_E5M2", "C64"])
def test_numbers_of_a_kind_that_no_update_has_are_refused(kind: str) -> None:
    header = json.dumps(
        {"a/A": {"dtype": kind, "shape": [16], "data_offsets": [0, {"F4": 8, "C64": 128}.get(kind, 16)]}}
    )
    frame = len(header).to_bytes(8, "little") + header.encode() + bytes(json.loads(header)["a/A"]["data_offsets"][1])
    with pytest.raises(UpdateError, match="site 'oslo'"):
        admit(
            Answer("oslo", Update(Wire().receive("oslo", frame, {}, ROOM), 1.0, 1)),
            Shared({"a/A": torch.ones(16)}),
            FedAvg(),
        )


def test_a_site_may_not_send_more_than_the_budget() -> None:
    sent, base = numbers(1), numbers(2)
    frame, _ = INT8.send("oslo", sent, base, {})
    with pytest.raises(UpdateError, match=f"site 'oslo' sent {len(frame)} bytes, more than the budget"):
        replace(INT8, budget=len(frame) - 1).receive("oslo", frame, base, ROOM)


def test_another_chain_is_named() -> None:
    frame, _ = Wire().send("oslo", numbers(1), numbers(2), {})
    with pytest.raises(UpdateError, match=r"site 'oslo' .* not zstd; let both run one recipe"):
        INT8.receive("oslo", frame, numbers(2), ROOM)


def test_a_site_whose_update_is_not_finite_keeps_no_feedback_of_it() -> None:
    sent = {**numbers(1), "a/A": torch.full((4, 50), torch.nan)}
    with pytest.raises(UpdateError, match="site 'oslo' has 'a/A' with values that are not finite"):
        INT8.send("oslo", sent, numbers(2), {})


@pytest.mark.parametrize(
    "method", [FedAvg(), FedAvg(Bottleneck(4)), FedPIA(Bottleneck(4), probe=1), METHODS["flora"]()]
)
def test_the_longest_frame_has_room_for_all_that_is_admitted(method: Method, sites: tuple[Site, ...]) -> None:
    shared = start(method, sites)
    most = longest(shared, method)
    assert most < 100 * len(to_bytes(shared))
    widest = dict(shared)
    if getattr(method, "any_width", False):
        wide = {Bottleneck: {"width": 16}, LoRA: {"rank": 16}}[type(method.adapter)]
        widest = sites[0].model.init(replace(method.adapter, **wide), 0)
        assert differing(widest, shared) is not None
    for wire in WIRES:
        frame, _ = wire.send("oslo", widest, shared, {})
        there = wire.receive("oslo", frame, shared, most)
        admit(Answer("oslo", Update(there, 1.0, 1)), shared, method)


# Every method


@pytest.fixture(scope="module")
def sites() -> tuple[Site, ...]:
    return federation()


def engine(method: Method, sites: Sequence[Site], folder: Path, wire: Wire) -> LocalEngine:
    own = {site.name: Participant(site, Store(folder / site.name), site.held_out) for site in sites}
    return LocalEngine(method, own, wire)


def rounds(local: LocalEngine, sites: Sequence[Site], first: int = 0, shared: Shared | None = None) -> list[Round]:
    shared = start(local.method, sites) if shared is None else shared
    return list(federate(local.method, local, shared, Schedule(tuple(site.name for site in sites), 2), first))


@pytest.mark.parametrize("name", NAMES)
def test_every_method_runs_over_every_wire(name: str, sites: tuple[Site, ...], tmp_path: Path) -> None:
    """Everybody answers; what rounds nothing changes no bit, what rounds moves little; killed and gone on, the bits are
    the same."""
    method: Method = METHODS[name](**SMALL.get(name, {}))
    plain = rounds(engine(method, sites, tmp_path / "plain", Wire()), sites)
    for i, wire in enumerate([Wire(LOSSLESS, LOSSLESS), BOTH]):
        found = rounds(engine(method, sites, tmp_path / f"{i}", wire), sites)
        assert not any(round.silent for round in found)
        if not wire.feeds_back:
            assert differing(found[-1].shared, plain[-1].shared) is None
        else:
            # What is given/ are factors of a product, which a little noise turns.
            assert differing(*(without("given", of[0].shared) for of in (found, plain)), 0.05) is None
        again = engine(method, sites, tmp_path / f"{i}", wire)
        next(again.round(1, found[0].shared, [sites[0].name]))  # killed in its second round, after the first site
        resumed = rounds(again, sites, 1, found[0].shared)
        assert differing(resumed[-1].shared, found[-1].shared) is None
        assert resumed[-1].answers.keys() == found[-1].answers.keys()
        for site in sites:
            kept = again.participants[site.name].store.before(9)[1]
            expected = Store(tmp_path / "plain" / site.name).before(9)[1]
            assert without("wire", kept).keys() == expected.keys()
            assert wire.feeds_back or not under("wire", kept)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_private_crosses_that_the_method_does_not_send(name: str, sites: tuple[Site, ...]) -> None:
    """Of private state the wire sends its own feedback alone, and keeps for it what was meant to be sent alone."""
    method: Method = METHODS[name](**SMALL.get(name, {}))
    site, shared = sites[0], visible(start(method, sites))
    update, private = method.local_round(0, site, shared, Private({}))
    _, left = INT8.send(site.name, update.tensors, shared, {})
    watched = watch({**private, **at("wire", left)})
    update, _ = method.local_round(1, site, shared, own_state(watched))
    meant = INT8.meant(update.tensors, shared, under("wire", watched))
    assert ("wire" in origins(meant)) == bool(left)
    assert origins(meant) <= method.sends | {"wire"}
    _, after = INT8.send(site.name, update.tensors, shared, under("wire", watched))
    assert origins(after) <= method.sends | {"wire"}


def test_a_site_that_has_no_room_is_silent_and_loses_nothing(sites: tuple[Site, ...], tmp_path: Path) -> None:
    local = engine(FedAvg(), sites, tmp_path, replace(INT8, budget=100))
    reply = next(local.round(0, start(FedAvg(), sites), [sites[0].name]))
    assert isinstance(reply, Silence)
    assert "has to send" in reply.reason
    assert local.participants[sites[0].name].store.before(9) == (-1, {})


def test_bytes_are_those_of_the_frames(sites: tuple[Site, ...], tmp_path: Path) -> None:
    shared = start(FedAvg(), sites)
    (reply,) = engine(FedAvg(), sites, tmp_path, BOTH).round(0, shared, [sites[0].name])
    assert isinstance(reply, Answer)
    assert reply.bytes_down == len(BOTH.give(shared))
    update, _ = FedAvg().local_round(0, sites[0], BOTH.given(BOTH.give(shared)), Private({}))
    frame, _ = BOTH.send("any", update.tensors, BOTH.given(BOTH.give(shared)), {})
    assert reply.bytes_up == len(frame)
    assert from_bytes(coding.decompressed(frame, ROOM)).keys() == coding.int8(update.tensors).keys()


# A run

SAID = {"wire.up": ["delta", "int8", "zstd"], "wire.down": ["bf16", "shuffle", "zstd"]}


def test_a_run_that_was_stopped_ends_with_the_same_bits(recipe: Path, tmp_path: Path) -> None:
    straight = run(load(recipe, SAID), tmp_path / "straight")
    run(load(recipe, {**SAID, "federation.rounds": 1}), tmp_path / "stopped")
    stopped = run(load(recipe, SAID), tmp_path / "stopped", resume=True)
    for folder in ("server", "sites/oslo", "sites/rome", "sites/kyiv"):
        one, other = (Store(ended.folder / folder).before(9) for ended in (straight, stopped))
        assert one[0] == other[0] == 1
        assert differing(one[1], other[1]) is None
        assert folder == "server" or under("wire", one[1])
    assert not part("wire", stopped.private("oslo"))
    for key in ("bytes_up", "bytes_down", "bytes_site", "views"):
        assert straight.summary[key] == stopped.summary[key]
    with pytest.raises(RunError, match=r"wire\.up, wire\.down changed"):
        run(load(recipe, {**SAID, "wire.up": ["delta"], "wire.down": []}), tmp_path / "stopped", resume=True)


def test_a_run_tells_what_crossed(recipe: Path, tmp_path: Path) -> None:
    plain = run(load(recipe), tmp_path / "plain")
    packed = run(load(recipe, {**SAID, "wire.budget": "5 kB"}), tmp_path / "packed")
    assert packed.summary["bytes_up"] < 0.4 * plain.summary["bytes_up"]
    assert packed.summary["bytes_down"] < 0.6 * plain.summary["bytes_down"]
    lines = packed.rounds
    assert all(row["bytes_up"] <= 5000 for line in lines for row in line["sites"].values())
    most = [max(row["bytes_up"] + row["bytes_down"] for row in line["sites"].values()) for line in lines]
    assert packed.summary["bytes_site"] == sum(most) / len(most)
    told = (packed.folder / "report.html").read_text()
    assert on_the_wire(packed.summary["bytes_site"]) in told
    assert "up: delta int8 zstd, down: bf16 shuffle zstd" in told
    expected = estimate(load(recipe, {**SAID, "wire.budget": "5 kB"}))
    assert expected.bytes_up == pytest.approx(packed.summary["bytes_up"], rel=0.1)
    assert expected.bytes_down == pytest.approx(packed.summary["bytes_down"], rel=0.25)
    assert any(line.startswith("wire ") for line in expected.lines())


@pytest.mark.parametrize(
    ("n", "said"),
    [(1.25e6, "1 s a round at 10 Mbit/s, 0.1 s at 100"), (1e8, "1 min 20 s a round at 10 Mbit/s, 8 s at 100")],
)
def test_time_on_the_wire(n: float, said: str) -> None:
    assert on_the_wire(n) == said


def test_a_chain_of_no_sense_is_one_sentence(fedloom: Callable[..., tuple[int, str, str]], recipe: Path) -> None:
    code, out, err = fedloom("run", recipe, "--set", "wire.budget=9", "--out", recipe.parent / "run")
    assert (code, out) == (2, "")
    assert err == (
        f"fedloom: [wire] of {recipe}: a budget is kept by leaving out differences, which zstd packs to nothing: "
        "up = [] needs 'delta' and 'zstd'.\n"
    )


def test_a_recipe_of_before_there_were_wires_keeps_its_id(recipe: Path) -> None:
    plain = load(recipe)
    assert plain.table()["wire"] == {"up": [], "down": [], "budget": "none"}
    assert load(recipe, {"wire.up": []}).id == plain.id != load(recipe, {"wire.up": ["zstd"]}).id
    assert load(recipe, {"wire.up": ["zstd"]}).difference(plain) == ["wire.up", "wire.down", "wire.budget"]
