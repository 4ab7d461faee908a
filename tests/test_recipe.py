"""Recipes: what is written loads as it was, what changes no result changes no id, and every mistake is one sentence."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import tomli_w
from annotated_types import Ge
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedloom import data, sections, training
from fedloom.adapters import ADAPTERS, Bottleneck, Everything, Head, LoRA
from fedloom.assembly import assemble, planned
from fedloom.errors import MethodError, RecipeError
from fedloom.methods import METHODS, FedAvg
from fedloom.overrides import dotted, leaves
from fedloom.places import Adapter
from fedloom.recipe import BUILT_IN, ROWS, Recipe, load
from fedloom.tables import Where, build, plain

SMALL = """
[data]
source = "pack:caltech"

[backbone]
name = "clip-small"

[task]
kind = "classification"

[method]
name = "fedavg"
"""


@dataclass(frozen=True)
class Toy:
    """A method with a field of every shape that a table can say."""

    gamma: Annotated[float, Ge(0)] = 1.0
    every: int = 1
    robust: bool = False
    mode: Literal["server", "site"] = "server"
    beta: float | None = 0.5
    layers: tuple[int, ...] = ()
    adapter: Adapter = field(default_factory=lambda: LoRA(rank=3))
    local: LoRA = field(default_factory=lambda: LoRA(rank=16, gated=True))

    @classmethod
    def paper(cls) -> "Toy":
        return cls(gamma=0.1, adapter=Bottleneck(width=48))

    def __post_init__(self) -> None:
        if self.every < 1:
            raise MethodError(f"every is {self.every}; expected 1 or more.")


TOY = f"{__name__}:Toy"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "mine.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def small(write: Callable[[str], Path]) -> Path:
    return write(SMALL)


def refusal(source: Any, overrides: Any = ()) -> str:
    """The sentence; with the file's folder left out."""
    with pytest.raises(RecipeError) as refused:
        load(source, overrides)
    message = str(refused.value)
    assert "\n" not in message
    assert "pydantic" not in message
    return message.replace(f"{Path(source).parent}/", "")


# Round trips


numbers = st.floats(0, 1e6, allow_nan=False)
names = st.text(min_size=1).filter(lambda text: text != "none" and "\r" not in text)
adapters = st.one_of(
    st.builds(LoRA, rank=st.integers(1, 64), alpha=st.floats(1e-3, 1e6), targets=st.tuples(names), gated=st.booleans()),
    st.builds(Bottleneck, width=st.integers(1, 64), std_up=st.none() | numbers),
    st.just(Head()),
    st.just(Everything()),
)
toys = st.builds(
    Toy,
    gamma=numbers,
    every=st.integers(1, 2**40),
    robust=st.booleans(),
    mode=st.sampled_from(["server", "site"]),
    beta=st.none() | numbers,
    layers=st.lists(st.integers(-5, 5)).map(tuple),
    adapter=adapters,
)
partitions = st.one_of(
    st.builds(sections.Natural, merge_below=st.integers(0, 9)),
    st.builds(sections.Dirichlet, alpha=st.floats(1e-3, 10), sites=st.integers(1, 50)),
    st.builds(sections.ByClass, classes_per_site=st.integers(1, 9)),
    st.builds(sections.IID),
    st.builds(sections.Whole),
)
tables = st.fixed_dictionaries(
    {
        "method": toys.map(lambda toy: {"name": TOY, **plain(toy)}),
        "data": st.builds(
            sections.Data,
            source=names.map("pack:{}".format),
            where=st.dictionaries(names, st.lists(names).map(tuple), max_size=2),
            partition=partitions,
            held_out=st.floats(0, 0.9) | st.integers(1, 9),
            test=st.just("column") | st.floats(0, 0.9),
            newcomer=st.integers(0, 3) | st.lists(names, max_size=2).map(tuple),
        ).map(plain),
        "backbone": st.builds(sections.Backbone, name=st.just("clip-small"), cache=st.booleans()).map(plain),
        "task": st.just({"kind": "classification", "template": 'a "photo" of {} \\ é'}),
        "training": st.builds(sections.Training, lr=st.floats(1e-9, 10), clip=st.none() | st.just(1.0)).map(plain),
        "federation": st.builds(sections.Federation, rounds=st.integers(1, 9), seed=st.integers(0, 2**31)).map(plain),
        "sites": st.dictionaries(
            names, st.builds(sections.SiteOptions, joins=st.integers(0, 9)).map(plain), max_size=2
        ),
        "compare": st.dictionaries(names, st.just({"method": {"gamma": 0.5}}), max_size=1),
    }
)


