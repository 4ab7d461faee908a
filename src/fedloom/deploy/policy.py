"""What a site allows, as its own TOML file says; nobody else's word changes it.

name = "oslo"                          # as in its certificate
kit = "oslo/kit"                       # made by `fedloom deploy package`
state = "state"                        # private tensors and the audit log; nothing else is written
device = "cpu"                         # where the backbone computes here, whatever the recipe says

[data]
source = "scans/manifest.jsonl"        # instead of the recipe's

[policy]
methods = ["fedavg", "fedpia"]
tasks = ["vqa"]

[policy.backbones.vilt-small]
sha256 = "3f0c..."                     # fedloom deploy fingerprint vilt-small
"""

import hashlib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fedloom.backbones import locate
from fedloom.engines.remote import Limits
from fedloom.errors import BackboneError, DeployError, PolicyError, RecipeError
from fedloom.methods import Method
from fedloom.recipe import Recipe, parsed
from fedloom.sections import Group
from fedloom.tables import NONE, Table, Where, build
from fedloom.training import Count, Positive


@dataclass(frozen=True)
class Backbone:
    """[policy.backbones.NAME]: one that may be used, by the recipe's name for it."""

    sha256: str  # of its weights and their configuration, as `fingerprint` says
    folder: str | None = None  # where it is here; "none": it comes with fedloom, or NAME is on the hub


