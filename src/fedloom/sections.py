"""The sections of a recipe: every key, its default, and what it may be.

[method] is not here: its keys are the fields of the method's own dataclass.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias

from annotated_types import Ge, Gt, Le, Lt

from fedloom.data import Columns
from fedloom.tasks import Task
from fedloom.training import Count, Positive, Training
from fedloom.wire import Wire

Part: TypeAlias = Annotated[float, Ge(0), Lt(1)] | Positive  # a fraction, or a number of examples


@dataclass(frozen=True)
class Federation:
    """[federation]"""

    rounds: Positive = 10
    seed: Count = 0
    engine: Literal["local", "nvflare"] = "local"  # every site in this process, or each where its data are
    participation: Annotated[float, Gt(0), Le(1)] = 1.0  # the fraction of the sites that is asked each round
    quorum: Annotated[float, Gt(0), Le(1)] = 1.0  # the fraction of the asked sites that must answer
    group: Positive = 1  # sites that train in one pass; with more, results differ by rounding
    workers: Positive = 1  # processes over sites, where all are on this machine; the results are the same
    evaluate_every: Count = 1  # rounds between evaluations on the held-out examples; 0: never
    keep: Positive = 3  # checkpoints of the server
    track: tuple[Literal["mlflow", "tensorboard", "trackio", "wandb"], ...] = ()  # boards that are told of every round
    deadline: Annotated[float, Gt(0)] = 3600.0  # seconds in which a site has to answer, where sites are elsewhere


@dataclass(frozen=True)
class Natural:
    """By the site column."""

    kind: Literal["natural"] = "natural"
    merge_below: Count = 0  # sites of fewer examples become one, "other"


@dataclass(frozen=True)
class Dirichlet:
    """By label, in proportions drawn from Dir(α): the smaller α, the less alike the sites."""

    kind: Literal["dirichlet"] = "dirichlet"
    sites: Positive = 10
    alpha: Annotated[float, Gt(0)] = 0.1  # α
    minimum: Positive = 1  # examples at each site


@dataclass(frozen=True)
class ByQuantity:
    """By size, in proportions drawn from Dir(α)."""

    kind: Literal["by_quantity"] = "by_quantity"
    sites: Positive = 10
    alpha: Annotated[float, Gt(0)] = 1.0  # α
    minimum: Positive = 1  # examples at each site


@dataclass(frozen=True)
class ByClass:
    """By label, a few classes at each site."""

    kind: Literal["by_class"] = "by_class"
    sites: Positive = 10
    classes_per_site: Positive = 2


@dataclass(frozen=True)
class IID:
    """At random, alike and of one size."""

    kind: Literal["iid"] = "iid"
    sites: Positive = 10


@dataclass(frozen=True)
class Whole:
    """One site: all of it."""

    kind: Literal["whole"] = "whole"


@dataclass(frozen=True)
class Data:
    """[data]"""

    source: str  # pack:NAME, a manifest, an imagefolder, LAYOUT:FOLDER, or a name on the Hugging Face hub
    columns: Columns = field(default_factory=Columns)
    vocabulary: Literal["shared", "site"] = "shared"  # a site's labels: those of all sites, or of its own training data
    label_minimum: Positive = 1  # examples that a label must have to be learnt; a rarer answer counts as wrong
    where: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # only rows with one of these values in a column
    partition: Natural | Dirichlet | ByQuantity | ByClass | IID | Whole = field(default_factory=Natural)
    held_out: Part = 0.15
    test: Part | Literal["column"] = 0.25
    train: Positive | None = None  # at most so many training examples a site
    shots: Positive | None = None  # at most so many training examples a class and site
    on_bad_image: Literal["error", "skip"] = "error"
    newcomer: Count | tuple[str, ...] = 0  # sites that come after the last round: by name, or how many of the last


@dataclass(frozen=True)
class Backbone:
    """[backbone]"""

    name: str  # one that comes with fedloom, a folder, or a name on the Hugging Face hub
    towers: tuple[str, ...] | None = None  # those that take an adapter; "none": the family's own, of a CLIP vision
    # of the frozen weights; fastest: bfloat16 where this machine multiplies it in hardware
    dtype: Literal["auto", "fastest", "float32", "bfloat16"] = "auto"
    attention: Literal["auto", "eager", "sdpa"] = "auto"
    device: str = "cpu"  # where it computes: cpu, or an accelerator that `fedloom check` finds (cuda, cuda:1, mps)
    # an adapter's formula, or the functions of fedloom.fused; short: those, and of the last block what is pooled, alone
    kernels: Literal["auto", "plain", "fused", "short"] = "auto"
    checkpointing: bool = False  # less memory, more time
    cache: bool = False  # keep what the blocks below the first adapter make of each example


@dataclass(frozen=True)
class Group:
    """[groups.NAME]: sites with a source and a task of their own; all groups share the method and its adapter."""

    data: Data
    task: Task


@dataclass(frozen=True)
class Reference:
    """[reference]: what the run is compared with."""

    rows: tuple[Literal["majority", "frozen", "local", "pooled"], ...] = ("frozen", "local")


@dataclass(frozen=True)
class SiteOptions:
    """[sites.NAME]: how one site differs."""

    joins: Count = 0  # the first round that asks it, the first of all being 0; at the latest the last one
    width: Positive | None = None  # of its own adapter: hidden units, or ranks; "none": that of [method.adapter]
    initial: str | None = None  # the adapter that it brings: a safetensors file, or the folder of a PEFT LoRA


SECTIONS: Mapping[str, Any] = {
    "data": Data | None,
    "backbone": Backbone,
    "task": Task | None,
    "groups": Mapping[str, Group],  # instead of [data] and [task], where sites' tasks differ
    "training": Training,
    "federation": Federation,
    "wire": Wire,
    "reference": Reference,
    "sites": Mapping[str, SiteOptions],
    "compare": Mapping[str, Mapping[str, Any]],  # [compare.ROW]: what a row of a comparison changes
}
