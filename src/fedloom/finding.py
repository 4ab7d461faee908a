"""What was asked of a rule that merges, what it answered, and what the answers come to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from fedloom.errors import FedloomError, UpdateError

TOLERANCE = 1e-4  # of what the mean adds: float32 is 1e-7


@dataclass(frozen=True)
class Finding:
    """One thing that was asked of a rule; of several, the first is what the others are parts of."""

    name: str
    error: float | None  # of what the mean adds to the weight; None: the rule did not answer
    best: float  # the least error at the sites' largest rank; 0 where nothing need be lost
    said: str = ""  # why it did not answer

    def within(self, limited: bool) -> bool:
        """Whether the error is no larger than it must be, for a rule of limited rank or for any."""
        return self.error is not None and self.error <= (self.best if limited else 0.0) + TOLERANCE

    @property
    def refused(self) -> bool:
        """Whether the rule said that it cannot."""
        return self.error is None and self.said.startswith("refused: ")

    @property
    def failed(self) -> bool:
        """Whether it neither answered nor refused."""
        return self.error is None and not self.refused


def asked(name: str, error: Callable[[], Tensor], best: float) -> Finding:
    """The finding of this name: the error, or why there is none."""
    try:
        return Finding(name, float(error()), best)
    except UpdateError as e:
        return Finding(name, None, best, f"refused: {e}")
    except FedloomError as e:
        return Finding(name, None, best, str(e))
    except Exception as e:  # code that is not ours can fail in any way
        return Finding(name, None, best, f"{type(e).__name__}: {e}")


def table(found: Sequence[Finding]) -> str:
    """Findings in columns, and what they come to."""
    wide = max(len(finding.name) for finding in found)
    lines = [f"{'':<{wide}}  {'relative error':>14}  attainable"]
    for finding in found:
        error = "none" if finding.error is None else f"{finding.error:.2e}"
        lines.append(f"{finding.name:<{wide}}  {error:>14}  {finding.best:>10.2e}")
    lines += ["", *(f"{finding.name}: {finding.said}" for finding in found if finding.error is None)]
    return "\n".join([*lines, " ".join(_verdict(found))])


def _verdict(found: Sequence[Finding]) -> list[str]:
    answered = [finding for finding in found if finding.error is not None]
    if not answered:
        return ["It answers nothing, and nothing can be said of it."]
    inexact = [finding for finding in answered if not finding.within(False)]
    if wrong := [finding.name for finding in inexact if not finding.within(True)]:
        verdict = f"Not exact in: {', '.join(wrong)}."
    elif inexact:
        must = ", ".join(finding.name for finding in inexact)
        verdict = f"As exact as its rank allows: it loses what any rule of that rank must in {must}."
    else:
        verdict = f"Exact: the {found[0].name} in everything that it answers."
    failed = [finding.name for finding in found if finding.failed]
    return [verdict, *[f"It fails in: {', '.join(failed)}."] * bool(failed)]
