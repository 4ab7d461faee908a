"""A recipe becomes a federation: a backbone, sites with their data, a method, a schedule."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import cast
from urllib.parse import quote

import torch

from fedloom import backbones, partition
from fedloom.adapters import Bottleneck, Head, LoRA
from fedloom.backbones import Attention
from fedloom.backbones.adaptable import Adaptable
from fedloom.backbones.devices import device, has_bf16
from fedloom.data import Dataset, Example, Pixels, Table, read
from fedloom.engines.local import LocalEngine, Participant
from fedloom.errors import AdapterError, DataError, RecipeError, StoreError
from fedloom.federation import Schedule, expected_shape
from fedloom.labels import vocabulary
from fedloom.methods import Method
from fedloom.peft_folder import import_peft
from fedloom.places import Adapter
from fedloom.recipe import Recipe
from fedloom.sections import IID, ByClass, ByQuantity, Data, Dirichlet, Group, Natural, SiteOptions, Whole
from fedloom.site import Site
from fedloom.sources import suggestion
from fedloom.store import Store
from fedloom.tasks import Classification, Task
from fedloom.tensors import Tensors, from_bytes

THREADS = 1  # of numerical work: with more, results depend on the machine, and two runs on one machine fight for it
DTYPE = "float32"  # what `auto` stands for
# By dtype, the quicker on a CPU; written by benchmarks/publish_bench.py from what `fedloom bench attention` found.
ATTENTION: Mapping[str, Attention] = json.loads((files("fedloom") / "assets" / "attention.json").read_text())
KERNELS = {"float32": "plain", "bfloat16": "fused"}  # by dtype: in float32 there is hardly anything to gain


@dataclass(frozen=True)
class Federation:
    """A recipe, with all that it names read and checked."""

    recipe: Recipe
    model: Adaptable
    method: Method
    groups: Mapping[str, Task]  # by the name of a group of sites, the task with the labels of all its sites
    participants: Mapping[str, Participant]  # the roster, in the order in which answers are folded
    newcomers: Mapping[str, Participant]  # sites that come after the last round
    schedule: Schedule
    skipped: tuple[str, ...]  # a sentence for each image that cannot be read

    @property
    def task(self) -> Task | None:
        """The task that all sites have; None where theirs differ."""
        tasks = {participant.site.task for participant in self.participants.values()}
        return tasks.pop() if len(tasks) == 1 else None

    def engine(self, method: Method, folder: Path) -> LocalEngine:
        """An engine over the same sites for a method, its private states in a folder of their own."""
        keep = self.recipe.federation.keep + 1
        return LocalEngine(
            method,
            {name: replace(p, store=Store(site_folder(folder, name), keep)) for name, p in self.participants.items()},
            self.recipe.wire,
            self.recipe.federation.group,
            self.recipe.federation.workers,
        )


def planned(recipe: Recipe) -> Recipe:
    """The recipe with its numerical plan: what `auto` stands for here. Same plan, same bits."""
    asked = recipe.backbone
    fastest = "bfloat16" if has_bf16(asked.device) else "float32"
    dtype = {"auto": DTYPE, "fastest": fastest}.get(asked.dtype, asked.dtype)
    # Elsewhere the backward pass of sdpa has other bits each time.
    own = ATTENTION[dtype] if asked.device == "cpu" else "eager"
    attention = own if asked.attention == "auto" else asked.attention
    kernels = KERNELS[dtype] if asked.kernels == "auto" else asked.kernels
    plan = {"dtype": dtype, "attention": attention, "kernels": kernels}
    return recipe.altered({f"backbone.{key}": value for key, value in plan.items()})


def alone(recipe: Recipe, name: str, group: Group) -> Participant:
    """One site of a federation, where its data are: all rows of a group's source are its own, whatever they say.

    It is the site of that name in a simulation whose partition gives it these rows, to the bit.
    """
    own = {name: replace(recipe.sites[name], joins=0)} if name in recipe.sites else {}
    data = replace(group.data, partition=Natural(), newcomer=0)
    federation = replace(recipe.federation, workers=1)
    recipe = replace(recipe, data=data, task=group.task, groups={}, sites=own, federation=federation)
    return assemble(recipe, owner=name).participants[name]


def assemble(recipe: Recipe, tested: bool = True, owner: str | None = None) -> Federation:
    """Read and check everything that a recipe names; its plan is made (`planned`).

    tested: whether sites get their test splits; a choice is made without
    owner: the site that all rows of the sources are given to; None: the one that each row names
    raises BackboneError, DataError, MethodError, RecipeError
    """
    torch.set_num_threads(THREADS)
    tables = {name: read(group.data.source, group.data.columns) for name, group in recipe.parts.items()}
    if owner is not None:
        tables = {name: _owned(table, owner) for name, table in tables.items()}
    named = recipe.backbone  # after the data: what is missing is said before a backbone is fetched
    if named.device != "cpu" and recipe.federation.workers > 1:
        why = f"workers share a backbone on the CPU alone, and [backbone] device is '{named.device}'"
        raise RecipeError(f"{recipe.file}: {why}; set [federation] workers = 1 (group trains several in one pass).")
    attention, where = cast(Attention, named.attention), device(named.device)
    model = backbones.load(named.name, named.towers, getattr(torch, named.dtype), attention, named.checkpointing, where)
    model.use("plain" if named.kernels == "auto" else named.kernels)  # a run of before there was a choice is plain
    participants: dict[str, Participant] = {}
    newcomers: dict[str, Participant] = {}
    skipped: list[str] = []
    tasks: dict[str, Task] = {}
    for name, group in recipe.parts.items():
        examples, pixels = _examples(tables[name], group.data, model, skipped)
        _readable(group, examples, model)
        tasks[name] = _with_labels(group, examples, whole=owner is None)
        every = dict(_participants(name, group, tasks[name], examples, pixels, model, recipe, tested))
        new = _newcomers(every, group.data, recipe)
        participants |= {site: own for site, own in every.items() if site not in new}
        newcomers |= {site: own for site, own in every.items() if site in new}
    schedule = _schedule(participants, newcomers, recipe)
    return Federation(recipe, model, recipe.method, tasks, participants, newcomers, schedule, tuple(skipped))


def _owned(table: Table, owner: str) -> Table:
    return replace(table, examples=tuple(replace(example, site=owner) for example in table.examples))


def site_folder(folder: Path, name: str) -> Path:
    """Where a site keeps its private state in a simulation."""
    return folder / "sites" / quote(name, safe=" ,;()+&")


def _examples(table: Table, data: Data, model: Adaptable, skipped: list[str]) -> tuple[tuple[Example, ...], Pixels]:
    pixels = Pixels(table.root, model.network.decode, data.on_bad_image)
    examples, bad = pixels.usable(_where(table.examples, data))
    skipped.extend(f"skipped image {number} of {len(bad)}: {reason}" for number, reason in enumerate(bad, 1))
    return examples, pixels


def _where(examples: Sequence[Example], data: Data) -> tuple[Example, ...]:
    kept = tuple(examples)
    for column, values in data.where.items():
        have = {value for example in kept if (value := example.columns.get(column)) is not None}
        if absent := set(values) - have:
            raise DataError(
                f"[data.where] {column} asks for {sorted(absent)}, and no row of '{data.source}' has that; "
                f"the column holds {sorted(have)[:12]}."
            )
        kept = tuple(example for example in kept if example.columns.get(column) in values)
    return kept


def _readable(group: Group, examples: Sequence[Example], model: Adaptable) -> None:
    """A question or a report that a backbone would not read is an error, and no task that is silently another."""
    both = any(example.image and example.text for example in examples)
    if both and not model.network.fuses and not isinstance(group.task, Classification):
        raise RecipeError(
            f"the examples of '{group.data.source}' have an image and a {group.task.reads}, and this backbone reads "
            "one of the two; take a ViLT or an ALBEF ([backbone] name = 'vilt-small'), or leave one out "
            "([data.columns] text = 'none')."
        )


def _with_labels(group: Group, examples: Sequence[Example], whole: bool) -> Task:
    """`whole`: these are the examples of all sites, among which each label has one."""
    have = vocabulary((example.label for example in examples), group.data.label_minimum)
    if not group.task.labels:
        return _of(group.task, have, f"'{group.data.source}'", group.data)
    if whole and (empty := [label for label in group.task.labels if label not in have]):
        raise DataError(
            f"the label '{empty[0]}' of [task] labels has no example in '{group.data.source}'"
            f"{suggestion(empty[0], have)}; leave it out, or add examples."
        )
    return group.task


def _of(task: Task, labels: tuple[str, ...], where: str, data: Data) -> Task:
    """The task over these labels."""
    if not labels:
        raise DataError(f"{where} has no label of {data.label_minimum} examples or more; lower [data] label_minimum.")
    try:
        return replace(task, labels=labels)  # type: ignore[type-var]  # every task is a dataclass
    except DataError as e:
        raise DataError(f"{where}: {e}") from None


def _participants(
    name: str,
    group: Group,
    task: Task,
    examples: Sequence[Example],
    pixels: Pixels,
    model: Adaptable,
    recipe: Recipe,
    tested: bool,
) -> Iterator[tuple[str, Participant]]:
    for part, rows in _sites(examples, group.data, recipe.federation.seed).items():
        title = f"{name}: {part}" if name and part else name or part or "all"
        train, held_out, test = _split(title, rows, group.data, recipe.federation.seed, pixels)
        own = task
        if group.data.vocabulary == "site":
            labels = vocabulary((row.label for row in train.examples), group.data.label_minimum)
            own = _of(task, labels, f"site '{title}'", group.data)
        brought = _brought(title, recipe, model)
        site = Site(title, model, own, train, held_out, recipe.training, recipe.federation.seed, brought)
        yield title, _kept(Participant(site, Store(Path()), test if tested else Dataset(()), name), recipe)


def _sites(examples: Sequence[Example], data: Data, seed: int) -> dict[str, tuple[Example, ...]]:
    match data.partition:
        case Natural(merge_below=merge_below):
            return partition.natural(examples, merge_below)
        case Dirichlet(sites=sites, alpha=alpha, minimum=minimum):
            return partition.dirichlet(examples, sites, alpha, seed, minimum)
        case ByQuantity(sites=sites, alpha=alpha, minimum=minimum):
            return partition.by_quantity(examples, sites, alpha, seed, minimum)
        case ByClass(sites=sites, classes_per_site=classes):
            return partition.by_class(examples, sites, classes, seed)
        case IID(sites=sites):
            return partition.iid(examples, sites, seed)
        case Whole():
            return {"": tuple(examples)}


def _split(name: str, rows: Sequence[Example], data: Data, seed: int, pixels: Pixels) -> tuple[Dataset, ...]:
    try:
        parts = partition.split(
            rows, seed=seed, held_out=data.held_out, test=data.test, train=data.train, per_class=data.shots
        )
    except DataError as e:
        raise DataError(f"site '{name}': {e}") from None
    shown = pixels if any(example.image for example in rows) else None
    return tuple(Dataset(part, shown) for part in (parts.train, parts.held_out, parts.test))


def _brought(name: str, recipe: Recipe, model: Adaptable) -> Tensors:
    """The adapter that a site starts from, where it is one of its own."""
    own, adapter = recipe.sites.get(name, SiteOptions()), recipe.method.adapter
    has_none = isinstance(adapter, Head)  # a head alone has no width but its labels
    if has_none or (own.width is None and own.initial is None):
        return {}
    if not isinstance(adapter, Bottleneck | LoRA):
        raise RecipeError(
            f"site '{name}' of {recipe.file} has a width or an adapter of its own, and [method.adapter] has no hidden "
            "units; take kind = 'bottleneck' or 'lora'."
        )
    if own.initial is None:
        widened = {"width" if isinstance(adapter, Bottleneck) else "rank": own.width}
        return model.init(replace(adapter, **widened), recipe.federation.seed, name)  # type: ignore[arg-type]
    path, expected = Path(own.initial), model.init(adapter, recipe.federation.seed)
    if not path.exists():
        raise RecipeError(f"there is no file or folder '{path}', which [sites] {name} initial of {recipe.file} names.")
    if path.is_dir() and not isinstance(adapter, LoRA):
        raise RecipeError(
            f"'{path}', which [sites] {name} initial of {recipe.file} names, is a folder, and PEFT's LoRA is all that "
            "can be brought in as one; [method.adapter] here is of another kind."
        )
    try:
        if path.is_dir() and isinstance(adapter, LoRA):
            brought = import_peft(path, model, adapter, recipe.backbone.name)
        else:
            brought = from_bytes(path.read_bytes())
    except (OSError, StoreError, AdapterError) as e:
        raise RecipeError(f"'{path}', which [sites] {name} initial of {recipe.file} names, is no adapter: {e}") from e
    if differ := sorted(brought.keys() ^ expected.keys()):
        raise RecipeError(
            f"'{path}' and the adapter of {recipe.file} have unlike tensors: '{differ[0]}' is in one only."
        )
    widths: dict[str, int] = {}
    for leaf, tensor in brought.items():
        shape = expected_shape(leaf, tensor, expected[leaf], adapter.symmetry, widths)
        if tensor.shape != shape or own.width not in (None, widths.get(leaf.partition("/")[0])):
            raise RecipeError(
                f"'{path}' holds '{leaf}' as {tuple(tensor.shape)}, expected {tuple(shape)}: it is of another "
                f"backbone, or of another width than [sites] {name} says."
            )
    return {leaf: tensor.float() for leaf, tensor in brought.items()}


def _kept(own: Participant, recipe: Recipe) -> Participant:
    if not recipe.backbone.cache:
        return own
    adapter: Adapter = recipe.method.adapter
    return replace(own, site=own.site.cached(adapter), test=own.site.kept(own.test, adapter))


def _newcomers(every: Mapping[str, Participant], data: Data, recipe: Recipe) -> set[str]:
    names, asked = list(every), data.newcomer
    new = names[len(names) - asked :] if isinstance(asked, int) else asked
    _known(new, names, recipe)
    return set(new)


def _schedule(
    participants: Mapping[str, Participant], newcomers: Mapping[str, Participant], recipe: Recipe
) -> Schedule:
    if not participants:
        raise RecipeError(f"{recipe.file} makes newcomers of all {len(newcomers)} sites; leave one to take part.")
    _known(recipe.sites, [*participants, *newcomers], recipe)
    options = recipe.federation
    # A row of one round, as that of the frozen model, is of all sites: who comes late comes in the last round.
    joins = {name: min(own.joins, options.rounds - 1) for name, own in recipe.sites.items() if own.joins}
    if min((joins.get(name, 0) for name in participants), default=0):
        raise RecipeError(
            f"all sites of {recipe.file} come late, none takes part in the first round; let one join at 0."
        )
    return Schedule(tuple(participants), options.rounds, options.seed, options.participation, options.quorum, joins)


def _known(names: Sequence[str] | Mapping[str, object], sites: Sequence[str], recipe: Recipe) -> None:
    for name in names:
        if name not in sites:
            raise RecipeError(f"there is no site '{name}' (named in {recipe.file}); the sites are {list(sites)}.")
