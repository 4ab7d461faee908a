"""What is more than chance: intervals over seeds and over examples, sign-flip tests, Holm's correction."""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray

LEVEL = 0.95
EXACT = 16  # differences up to which every flip is tried
DRAWS = 1 << 15  # flips that are drawn for more
RESAMPLES = 2000  # of a bootstrap
ROOM = 1 << 20  # numbers that a bootstrap draws at once


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and its 95 % t interval (n - 1 degrees of freedom); the interval is None for a single value."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return {"mean": mean, "low": None, "high": None, "n": n}
    from scipy.stats import t

    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(t.ppf(0.5 + LEVEL / 2, n - 1)) * deviation / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """By name, the mean over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: sum(each) / len(each) for name, each in values.items()}


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p of paired differences being symmetric about zero (Fisher's randomisation test).

    The fraction of the 2^n ways to give each difference a sign whose |sum| is no less than the observed one; it needs
    no normal distribution, and cannot fall below 2 / 2^n. For more than `EXACT` differences that fraction is estimated
    from `DRAWS` flips of a fixed seed, the observed one among them.
    """
    import numpy as np

    own = np.asarray(differences, dtype=np.float64)
    sums = np.abs(_signs(len(own)) @ own)
    return float(np.mean(sums >= abs(own.sum()) - 1e-12 * np.abs(own).sum()))


def holm(values: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted for the whole family (Holm 1979): the k-th least times m - k + 1, none below a lesser one's."""
    adjusted: dict[str, float] = {}
    least = 0.0
    for k, (name, p) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        least = max(least, min(1.0, p * (len(values) - k)))
        adjusted[name] = least
    return adjusted


def bootstrap(
    parts: "NDArray[float64]", minus: "NDArray[float64] | None" = None
) -> tuple[float, float] | tuple[None, None]:
    r"""The 95 % percentile interval (Efron, 1979) of a ratio of sums, its rows drawn anew with replacement:

    .. math:: \sum_i a_i \Big/ \sum_i b_i

    parts: (n, 2), a and b of each row; of a mean b is one
    minus: (n, 2) of another on the same rows: the interval is that of the difference, both drawn alike

    The draws depend on n alone, so the interval is the same at every call. Of few rows, or of rows that are all alike,
    it is too narrow: it knows no case that it has not seen. None where no draw has a ratio, and where there is no row.
    """
    import numpy as np

    n, rng = len(parts), np.random.default_rng(0)
    if not n:
        return None, None
    drawn = []
    for _ in range(0, RESAMPLES, at_once := min(RESAMPLES, max(1, ROOM // n))):
        rows = rng.integers(n, size=(at_once, n))
        sums = [own[rows].sum(1) for own in (parts, minus) if own is not None]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = [own[:, 0] / own[:, 1] for own in sums]
        drawn.append(ratios[0] - ratios[1] if minus is not None else ratios[0])
    found = np.concatenate(drawn)[:RESAMPLES]
    found = found[np.isfinite(found)]
    if not len(found):
        return None, None
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


@lru_cache(maxsize=4)
def _signs(n: int) -> "NDArray[float64]":
    """(flips, n) of +1 and -1, first row and first column +1: a flip and its opposite have one |sum|."""
    import numpy as np

    if n <= EXACT:
        flips = np.arange(1 << (n - 1))[:, None] >> np.arange(n - 1)[None] & 1
    else:
        flips = np.random.default_rng(0).integers(0, 2, (DRAWS, n - 1))
        flips[0] = 0
    return np.hstack([np.ones((len(flips), 1)), 1.0 - 2.0 * flips])
