"""Recipes: what to run, as a TOML file.

recipe = load("quickstart", ["federation.rounds=20", "method.mu=0.1"])
recipe.method                  # FedAvg(adapter=LoRA(rank=8, ...), mu=0.1, ...), built and checked
recipe.row("linear-probe")     # the same recipe with another method, for a comparison
recipe.dump()                  # TOML again, every default written out
"""

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from fedloom.errors import RecipeError
from fedloom.layouts import LAYOUTS
from fedloom.overrides import Overrides, changes, differs, dotted, leaves, merged
from fedloom.rows import ROWS
from fedloom.sections import SECTIONS, Backbone, Data, Federation, Group, Reference, SiteOptions
from fedloom.tables import NONE, Table, Where, build, convert, guess, plain
from fedloom.tasks import Task
from fedloom.training import Training
from fedloom.wire import Wire

if TYPE_CHECKING:
    from fedloom.methods import Method

BUILT_IN = Path(__file__).resolve().parent / "assets" / "recipes"
TUNE = "tune"  # of [compare]: no row, but the values that `--tune` tries for each
# They change no result.
UNCOUNTED = {("federation", key) for key in ("engine", "keep", "track", "deadline", "workers")} | {("compare",)}
# Keys that came later, and the values by which results are what they were before.
LATER: Mapping[tuple[str, ...], tuple[Any, ...]] = {
    ("backbone", "device"): ("cpu",),
    ("backbone", "kernels"): ("auto", "plain"),
    ("federation", "group"): (1,),
    ("method", "exchange"): (True,),
}
PATHS = {
    ("data", "source"),
    ("groups", "source"),
    ("backbone", "name"),
    ("sites", "initial"),
}  # first and last part of a key


@dataclass(frozen=True)
class Recipe:
    """A recipe, checked. Two are equal where their values are, whatever files they were read from."""

    method_name: str
    method: "Method"
    data: Data | None
    backbone: Backbone
    task: Task | None
    groups: Mapping[str, Group]
    training: Training
    federation: Federation
    wire: Wire
    reference: Reference
    sites: Mapping[str, SiteOptions]
    compare: Mapping[str, Table]
    file: str = field(compare=False)  # for messages

    @property
    def parts(self) -> Mapping[str, Group]:
        """The groups of sites; one without a name where all have one task."""
        return {"": Group(self.data, self.task)} if self.data and self.task else self.groups

    def table(self) -> dict[str, Any]:
        """All that TOML can say of it, every default written out."""
        method = {"name": self.method_name, **plain(self.method)}
        sections = {name: getattr(self, name) for name in SECTIONS}
        return {"method": method, **{name: plain(section) for name, section in sections.items() if section is not None}}

    def dump(self) -> str:
        """TOML that loads as an equal recipe."""
        return tomli_w.dumps(self.table())

    @property
    def id(self) -> str:
        """SHA-256 of all that can change a result: the same where `difference` finds nothing, and only there."""
        return hashlib.sha256("\n".join(sorted(map(" = ".join, self._counted().items()))).encode()).hexdigest()

    def difference(self, other: "Recipe") -> list[str]:
        """The dotted keys that can change a result and differ."""
        own, others = self._counted(), other._counted()
        return [key for key in {**own, **others} if own.get(key) != others.get(key)]

    def altered(self, overrides: Overrides) -> "Recipe":
        """The same recipe with other values, which are given as to `load`."""
        return _recipe(_altered(self.table(), _here(overrides), self.file), self.file)

    @property
    def rows(self) -> Mapping[str, Table]:
        """What each row of a comparison changes: [compare.NAME], else one of ROWS, else the method of that name."""
        from fedloom.methods import METHODS

        # A task with but one kind of head, or without any, keeps what it has.
        built_in = {
            row: {key: value for key, value in change.items() if key != "task" or hasattr(self.task, "head")}
            for row, change in ROWS.items()
        }
        own = {row: change for row, change in self.compare.items() if row != TUNE}
        return {**{method: {"method": {"name": method}} for method in METHODS}, **built_in, **own}

    def row(self, name: str) -> "Recipe":
        """The recipe of one row of a comparison."""
        if name not in self.rows:
            raise RecipeError(f"there is no row '{name}' in [compare] of {self.file}{guess(name, self.rows)}")
        change = {key: value for key, value in self.rows[name].items() if key != "task" or self.task}
        file = f"{self.file} (row '{name}')"
        return _recipe({**_altered(self.table(), change, file), "compare": {}}, file)

    def _counted(self) -> dict[str, str]:
        # A wire that does nothing is not counted, so that what was run before there were wires keeps its id.
        uncounted = UNCOUNTED if self.wire != Wire() else UNCOUNTED | {("wire",)}
        counted = {
            dotted(names): leaf
            for names, leaf in leaves(self.table())
            if not uncounted & {names[:1], names[:2]} and leaf not in LATER.get(names[:2], ())
        }
        return {key: json.dumps(leaf, ensure_ascii=False, default=str) for key, leaf in counted.items()}


def load(source: str | Path, overrides: Overrides = ()) -> Recipe:
    """The recipe in a TOML file, or the built-in one of that name.

    overrides: `key=value` texts, or a mapping; a value is TOML or, where it is not, a string. A table that gets another
        `kind`, and a [method] that gets another `name` or `preset`, starts afresh, for the keys that stood there were
        another's. An adapter is kept for a method that takes one.
    Relative paths start at the recipe's folder, those in `overrides` at the current one.

    Raises RecipeError, one sentence that names file, section and key.
    """
    path, file = _found(source)
    return _recipe(_altered(_located(_read(path, file), path.parent), _here(overrides), file), file)