@given(toy=toys)
def test_a_dataclass_is_built_again_from_its_table(toy: Toy) -> None:
    assert build(Toy, plain(toy), Where("mine.toml")) == toy


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(table=tables)
def test_what_is_dumped_loads_as_an_equal_recipe(table: Mapping[str, Any], tmp_path: Path) -> None:
    path, again = tmp_path / "mine.toml", tmp_path / "again.toml"
    path.write_text(tomli_w.dumps(table), encoding="utf-8")
    recipe = load(path)
    again.write_text(recipe.dump(), encoding="utf-8")
    assert load(again) == recipe
    assert load(again).id == recipe.id
    assert load(again).dump() == recipe.dump()
    assert recipe.difference(load(again)) == []


def test_a_dump_holds_every_key(small: Path) -> None:
    recipe = load(small)
    table = recipe.table()
    values = {name: getattr(recipe, name) for name in ("method", *sections.SECTIONS)}
    for name, value in {**values, "adapter": recipe.method.adapter}.items():  # type: ignore[attr-defined]
        if is_dataclass(value):
            dumped = table["method"]["adapter"] if name == "adapter" else table[name]
            assert set(dumped) - {"name", "kind"} == {key.name for key in fields(value) if key.init} - {"name", "kind"}
    assert table.keys() == values.keys()


@pytest.mark.parametrize("name", sorted(path.stem for path in BUILT_IN.glob("*.toml")))
def test_built_in_recipes_load(name: str) -> None:
    recipe = load(name)
    assert isinstance(recipe, Recipe)
    assert not any(Path(part.data.source).is_absolute() for part in recipe.parts.values())


# What a recipe says


def test_defaults_are_those_of_the_values_that_they_become() -> None:
    for section, value in ((sections.Training(), training.Training()), (sections.Columns(), data.Columns())):
        assert {key.name: getattr(section, key.name) for key in fields(section)} == {
            key.name: getattr(value, key.name) for key in fields(value)
        }


def test_a_table_without_kind_alters_the_default(small: Path) -> None:
    recipe = load(small, [f'method.name="{TOY}"', "method.adapter.alpha=2", "method.local.rank=4"])
    assert recipe.method == Toy(adapter=LoRA(rank=3, alpha=2.0), local=LoRA(rank=4, gated=True))


def test_a_table_with_another_kind_starts_afresh(write: Callable[[str], Path]) -> None:
    path = write(SMALL + '[method.adapter]\nkind = "lora"\nrank = 2\n')
    assert load(path, ["method.adapter.kind=bottleneck"]).method == FedAvg(Bottleneck())
    assert load(path, ["method.adapter.kind=lora", "method.adapter.alpha=1"]).method == FedAvg(LoRA(rank=2, alpha=1.0))


def test_another_method_starts_afresh_and_keeps_the_adapter(write: Callable[[str], Path]) -> None:
    path = write(SMALL + 'mu = 0.5\n[method.adapter]\nkind = "bottleneck"\nwidth = 5\n')
    recipe = load(path, ["method.gamma=0.25", f"method.name={TOY}"])
    assert recipe.method == Toy(gamma=0.25, adapter=Bottleneck(width=5))
    assert recipe.method_name == TOY


def test_a_preset_is_the_method_that_its_class_makes(write: Callable[[str], Path]) -> None:
    path = write(SMALL + '[method.adapter]\nkind = "bottleneck"\nwidth = 5\n')
    assert load(path, [f"method.name={TOY}", "method.preset=paper"]).method == Toy.paper()
    assert load(path, [f"method.name={TOY}"]).altered(["method.preset=paper"]).method == Toy.paper()
    altered = load(path, {"method.name": TOY, "method.preset": "paper", "method.adapter.width": 7})
    assert altered.method == Toy(gamma=0.1, adapter=Bottleneck(width=7))


def test_every_adapter_can_be_named(small: Path) -> None:
    for kind, cls in ADAPTERS.items():
        assert type(load(small, [f"method.adapter.kind={kind}"]).method.adapter) is cls  # type: ignore[attr-defined]


def test_none_takes_a_value_away(write: Callable[[str], Path]) -> None:
    path = write(SMALL + "[training]\nclip = 1.0\n")
    assert load(path).training.clip == 1.0
    assert load(path, ["training.clip=none", "data.columns.image=none"]).training.clip is None


