"""Figures as people read them: percent with one decimal, gains in points, bytes, times, rounds from one."""

from collections.abc import Iterable
from itertools import groupby

RATES = (10, 100)  # Mbit/s: of a line that a site may have
COUNTED = frozenset({"examples"})  # numbers of things
NAMES = {"auroc": "AUROC", "auprc": "AUPRC"}  # of metrics, where they are shown
UNBOUNDED = frozenset({"loss"})  # every other metric of a task is a fraction


def percent(fraction: float | None) -> str:
    """0.412 is "41.2"; what is not there is "-"."""
    return "-" if fraction is None else f"{_tenths(fraction):.1f}"


def points(difference: float | None) -> str:
    """A difference of two fractions: 0.012 is "+1.2"."""
    return "" if difference is None else f"{_tenths(difference):+.1f}"


def between(interval: tuple[float, float] | None, signed: bool = False) -> str:
    """An interval in whole percent, as fine as it can be meant: (0.358, 0.604) is "36–60"; signed, "+36…+60"."""
    if interval is None:
        return ""
    low, high = (round(100 * x) for x in interval)
    return f"{low:+d}…{high:+d}" if signed else f"{low:d}–{high:d}"


def loses(difference: float | None) -> bool:
    """Whether a gain is below zero as `points` shows it."""
    return difference is not None and _tenths(difference) < 0


def measured(metric: str, value: float | None) -> str:
    """A metric by its name: a count, a loss, or a fraction in percent."""
    if value is None:
        return "-"
    return f"{value:.0f}" if metric in COUNTED else f"{value:.3f}" if metric in UNBOUNDED else percent(value)


def size(n: float) -> str:
    """Bytes in units of a thousand: 2241360 is "2.2 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 999.5 or (unit != "bytes" and n < 999.95):
            return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def on_the_wire(n: float) -> str:
    """How long n bytes take on slow and on fast lines: 1250000 is "1 s a round at 10 Mbit/s, 0.1 s at 100"."""
    (slow, first), *others = ((rate, 8 * n / (1e6 * rate)) for rate in RATES)
    return ", ".join([f"{_brief(first)} a round at {slow} Mbit/s", *(f"{_brief(s)} at {rate}" for rate, s in others)])


def duration(seconds: float) -> str:
    """130.4 is "2 min 10 s"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60:02} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02} min"


def counted(n: int, noun: str) -> str:
    """1 is "1 site", 2 is "2 sites"."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def listed(words: Iterable[str]) -> str:
    """a, b and c."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def sentence(text: str) -> str:
    """As it begins a sentence; the rest keeps its case."""
    return text[:1].upper() + text[1:]


def rounds(numbers: Iterable[int]) -> str:
    """Rounds, which are kept from zero, as they are counted from one: [0, 3, 4, 5] is "rounds 1 and 4-6"."""
    ordered = sorted(set(numbers))
    runs = [[n for _, n in run] for _, run in groupby(enumerate(ordered), lambda pair: pair[1] - pair[0])]
    words = [f"{run[0] + 1}-{run[-1] + 1}" if len(run) > 1 else f"{run[0] + 1}" for run in runs]
    return f"{'round' if len(ordered) == 1 else 'rounds'} {listed(words)}"


def one_line(text: str) -> str:
    """A name or a reason that came from a site, without what could steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in text).strip()


def _brief(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else duration(seconds)


def _tenths(fraction: float) -> float:
    return round(100 * fraction, 1) + 0.0  # no minus zero
