"""How many images does a site need to know which units fire alike, and may they all be of one kind?

One site compares the global adapter's units with its own on a large probe; then on small ones of other images, drawn at
random or all of one answer, and the share of units that go where the large probe sent them is counted. Last, whether
the size of the probe is seen in the loss after a few rounds.
"""

from collections import Counter
from collections.abc import Sequence

import torch

from fedloom.errors import RecipeError
from fedloom.federation import visible
from fedloom.labels import several
from fedloom.methods import FedPIA
from fedloom.site import Site
from fedloom.studies.setting import ACCURACY, HELD_OUT, SITES, STARTS, TEST_LOSS, Setting, prepared
from fedloom.studies.study import Cell, Options, Part, Result, Row, verdict
from fedloom.studies.units import COSTS, agreement, matched, orders, read
from fedloom.tensors import generator, under
from fedloom.transport import Plans

QUESTION = "How large must a probe be for a stable match by activations, and of what?"
LARGEST = 64  # images
SIZES = (1, 2, 4, 8, 16, 32)
DRAWS = 3  # of each size and kind
KINDS = ("mixed", "one answer")
SIMILARITIES = {"correlation": "activations, correlation", "Euclidean": "activations, Euclidean"}
ROUNDS = 3
CHANGES = {"data.train": 110, "training.epochs": 1}
SHORT = {"data.train": 30, "data.test": 30}
STABLE = "units as by the largest probe, %"


def study(options: Options) -> Result:
    """The study: its figures, and what they say."""
    stable: list[Row] = []
    converged: list[Row] = []
    for seed in options.drawn():
        setting = prepared(options, seed, CHANGES, sites=2)
        for start in STARTS:
            stable += stability(setting, start)
        converged += convergence(prepared(options, seed, SHORT, sites=3))
    parts = (
        *(
            Part(
                f"Agreement with a probe of {LARGEST} images: trained from {start}",
                ("similarity", "probe of", "images"),
                (STABLE,),
                tuple(row for row in stable if row["start"] == start),
                x="images",
            )
            for start in STARTS
        ),
        Part(f"After {ROUNDS} rounds", ("images",), (HELD_OUT, TEST_LOSS, ACCURACY), tuple(converged)),
    )
    setting_of = (
        f"{SITES}; stability: the second of two sites with up to 110 training images, after one epoch, {DRAWS} draws "
        "of each probe, of images that the largest probe does not hold; rounds: three sites of 30 training images, "
        "starts of their own, one epoch a round, every match by activations believed"
    )
    return Result("probe", QUESTION, setting_of, options.drawn(), parts, tuple(found(parts)))


def stability(setting: Setting, start: str) -> list[Row]:
    """How small probes agree with the largest one at one site."""
    site = setting.sites[-1]
    first = setting.last(FedPIA(setting.adapter, init=STARTS[start], gamma=0.0), 1)
    own, current = under("local", first.privates[site.name]), visible(first.shared)
    images = distinct(site, setting.seed)
    if len(images) < LARGEST + max(SIZES):
        raise RecipeError(
            f"site '{site.name}' has {len(images)} images to train on, and this study needs {LARGEST + max(SIZES)}."
        )
    largest, rest = images[:LARGEST], images[LARGEST:]
    pools = {"mixed": rest, "one answer": of_one_answer(site, rest)}
    rows: list[Row] = []
    for similarity, cost in SIMILARITIES.items():

        def match(examples: Sequence[int], cost: str = cost) -> Plans:
            return matched(setting.adapter, current, own, COSTS[cost], read(site, setting.adapter, own, examples))

        held = orders(match(largest))
        for kind, pool in pools.items():
            for size in (size for size in SIZES if size <= len(pool)):
                agreed = [agreement(match(drawn(pool, size, setting.seed, draw)), held) for draw in range(DRAWS)]
                what: Row = {"start": start, "similarity": similarity, "probe of": kind, "images": size}
                rows.append({**what, "seed": setting.seed, STABLE: sum(agreed) / DRAWS})
    return rows


def convergence(setting: Setting) -> list[Row]:
    """What sites serve after a few rounds with probes of several sizes."""
    rows: list[Row] = []
    for size in (1, 4, 16):
        method = FedPIA(setting.adapter, init="independent", accept="always", gamma=0.0, probe=size)
        after = setting.last(method, ROUNDS)
        rows.append({"images": size, "seed": setting.seed, **setting.figures(method, after.shared, after.privates)})
    return rows


def distinct(site: Site, seed: int) -> list[int]:
    """One training example of each image, in an order drawn."""
    first = {example.image or example.text: row for row, example in reversed(list(enumerate(site.train.examples)))}
    return drawn(sorted(first.values()), len(first), seed, "distinct")


def of_one_answer(site: Site, rows: Sequence[int]) -> list[int]:
    """Those of the commonest answer."""
    answers = [several(site.train.examples[row].label)[0] for row in rows]
    commonest = Counter(answers).most_common(1)[0][0]
    return [row for row, answer in zip(rows, answers, strict=True) if answer == commonest]


def drawn(rows: Sequence[int], n: int, *key: object) -> list[int]:
    """The examples that a probe of this size and composition holds."""
    return [rows[i] for i in torch.randperm(len(rows), generator=generator("probe", *key))[:n].tolist()]


def found(parts: tuple[Part, ...]) -> list[str]:
    """What the figures say, in sentences."""
    told = []
    for start, part in zip(STARTS, parts, strict=False):
        for similarity in SIMILARITIES:
            where: dict[str, Cell] = {"similarity": similarity, "probe of": "mixed"}
            sizes = [size for size in SIZES if part.values(STABLE, **where, images=size)]
            means = {size: part.mean(STABLE, **where, images=size) for size in sizes}
            shares = ", ".join(f"{means[size]:.0f} % with {size}" for size in (1, 4, 16, 32) if size in means)
            enough = [size for size in sizes if means[size] >= 90]
            told.append(
                f"Trained from {start}, {similarity}: units go where {LARGEST} other images send them: {shares}; "
                + (f"{min(enough)} images are enough for 90 %." if enough else "no probe tried reaches 90 %.")
            )
        sizes = [size for size in SIZES if part.values(STABLE, **{"probe of": "one answer"}, images=size)]
        same: dict[str, Cell] = {"similarity": "correlation", "images": max(sizes)}
        difference = part.compared(STABLE, {**same, "probe of": "one answer"}, {**same, "probe of": "mixed"})
        label = f"Trained from {start}: units as by the largest probe, {max(sizes)} images"
        told.append(verdict(label, "all of one answer", "mixed", difference))
    for figure in (HELD_OUT, ACCURACY):
        difference = parts[-1].compared(figure, {"images": 1}, {"images": 16})
        told.append(verdict(f"After {ROUNDS} rounds: {figure}", "a probe of 1 image", "of 16", difference))
    return told
