"""Should my site join? What one short round says of it, on held-out examples alone.

Every site trains for one round, once by itself and once with the others, as the recipe would have it serve in the end;
the difference on a site's held-out examples is what it may expect to gain. No test example is read.

It is a forecast, and told as one. The interval is over the held-out examples, so it knows nothing of what more rounds
bring. How well forecasts rank the gains at the end of a run is what `benchmarks/advise.py` measures: over published
settings they do not (docs/results/advise.md), for a method that begins slowly may gain in the end.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from fedloom.assembly import Federation, assemble, planned
from fedloom.errors import RecipeError
from fedloom.events import Watch
from fedloom.methods import Local, Method
from fedloom.recipe import Recipe
from fedloom.rounds import train
from fedloom.tested import Answered, tested

ALONE = ("frozen", "local", "majority")  # methods that send nothing
SHORT = {"federation.rounds": 1, "federation.participation": 1.0, "federation.evaluate_every": 0, "reference.rows": ()}


@dataclass(frozen=True)
class Advice:
    """What one site may expect, as fractions of its task's metric."""

    site: str
    metric: str
    examples: int  # that were held out, and measured
    alone: float
    together: float
    low: float | None  # the 95 % interval of the gain
    high: float | None

    @property
    def gain(self) -> float:
        return self.together - self.alone

    @property
    def verdict(self) -> str:
        """join, stay or unclear: whether the interval is above zero, below it, or holds it."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "unclear"
        return "join" if self.low > 0 else "stay"


def advise(recipe: Recipe, watch: Watch = lambda event: None, site: str | None = None) -> list[Advice]:
    """What every site may expect of federating, or one of them, before it does; nothing is left on disk.

    raises RecipeError: the method sends nothing, no site has held-out examples, or there is no such site
    """
    if recipe.method_name in ALONE:
        raise RecipeError(
            f"'{recipe.method_name}' in [method] of {recipe.file} sends nothing; name one that federates: fedavg."
        )
    federation = assemble(planned(recipe.altered(SHORT)), tested=False)
    known = [name for name, own in federation.participants.items() if len(own.site.held_out)]
    if not known:
        raise RecipeError(f"no site of {recipe.file} has held-out examples to go by; raise [data] held_out.")
    if site is not None and site not in known:
        raise RecipeError(f"there is no site '{site}' with held-out examples in {recipe.file}; its sites are {known}.")
    together = dict(_held_out("together", federation.method, federation, watch))
    alone = dict(_held_out("alone", Local(federation.method.adapter), federation, watch))
    found = [_advice(name, alone[name], said) for name, said in together.items() if said.row() and alone[name].row()]
    return [one for one in found if site in (None, one.site)]


def _held_out(stage: str, method: Method, federation: Federation, watch: Watch) -> Iterator[tuple[str, Answered]]:
    """What each site serves on its held-out examples after the round."""
    with TemporaryDirectory() as scratch:
        shared, privates = train(stage, method, federation, Path(scratch), watch)
    for name, own in federation.participants.items():
        if (said := tested(method, own, shared, privates[name], own.site.held_out)) is not None:
            yield name, said


def _advice(site: str, alone: Answered, together: Answered) -> Advice:
    metric, gain = together.task.metric, together.gain(alone)
    before, after = (one.row()["value"] for one in (alone, together))
    return Advice(site, metric, len(together.dataset), before, after, gain["low"], gain["high"])