def parsed(text: str, file: str) -> Recipe:
    """The recipe in a text, as `dump` writes it; `file` is what messages call it. Raises RecipeError."""
    return _recipe(_table(text, file), file)


def _found(source: str | Path) -> tuple[Path, str]:
    built_in = {path.stem: path for path in sorted(BUILT_IN.glob("*.toml"))}
    if str(source) in built_in:
        return built_in[str(source)], f"{source}.toml"
    path = Path(source).expanduser()
    if path.is_dir():
        raise RecipeError(f"'{source}' is a folder; expected a TOML file.")
    if not path.exists():
        raise RecipeError(f"there is no recipe '{source}', as a file or built in{guess(path.stem, built_in)}")
    return path, str(source)


def _read(path: Path, file: str) -> Table:
    try:
        return _table(path.read_text("utf-8"), file)
    except OSError as error:
        raise RecipeError(f"{file} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{file} is not a text in UTF-8: byte {error.start} is {error.object[error.start]:#x}."
        ) from None


def _table(text: str, file: str) -> Table:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{file} is not TOML: {error}.") from None


def _recipe(table: Table, file: str) -> Recipe:
    where = Where(file)
    for key in table:
        if key != "method" and key not in SECTIONS:
            raise RecipeError(f"unknown key '{key}' in {where}{guess(key, ['method', *SECTIONS])}")
    sections = {name: convert(hint, table.get(name, _absent(name)), name, where) for name, hint in SECTIONS.items()}
    if bool(table.get("groups")) == ("data" in table or "task" in table):
        raise RecipeError(f"{where} needs [data] and [task], or [groups.NAME] with a data and a task each.")
    if ("data" in table) != ("task" in table):
        raise RecipeError(f"{where} has no [{'task' if 'data' in table else 'data'}].")
    asked = convert(Mapping[str, Any], table.get("method", {}), "method", where)
    name, method = method_of(asked, where.inside("method"))
    recipe = Recipe(name, method, **sections, file=file)
    for row in recipe.compare:
        if row != TUNE:
            recipe.row(row)
    return recipe


def _absent(section: str) -> Any:
    return NONE if section in ("data", "task") else {}


@dataclass(frozen=True)
class _Choice:
    name: str
    preset: str | None = None


def method_of(table: Table, where: Where) -> tuple[str, Any]:
    """The name of a method and the method, of the keys of [method]. Raises RecipeError."""
    choice = build(_Choice, {key: table[key] for key in ("name", "preset") if key in table}, where)
    cls = _class(choice.name, where)
    presets = {name: getattr(cls, name) for name, member in vars(cls).items() if isinstance(member, classmethod)}
    if choice.preset is not None and choice.preset not in presets:
        raise RecipeError(f"{choice.name} in {where} has no preset '{choice.preset}'{guess(choice.preset, presets)}")
    base = None if choice.preset is None else presets[choice.preset]()
    return choice.name, build(cls, {key: table[key] for key in table if key not in ("name", "preset")}, where, base)


def plugins() -> Mapping[str, EntryPoint]:
    """The methods that installed packages bring, by name: entry points of the group fedloom.methods."""
    return {plugin.name: plugin for plugin in entry_points(group="fedloom.methods")}


def _class(name: str, where: Where) -> type:
    """The method of a name: a key of METHODS, an entry point of the group fedloom.methods, or package.module:Class."""
    from fedloom.methods import METHODS

    others = plugins()
    module, _, attribute = name.partition(":")
    if name not in METHODS and name not in others and not attribute:
        raise RecipeError(f"unknown method '{name}' in {where}{guess(name, [*METHODS, *others])}")
    try:
        cls: Any = METHODS.get(name) or (
            others[name].load() if name in others else getattr(import_module(module), attribute)
        )
    except Exception as error:  # importing code that is not ours can fail in any way
        raise RecipeError(
            f"method '{name}' in {where} cannot be imported ({type(error).__name__}: {error}); "
            "is it installed, or on PYTHONPATH?"
        ) from error
    if not (isinstance(cls, type) and is_dataclass(cls)):
        raise RecipeError(
            f"method '{name}' in {where} is not a dataclass; expected a class as fedloom.methods describes."
        )
    return cls


def _here(overrides: Overrides) -> Table:
    return _located(changes(overrides), Path.cwd())


def _altered(table: Table, change: Table, file: str) -> Table:
    """`change` over `table`; a method of another name or preset starts afresh, but for the adapter, if it takes one."""
    old, new = table.get("method"), change.get("method")
    if isinstance(old, Mapping) and isinstance(new, Mapping) and differs(old, new, "name", "preset"):
        kept = {"name"}
        if "preset" not in new and "adapter" in {
            key.name for key in fields(_class(str(new["name"]), Where(file, "method")))
        }:
            kept.add("adapter")
        table = {**table, "method": {key: old[key] for key in old if key in kept}}
    return merged(table, change)


def _located(table: Table, folder: Path, names: tuple[str, ...] = ()) -> dict[str, Any]:
    """The table with its relative paths made absolute; what is no path, is a name on the hub."""

    def located(value: Any, *names: str) -> Any:
        if isinstance(value, Mapping):
            return _located(value, folder, names)
        row = names[2:] if names[0] == "compare" else names
        if not (isinstance(value, str) and row and (row[0], row[-1]) in PATHS) or value.startswith("pack:"):
            return value
        layout, _, unpacked = value.partition(":")
        if layout in LAYOUTS and unpacked:
            return f"{layout}:{(folder / Path(unpacked).expanduser()).resolve()}"
        path = (folder / Path(value).expanduser()).resolve()
        is_path = value.startswith((".", "/", "~")) or value.endswith((".jsonl", ".csv")) or path.exists()
        return str(path) if is_path else value

    return {key: located(value, *names, key) for key, value in table.items()}
