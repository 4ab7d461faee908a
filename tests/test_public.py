"""What is public says what it is: names, docstrings, the tree of errors as it is drawn."""

import dataclasses
import importlib
import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import fedloom
from fedloom import errors
from fedloom.adapters import ADAPTERS
from fedloom.methods import METHODS
from fedloom.tasks import TASKS

OF_EXTRAS = {"fedloom.engines.nvflare": "nvflare", "fedloom.deploy.job": "nvflare"}  # what they cannot be without
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(fedloom.__path__, "fedloom.")
    if module.name not in OF_EXTRAS or importlib.util.find_spec(OF_EXTRAS[module.name])
)


def defined(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Public functions and classes of a module, and the public functions of its classes."""
    for name, member in vars(module).items():
        if name.startswith("_") or getattr(member, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(member) or inspect.isclass(member):
            yield name, member


def test_public_names_are_sorted_and_there() -> None:
    names = [name for name in fedloom.__all__ if name != "__version__"]
    assert names == sorted(names, key=lambda name: (not name.isupper(), name[0].islower(), name))  # as ruff has it
    for module in MODULES:  # one of the same name would stand in front of a function
        importlib.import_module(module)
    assert not any(isinstance(getattr(fedloom, name), ModuleType) for name in fedloom.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+", fedloom.__version__)
    modules = {name.removeprefix("fedloom.") for name in MODULES}
    assert not modules & set(fedloom.__all__), "importing a module of that name would put it in the public name's place"
    with pytest.raises(AttributeError, match="nonsense"):
        fedloom.nonsense  # noqa: B018


@pytest.mark.parametrize("name", MODULES)
def test_what_is_public_is_described(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    bare = [member for member, value in defined(module) if not inspect.getdoc(value)]
    assert not [member for member in bare if not _is_method(getattr(module, member))]


def _is_method(cls: Any) -> bool:
    """A method is described by its module, which is read beside its paper."""
    return cls in METHODS.values()


@pytest.mark.parametrize("name", MODULES)
def test_what_a_module_lists_is_there(name: str) -> None:
    module = importlib.import_module(name)
    assert all(hasattr(module, member) for member in getattr(module, "__all__", []))


def test_the_tree_of_errors_is_drawn_as_it_is() -> None:
    drawn, path = {}, []
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"    ([│├└─ ]*)(\w+Error)\b", line):
            depth = len(found[1]) // 4
            path = [*path[:depth], found[2]]
            drawn[found[2]] = path[-2] if depth else "Exception"
    real = {name: cls.__base__.__name__ for name, cls in vars(errors).items() if inspect.isclass(cls)}
    assert drawn == real


@pytest.mark.parametrize("table", [ADAPTERS, METHODS, TASKS], ids=["adapters", "methods", "tasks"])
def test_tables_hold_frozen_values_that_build_by_themselves(table: dict[str, type]) -> None:
    assert list(table) == sorted(table)
    for cls in table.values():
        value: Any = cls()
        assert value == dataclasses.replace(value)
        assert hash(value) == hash(cls())
        for field in dataclasses.fields(value):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(value, field.name, None)