def test_an_override_is_toml_or_a_string(small: Path) -> None:
    recipe = load(
        small,
        ["federation.rounds=3", "data.source=pack:x", 'sites."st. mary".joins=2', "data.newcomer=['a', 'b']"],
    )
    assert (recipe.federation.rounds, recipe.data.source, recipe.data.newcomer) == (3, "pack:x", ("a", "b"))
    assert recipe.sites == {"st. mary": sections.SiteOptions(joins=2)}
    assert load(small, ["task.template={}\nkind = 2"]).task.template == "{}\nkind = 2"
    assert load(small, {"federation.rounds": 3}) == load(small, {"federation.rounds": "3"})


def test_altered_is_load_with_overrides(small: Path) -> None:
    overrides = ["training.lr=0.1", "data.partition.kind=iid", "data.partition.sites=4"]
    assert load(small).altered(overrides) == load(small, overrides)


def test_paths_start_at_the_file_and_overrides_at_the_current_folder(
    write: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here := tmp_path / "here").mkdir()
    (tmp_path / "clip-folder").mkdir()
    monkeypatch.chdir(here)
    path = write(SMALL.replace("pack:caltech", "rows.jsonl").replace("clip-small", "clip-folder"))
    recipe = load(path)
    assert recipe.data.source == str(tmp_path / "rows.jsonl")
    assert recipe.backbone.name == str(tmp_path / "clip-folder")
    assert load(path, ["data.source=./rows"]).data.source == str(here / "rows")
    assert load(path, ["data.source=owner/name"]).data.source == "owner/name"


# Identity


@pytest.mark.parametrize(
    ("key", "other"),
    [("backbone.device", "cuda"), ("backbone.kernels", "fused"), ("federation.group", 2), ("method.exchange", "false")],
)
def test_a_key_that_came_later_is_counted_where_it_changes_a_result(small: Path, key: str, other: Any) -> None:
    recipe = load(small).row("feddat")
    assert key in {dotted(names) for names, _ in leaves(recipe.table())}
    assert key not in recipe._counted()
    assert recipe.altered([f"{key}={other}"]).id != recipe.id


@pytest.mark.parametrize("same", ["federation.engine=local", "federation.keep=9", "compare={a={method={mu=0.1}}}"])
def test_what_changes_no_result_changes_no_id(small: Path, same: str) -> None:
    recipe = load(small)
    assert recipe.altered([same]).id == recipe.id
    assert recipe.altered([same]).difference(recipe) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("federation.rounds", "11"),
        ("federation.seed", "1"),
        ("data.source", "pack:other"),
        ("data.held_out", "0.2"),
        ("training.lr", "0.002"),
        ("method.mu", "0.1"),
        ("method.adapter.rank", "4"),
        ("sites.a.joins", "3"),
    ],
)
def test_what_may_change_a_result_changes_the_id(small: Path, key: str, value: str) -> None:
    recipe = load(small)
    other = recipe.altered([f"{key}={value}"])
    assert other.id != recipe.id
    assert key in recipe.difference(other)
    assert set(recipe.difference(other)) == set(other.difference(recipe))


def test_an_id_is_the_same_in_another_process(small: Path) -> None:
    code = f"from fedloom.recipe import load; print(load({str(small)!r}).id)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == load(small).id


def test_an_id_does_not_depend_on_how_it_is_written(small: Path, write: Callable[[str], Path]) -> None:
    before = load(small).id
    assert load(write("[training]\nlr = 1e-3\n" + SMALL + "mu = 0\nheads = 'private'\n")).id == before


# Rows of a comparison


def test_a_row_changes_what_it_names(write: Callable[[str], Path]) -> None:
    recipe = load(write(SMALL + "[compare.prox]\nmethod.mu = 0.1\n[compare.slow.training]\nlr = 1e-4\n"))
    assert recipe.row("prox").method == FedAvg(mu=0.1)
    assert recipe.difference(recipe.row("prox")) == ["method.mu"]
    assert recipe.difference(recipe.row("slow")) == ["training.lr"]
    assert recipe.row("prox").compare == {}
    with pytest.raises(RecipeError, match=r"there is no row 'proxx' in \[compare\] of .*; did you mean 'prox'\?"):
        recipe.row("proxx")


