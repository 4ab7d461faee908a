"""One set of examples -> unlike sites, and one site -> train, held-out and test.

A *unit* is what may not be torn: the examples of one `group` (a patient) where the source has a group column, else
the examples of one image (all its questions), else one text. Every number of examples below counts units. What is drawn
depends on the seed and on what the examples are, not on the order of their rows.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedloom.data import Example, open_image
from fedloom.errors import DataError
from fedloom.sources import SPLITS

Sites: TypeAlias = dict[str, tuple[Example, ...]]
DRAWS = 1000  # of a random partition, until every site has its minimum


@dataclass(frozen=True)
class Unit:
    """Examples that stay together, and the class that they count for."""

    name: str
    label: str
    examples: tuple[Example, ...]


def units(examples: Sequence[Example]) -> list[Unit]:
    """The units of `examples`, by name.

    Of several labels (multi-label rows, questions of one image) a unit counts for its rarest among `examples`: the
    common ones are everywhere, whatever is drawn, so only the rare ones can make sites unlike, or be missing from a
    split. Of no label it counts for the class "".
    """
    labels = Counter(chain.from_iterable(_labels(example) for example in examples))
    members: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        members[unit_of(example)].append(example)

    def rarest(rows: Iterable[Example]) -> str:
        return min(chain.from_iterable(map(_labels, rows)), key=lambda label: (labels[label], label), default="")

    return [Unit(name, rarest(rows), tuple(sorted(rows, key=repr))) for name, rows in sorted(members.items())]


def unit_of(example: Example) -> str:
    """The name of the unit that an example belongs to."""
    return example.group or example.image or example.text or ""


def _labels(example: Example) -> tuple[str, ...]:
    return (example.label,) if isinstance(example.label, str) else example.label


def natural(examples: Sequence[Example], merge_below: int = 0) -> Sites:
    """By the site column; sites of fewer than `merge_below` units become one, "other".

    Here a unit may lie at several sites, where the source says so (the questions of one image, by category):
    `shared_images` names such images. Raises DataError where a row names no site.
    """
    sites: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        if example.site is None:
            raise DataError(f"'{unit_of(example)}' names no site: name the site column, or choose a seeded partition")
        sites[example.site].append(example)
    merged: dict[str, list[Unit]] = defaultdict(list)
    for site, rows in sites.items():
        members = units(rows)
        merged[site if len(members) >= merge_below else "other"] += members
    return {site: _rows(merged[site]) for site in sorted(merged)}


def dirichlet(examples: Sequence[Example], sites: int, alpha: float, seed: int, minimum: int = 1) -> Sites:
    """By label: the units of class c go to the sites in proportions p_c ~ Dir(α, ..., α).

    The smaller α, the less alike the sites. Drawn until every site has `minimum` units; after 1000 times DataError.
    Source: Yurochkin et al., Bayesian Nonparametric Federated Learning of Neural Networks, ICML 2019; Hsu et al. 2019.
    """
    return _by_share(_by_label(units(examples)), sites, alpha, seed, minimum)


def by_quantity(examples: Sequence[Example], sites: int, alpha: float, seed: int, minimum: int = 1) -> Sites:
    """By size: the sites' shares of all units are p ~ Dir(α, ..., α). Else as `dirichlet`."""
    return _by_share([units(examples)], sites, alpha, seed, minimum)