@dataclass(frozen=True)
class Policy:
    """[policy]"""

    methods: tuple[str, ...]  # names that `fedloom run` knows; a class of one's own is written package.module:Class
    tasks: tuple[str, ...]  # classification, vqa, multi_label
    backbones: Mapping[str, Backbone]
    rounds: Positive = 100  # at most
    epochs: Count = 20  # at most: of a round, of a head's warm-up, and after the last round
    sites: Positive = 2  # at least so many in the federation, so that a mean is not of one
    sends: tuple[str, ...] = ()  # of its own, where an option of a method sends more than the method as it comes
    metrics: tuple[str, ...] = ("*",)  # which numbers may leave, beside those of examples; * stands for any letters

    def leaving(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Of a site's metrics, those that may leave it."""
        return {name: x for name, x in metrics.items() if any(fnmatchcase(name, allowed) for allowed in self.metrics)}


@dataclass(frozen=True)
class SiteData:
    """[data]"""

    source: str  # as in a recipe
    where: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # only rows with one of these values in a column
    group: str = ""  # which of the recipe's groups this site is of, where it has [groups]


@dataclass(frozen=True)
class SiteConfig:
    """A site's own file."""

    name: str
    kit: str
    data: SiteData
    policy: Policy
    state: str = "state"
    device: str = "cpu"  # where the backbone computes here: cpu, or an accelerator that `fedloom check` finds

    @property
    def folder(self) -> Path:
        return Path(self.state)


def load_site(path: Path) -> SiteConfig:
    """A site's file, its relative paths made absolute; raises RecipeError or DeployError, in one sentence."""
    config = build(SiteConfig, _table(path), Where(str(path)))
    here = path.resolve().parent

    def located(value: str) -> str:
        return str((here / Path(value).expanduser()).resolve())

    source = config.data.source
    if not source.startswith("pack:") and (here / source).exists():
        source = located(source)
    backbones = {
        name: one if one.folder is None else replace(one, folder=located(one.folder))
        for name, one in config.policy.backbones.items()
    }
    return replace(
        config,
        kit=located(config.kit),
        state=located(config.state),
        data=replace(config.data, source=source),
        policy=replace(config.policy, backbones=backbones),
    )


def load_limits(path: Path, deadline: float) -> Limits:
    """A server's own file, which it need not have: the fields of `Limits`. The deadline is the recipe's."""
    return build(Limits, {**(_table(path) if path.is_file() else {}), "deadline": deadline}, Where(str(path)))


def _table(path: Path) -> Table:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise DeployError(f"'{path}' cannot be read: {getattr(e, 'strerror', e)}.") from None
    except tomllib.TOMLDecodeError as e:
        raise DeployError(f"'{path}' is not TOML: {e}.") from None


def allowed(config: SiteConfig, text: str, sites: int) -> tuple[Recipe, Group]:
    """The recipe that arrived as a text, if this site allows it, with its own data and backbone in it.

    Nothing that the text names is imported, opened or loaded before it was found in the policy.

    sites: how many take part
    raises PolicyError: what is asked and what is allowed; RecipeError: it is no recipe of this version
    """
    policy = config.policy
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise RecipeError(f"the recipe that arrived is not TOML: {e}.") from None
    _one_of("method", _at(table, "method", "name"), policy.methods)
    _one_of("backbone", _at(table, "backbone", "name"), policy.backbones)
    if table.get("compare"):
        raise PolicyError("the recipe has a [compare], which is no site's business; leave it out.")
    named = table.get("sites")
    if any(_at(row, "initial") not in (None, NONE) for row in (named.values() if isinstance(named, dict) else ())):
        raise PolicyError("the recipe's [sites] names a file (initial), and no site opens what a recipe names.")
    recipe = parsed(text, "the recipe that arrived")
    group = recipe.parts.get(config.data.group)
    if group is None:
        raise PolicyError(
            f"this site is of the group '{config.data.group}', and the recipe has {list(recipe.parts)}; "
            "set group in its [data]."
        )
    own = ("groups", config.data.group) if config.data.group else ()
    _one_of("task", _at(table, *own, "task", "kind"), policy.tasks)
    _at_most("rounds", recipe.federation.rounds, policy.rounds)
    for key in ("epochs", "warmup_head", "finetune"):
        _at_most(key, getattr(recipe.training, key), policy.epochs)
    for part in sorted(_by_option(recipe.method) - set(policy.sends)):
        raise PolicyError(
            f"an option of the recipe's [method] sends '{part}', a site's own, which '{recipe.method_name}' by itself "
            f"does not, and this site's policy allows {sorted(policy.sends)}; take the option back (share of FedDLP), "
            f'or set sends = ["{part}"] in [policy].'
        )
    if sites < policy.sites:
        raise PolicyError(f"{sites} sites take part; this one joins from {policy.sites} on.")
    backbone = policy.backbones[recipe.backbone.name]
    folder = backbone.folder or recipe.backbone.name
    if (found := fingerprint(folder)) != backbone.sha256:
        raise PolicyError(
            f"the backbone '{recipe.backbone.name}' here has the SHA-256 {found}, and the policy allows "
            f"{backbone.sha256}; put the one that was agreed on in its place."
        )
    recipe = replace(recipe, backbone=replace(recipe.backbone, name=folder, device=config.device))
    where = {**group.data.where, **config.data.where}
    return recipe, replace(group, data=replace(group.data, source=config.data.source, where=where))


def fingerprint(backbone: str) -> str:
    """SHA-256 of a backbone's files, by name in sorted order: weights, configuration, tokenizer.

    raises BackboneError: it is no folder here
    """
    folder = Path(locate(backbone))
    if not folder.is_dir():
        raise BackboneError(f"'{backbone}' is not on this disk; download it, and name its folder.")
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json", ".txt")):
        whole.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()


def data_fingerprint(config: SiteConfig, rows: str) -> str:
    """What changes when a site's data change, and tells nobody else anything: a keyed hash, whose key stays here."""
    key = config.folder / "fingerprint.key"
    if not key.is_file():
        key.parent.mkdir(parents=True, exist_ok=True)
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(32))
    return hashlib.blake2b(rows.encode(), key=key.read_bytes(), digest_size=8).hexdigest()


def _at(table: Any, *keys: str) -> Any:
    for key in keys:
        table = table.get(key) if isinstance(table, Mapping) else None
    return table


def _by_option(method: Method) -> frozenset[str]:
    """What a method sends of a site's own because of its options; what its class always sends, its name allows."""
    always = isinstance(getattr(type(method), "sends", None), frozenset)
    return frozenset() if always else method.sends


def _one_of(what: str, asked: object, allowed: Mapping[str, object] | tuple[str, ...]) -> None:
    if asked not in allowed:
        raise PolicyError(f"the recipe's {what} is {asked!r}, and this site's policy allows {sorted(allowed)}.")


def _at_most(what: str, asked: int, most: int) -> None:
    if asked > most:
        raise PolicyError(f"the recipe asks for {what} = {asked}, and this site's policy allows {most} at most.")