def test_a_row_may_be_built_in_or_a_method(small: Path) -> None:
    recipe = load(small)
    for row, adapter in (("fedavg-lora", LoRA), ("full", Everything), ("linear-probe", Head)):
        assert recipe.row(row).method == FedAvg(adapter())
    for name in ROWS:
        assert recipe.row(name).id == recipe.altered({dotted(names): leaf for names, leaf in leaves(ROWS[name])}).id
    for name, cls in METHODS.items():
        assert type(recipe.row(name).method) is cls


def test_a_row_is_the_same_from_a_dump(write: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = load(write(SMALL + f"[compare.toy]\nmethod.name = '{TOY}'\n"))
    (again := tmp_path / "again.toml").write_text(recipe.dump())
    assert load(again).row("toy") == recipe.row("toy")


# Mistakes


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("method.gama=1", "unknown key 'gama' in [method] of mine.toml; there is adapter, mu, heads."),
        ("method.head=1", "unknown key 'head' in [method] of mine.toml; did you mean 'heads'?"),
        ("method.adapter.rnk=1", "unknown key 'rnk' in [method.adapter] of mine.toml; did you mean 'rank'?"),
        ("trianing.lr=1", "unknown key 'trianing' in mine.toml; did you mean 'training'?"),
        ("data.colums.label=x", "unknown key 'colums' in [data] of mine.toml; did you mean 'columns'?"),
        ("sites.north.jions=3", "unknown key 'jions' in [sites.north] of mine.toml; did you mean 'joins'?"),
        ("method.name=fedavgg", "unknown method 'fedavgg' in [method] of mine.toml; did you mean 'fedavg'?"),
        ("federation.rounds=ten", 'rounds = "ten" in [federation] of mine.toml; expected an integer of 1 or more.'),
        ("federation.rounds=0", "rounds = 0 in [federation] of mine.toml; expected an integer of 1 or more."),
        ("federation.rounds=1.5", "rounds = 1.5 in [federation] of mine.toml; expected an integer of 1 or more."),
        ("federation.rounds=true", "rounds = true in [federation] of mine.toml; expected an integer of 1 or more."),
        (
            "federation.participation=0",
            "participation = 0 in [federation] of mine.toml; expected a number above 0 and of 1 or less.",
        ),
        (
            "federation.engine=nvflair",
            'engine = "nvflair" in [federation] of mine.toml; expected "local" or "nvflare"; did you mean \'nvflare\'?',
        ),
        ("training.lr=nan", "lr = NaN in [training] of mine.toml; expected a number above 0."),
        ("training.lr=inf", "lr = Infinity in [training] of mine.toml; expected a number above 0."),
        ("training.lr=true", "lr = true in [training] of mine.toml; expected a number above 0."),
        ("training.clip=-1", 'clip = -1 in [training] of mine.toml; expected a number above 0 or "none".'),
        (
            "data.test=1.5",
            "test = 1.5 in [data] of mine.toml; expected a number of 0 or more and below 1, "
            'an integer of 1 or more or "column".',
        ),
        ("backbone.cache=1", "cache = 1 in [backbone] of mine.toml; expected true or false."),
        ("backbone.name=3", "name = 3 in [backbone] of mine.toml; expected a string."),
        (
            "reference.rows=frozen",
            'rows = "frozen" in [reference] of mine.toml; expected a list, '
            'each "majority" or "frozen" or "local" or "pooled".',
        ),
        ("federation=3", "federation = 3 in mine.toml; expected a table."),
        ("method=fedavg", 'method = "fedavg" in mine.toml; expected a table.'),
        ("method.adapter=lora", 'adapter = "lora" in [method] of mine.toml; expected a table.'),
        (
            "data.partition.kind=dirichlt",
            "kind = \"dirichlt\" in [data.partition] of mine.toml; did you mean 'dirichlet'?",
        ),
        ("data.partition.alpha=1", "unknown key 'alpha' in [data.partition] of mine.toml; there is kind, merge_below."),
        (
            "method.adapter.kind=loira",
            "kind = \"loira\" in [method.adapter] of mine.toml; did you mean 'lora'?",
        ),
        ("method.mu=-1", "[method] of mine.toml: mu is -1.0; FedProx needs mu >= 0 (0 is FedAvg)."),
        ("compare.a.method.mmu=1", "unknown key 'mmu' in [method] of mine.toml (row 'a'); did you mean 'mu'?"),
        ("federation.rounds", "cannot set 'federation.rounds'; expected key=value, as in federation.rounds=20."),
        ("=3", "cannot set ''; expected a dotted key, as in federation.rounds."),
        ("a b=3", "cannot set 'a b'; expected a dotted key, as in federation.rounds."),
    ],
)
def test_a_mistake_is_one_sentence(small: Path, override: str, sentence: str) -> None:
    assert refusal(small, [override]) == sentence