def by_class(examples: Sequence[Example], sites: int, classes_per_site: int, seed: int) -> Sites:
    """By label: each site holds `classes_per_site` classes, and shares each evenly with whoever holds it too.

    The classes are dealt in a drawn order, again from its start when it ends.
    Raises DataError where a class would have no site, or a site no example.
    """
    rng = np.random.default_rng(seed)
    strata = _by_label(units(examples))
    if not 1 <= classes_per_site <= len(strata) <= sites * classes_per_site:
        raise DataError(
            f"{sites} sites of {classes_per_site} classes each cannot hold the {len(strata)} classes of the data: "
            f"classes_per_site must lie between {-(-len(strata) // max(sites, 1))} and {len(strata)}"
        )
    order = rng.permutation(len(strata))
    holders: dict[int, list[int]] = defaultdict(list)
    for slot in range(sites * classes_per_site):
        holders[int(order[slot % len(strata)])].append(slot // classes_per_site)
    sizes = np.zeros((len(strata), sites), dtype=np.int64)
    for stratum, held_by in holders.items():
        for part, site in enumerate(held_by):
            sizes[stratum, site] = len(strata[stratum][part :: len(held_by)])
    return _dealt(strata, sizes, rng)


def iid(examples: Sequence[Example], sites: int, seed: int) -> Sites:
    """Units at random, as many at each site as at any other, or one more."""
    every = units(examples)
    sizes = np.array([[len(every[site::sites]) for site in range(sites)]])
    return _dealt([every], sizes, np.random.default_rng(seed))


def _by_share(strata: Sequence[Sequence[Unit]], sites: int, alpha: float, seed: int, minimum: int) -> Sites:
    if sites < 1 or minimum < 1 or not alpha > 0:
        raise DataError(f"{sites} sites, minimum {minimum}, alpha {alpha}: expected 1 or more, 1 or more, and above 0")
    rng = np.random.default_rng(seed)
    lengths = np.array([[len(stratum)] for stratum in strata])
    best = -1
    for _ in range(DRAWS):
        shares = rng.dirichlet(np.full(sites, alpha), size=len(strata))
        cuts = np.rint(np.cumsum(shares, axis=1) * lengths).astype(np.int64)
        cuts[:, -1:] = lengths
        sizes = np.diff(cuts, axis=1, prepend=0)
        best = max(best, int(sizes.sum(axis=0).min()))
        if best >= minimum:
            return _dealt(strata, sizes, rng)
    raise DataError(
        f"{DRAWS} draws with alpha = {alpha} of {lengths.sum()} units in {len(strata)} classes over {sites} sites "
        f"never gave every site {minimum}, at best {best}: ask for fewer sites, a smaller minimum or a greater alpha"
    )


def _dealt(strata: Sequence[Sequence[Unit]], sizes: NDArray[np.int64], rng: np.random.Generator) -> Sites:
    """`sizes[c, s]` units of stratum c, at random, to site s."""
    sites = sizes.shape[1]
    if not sites or not sizes.sum(axis=0).all():
        raise DataError(
            f"{sum(map(len, strata))} units in {len(strata)} classes cannot be dealt to {sites} sites so that each has "
            "one: ask for another number of sites"
        )
    dealt: list[list[Unit]] = [[] for _ in range(sites)]
    for stratum, counts in zip(strata, sizes, strict=True):
        order = rng.permutation(len(stratum))
        for site, chosen in enumerate(np.split(order, np.cumsum(counts)[:-1])):
            dealt[site] += [stratum[unit] for unit in chosen]
    digits = max(2, len(str(sites)))
    return {f"site-{number:0{digits}}": _rows(members) for number, members in enumerate(dealt, 1)}


def _by_label(members: Sequence[Unit]) -> list[list[Unit]]:
    strata: dict[str, list[Unit]] = defaultdict(list)
    for unit in members:
        strata[unit.label].append(unit)
    return [strata[label] for label in sorted(strata)]


def _rows(members: Iterable[Unit]) -> tuple[Example, ...]:
    return tuple(chain.from_iterable(unit.examples for unit in sorted(members, key=lambda unit: unit.name)))


@dataclass(frozen=True)
class Split:
    """What a site trains on, chooses on, and is measured on. No unit lies in two of them."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    test: tuple[Example, ...]


def split(
    examples: Sequence[Example],
    *,
    seed: int,
    held_out: float | int = 0.1,
    test: float | int | Literal["column"] = 0.25,
    train: int | None = None,
    per_class: int | None = None,
) -> Split:
    """One site's examples, split by unit and, as well as units allow, with each class in proportion.

    `held_out` and `test` are fractions of the units, or numbers of them. `test="column"` keeps what the split column
    says; its validation rows, where it has any, are then the held-out ones. `train` and `per_class` limit the training
    units, in all and of each class (few-shot); a smaller limit takes a part of what a larger one takes, and test and
    held-out stay as they are.

    Within a class the n units are put in a drawn order, and unit i at (i + u) / n, with u uniform in [0, 1); all units
    are then cut by place. So each class gives its share to within about one unit, and a unit of a rare class is as
    likely in test as any other: a test without rare answers would flatter.
    Raises DataError where the parts leave no unit for training.
    """
    for name, part in (("held_out", held_out), ("test", test)):
        if part != "column" and (part < 0 or (isinstance(part, float) and part >= 1)):
            raise DataError(f"{name} = {part}: expected a fraction below 1, or a number of images (or groups)")
    every = units(examples)
    if test == "column":
        columns = _by_column(every)
        tested, held, rest = columns["test"], columns["held_out"], _in_strata(columns["train"], seed)
    else:
        order = _in_strata(every, seed)
        tested, held, rest = order[: _count(test, len(every))], [], order[_count(test, len(every)) :]
    if not held:
        choose = _count(held_out, len(rest) if test == "column" else len(every))
        held, rest = rest[:choose], rest[choose:]
    if not rest:
        raise DataError(
            f"{len(every)} units (images, or groups) cannot be split into test = {test}, held_out = {held_out} and at "
            "least one for training: more data, fewer sites, or smaller parts"
        )
    few = chain.from_iterable(stratum[:per_class] for stratum in _by_label(rest[:train]))
    return Split(_rows(few), _rows(held), _rows(tested))


def _count(part: float | int, number: int) -> int:
    return part if isinstance(part, int) else max(round(part * number), 1 if part else 0)


def _in_strata(members: Sequence[Unit], seed: int) -> list[Unit]:
    """In an order of which every stretch holds each class in proportion."""

    def uniform(*names: str) -> float:  # in [0, 1)
        digest = hashlib.sha256("\0".join((str(seed), *names)).encode()).digest()
        return int.from_bytes(digest[:6], "big") / 2**48

    place: dict[str, float] = {}
    for stratum in _by_label(members):
        drawn = sorted(stratum, key=lambda unit: (uniform(unit.name), unit.name))
        start = uniform(drawn[0].name, "start")
        place |= {unit.name: (rank + start) / len(drawn) for rank, unit in enumerate(drawn)}
    return sorted(members, key=lambda unit: (place[unit.name], unit.name))


def _by_column(members: Sequence[Unit]) -> dict[str, list[Unit]]:
    parts: dict[str, list[Unit]] = {"train": [], "held_out": [], "test": []}
    for unit in members:
        said = sorted({(example.split or "nothing") for example in unit.examples})
        sides = {SPLITS.get(value.lower(), value) for value in said}
        if len(sides) > 1:
            raise DataError(f"'{unit.name}' lies in several splits: {', '.join(said)}. Set test to a fraction")
        if not sides <= parts.keys():
            raise DataError(f"the split column says '{said[0]}' of '{unit.name}', expected {', '.join(sorted(SPLITS))}")
        parts[sides.pop()].append(unit)
    if not parts["test"]:
        raise DataError("no row of the split column says 'test': set test to a fraction")
    return parts


@dataclass(frozen=True)
class Overlap:
    """One image, as it seems, at two sites."""

    site: str
    image: str
    other_site: str
    other_image: str
    how: Literal["bytes", "looks alike"]


def shared_images(sites: Mapping[str, Sequence[Example]], root: Path, distance: int = 2) -> list[Overlap]:
    """The images that two sites (or two splits) share: of equal bytes (SHA-256), or that look alike.

    Alike are two images whose 64-bit difference hashes (is a pixel of the image, shrunk to 9 x 8 grey ones, brighter
    than its left neighbour?) differ in at most `distance` bits; so a copy that was resized or compressed is found.
    An image of one flat colour is compared by its bytes alone. Raises ImageError where one cannot be read.
    """
    where = [(site, image) for site in sites for image in sorted({row.image for row in sites[site] if row.image})]
    paths = sorted({image for _, image in where})
    prints = {image: _fingerprint(root / image) for image in paths}
    home = np.array([list(sites).index(site) for site, _ in where])
    contents = np.array([prints[image][0] for _, image in where])
    looks = np.array([prints[image][1] for _, image in where])
    overlaps = []
    for row, (site, image) in enumerate(where):
        later = slice(row + 1, None)
        same = contents[later] == contents[row]
        alike = looks[later] @ looks[row] >= 64 - 2 * distance  # 64 minus twice the bits that differ
        for other in row + 1 + np.flatnonzero((home[later] != home[row]) & (same | alike)):
            how: Literal["bytes", "looks alike"] = "bytes" if contents[other] == contents[row] else "looks alike"
            overlaps.append(Overlap(site, image, *where[other], how))
    return overlaps


def _fingerprint(path: Path) -> tuple[str, NDArray[np.float32]]:
    """The SHA-256 of the file, and the difference hash of the image as 64 signs; zeros where no pixel is brighter."""
    grey = np.asarray(open_image(path).convert("L").resize((9, 8), Image.Resampling.BOX))
    brighter = (grey[:, 1:] > grey[:, :-1]).ravel()
    signs = np.where(brighter, 1, -1) * brighter.any()
    return hashlib.sha256(path.read_bytes()).hexdigest(), signs.astype(np.float32)