def test_one_override_sets_one_key(small: Path) -> None:
    assert refusal(small, {"federation.seed = 1\nfederation.rounds": 2}).endswith(
        "expected a dotted key, as in federation.rounds."
    )


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ('source = "pack:caltech"', "'source' is missing in [data] of mine.toml; expected a string."),
        ('[backbone]\nname = "clip-small"', "'name' is missing in [backbone] of mine.toml; expected a string."),
        ('kind = "classification"', "'kind' is missing in [task] of mine.toml; "),
        ('name = "fedavg"', "'name' is missing in [method] of mine.toml; expected a string."),
    ],
)
def test_what_has_no_default_must_be_there(write: Callable[[str], Path], missing: str, sentence: str) -> None:
    assert refusal(write(SMALL.replace(missing, ""))).startswith(sentence)


def test_a_method_of_ones_own_is_found_or_missed_by_name(small: Path) -> None:
    assert refusal(small, ["method.name=no_such.package:Method"]) == (
        "method 'no_such.package:Method' in [method] of mine.toml cannot be imported "
        "(ModuleNotFoundError: No module named 'no_such'); is it installed, or on PYTHONPATH?"
    )
    assert "in [method] of mine.toml (row 'crash') cannot be imported" in refusal(
        small, ["compare.crash.method.name=no_such.package:Method"]
    )
    assert "AttributeError" in refusal(small, [f"method.name={__name__}:Toi"])
    assert "is not a dataclass" in refusal(small, ["method.name=pathlib:Path"])
    assert refusal(small, [f"method.name={TOY}", "method.preset=papre"]) == (
        f"{TOY} in [method] of mine.toml has no preset 'papre'; did you mean 'paper'?"
    )
    assert refusal(small, [f"method.name={TOY}", "method.every=0"]) == (
        "[method] of mine.toml: every is 0; expected 1 or more."
    )
    assert refusal(small, [f"method.name={TOY}", "method.local.kind=bottleneck"]) == (
        'kind = "bottleneck" in [method.local] of mine.toml; there is lora.'
    )


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, write: Callable[[str], Path]) -> None:
    assert refusal("quikstart") == "there is no recipe 'quikstart', as a file or built in; did you mean 'quickstart'?"
    assert refusal("a/zzz.toml").startswith("there is no recipe 'zzz.toml', as a file or built in; there is ")
    assert refusal(tmp_path).endswith("is a folder; expected a TOML file.")
    assert (
        refusal(write("[data\n"))
        == "mine.toml is not TOML: Expected ']' at the end of a table declaration (at line 1, column 6)."
    )
    (latin := tmp_path / "latin.toml").write_bytes("# é".encode("latin-1"))
    assert refusal(latin) == "latin.toml is not a text in UTF-8: byte 2 is 0xe9."


def test_the_numerical_plan_is_spelled_out() -> None:
    plans = {}
    for dtype in ("auto", "float32", "bfloat16"):
        backbone = planned(load("quickstart", {"backbone.dtype": dtype})).backbone
        plans[dtype] = (backbone.dtype, backbone.attention)
    assert plans == {"auto": plans["float32"], "float32": ("float32", "sdpa"), "bfloat16": ("bfloat16", "eager")}
    asked = load("quickstart", {"backbone.attention": "sdpa", "backbone.dtype": "bfloat16"})
    assert planned(asked).backbone.attention == "sdpa"


def test_who_comes_late_comes_in_the_last_round_of_a_row_that_has_one() -> None:
    recipe = load("quickstart", {"sites.site-01.joins": 2, "federation.rounds": 3})
    joins = {row: assemble(planned(recipe.row(row))).schedule.joins for row in ("local", "majority")}
    assert joins == {"local": {"site-01": 2}, "majority": {"site-01": 0}}


def test_one_site_has_to_be_there_from_the_start() -> None:
    late = {f"sites.site-{n:02}.joins": 1 for n in range(1, 11)}
    with pytest.raises(RecipeError, match=r"all sites of .*quickstart.toml come late, none takes part in the first"):
        assemble(planned(load("quickstart", late)))
    del late["sites.site-04.joins"]
    assert assemble(planned(load("quickstart", late))).schedule.asked(0) == ("site-04",)
