"""Every built-in recipe and every setting of the suite: it loads, its rows do, and it becomes sites as it says."""

import hashlib
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.assembly import Federation, assemble, planned
from fedloom.data import Pixels
from fedloom.errors import RecipeError
from fedloom.overrides import dotted, leaves
from fedloom.recipe import BUILT_IN, Recipe, load
from fedloom.suites import settings

ROOT = Path(__file__).parents[1]
BACKBONES = ROOT / "src" / "fedloom" / "assets" / "backbones"
SUITE = tomllib.loads((ROOT / "benchmarks" / "suite.toml").read_text("utf-8"))
SETTINGS: dict[str, dict[str, Any]] = SUITE["settings"]
RECIPES = sorted({setting["recipe"] for setting in SETTINGS.values()})
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "plane", "is", "this", "?")
SHAPE = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 40}


def tiny_vilt() -> Any:
    from transformers import ViltConfig, ViltModel

    sizes = {"num_hidden_layers": 6, "image_size": 16, "patch_size": 8, "max_position_embeddings": 24}
    return ViltModel(ViltConfig(**SHAPE, **sizes, vocab_size=len(WORDS)))


def tiny_text() -> Any:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**SHAPE, num_hidden_layers=4, vocab_size=len(WORDS), max_position_embeddings=32))


def tiny_albef() -> Any:
    from fedloom.backbones.albef_model import AlbefConfig, AlbefModel

    vision = {**SHAPE, "num_hidden_layers": 3, "image_size": 16, "patch_size": 8}
    text = {**SHAPE, "num_hidden_layers": 4, "vocab_size": len(WORDS), "max_position_embeddings": 24}
    return AlbefModel(AlbefConfig(vision_config=vision, text_config=text, fusion_layers=2, projection_dim=8))


@pytest.fixture(scope="module")
def tiny(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny("vilt-small")`: a folder with a random model of that family."""
    from transformers import BertTokenizer, ViTImageProcessorPil

    made = {"clip-small": backbone}

    def make(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                module = {"vilt-small": tiny_vilt, "text-small": tiny_text, "albef-small": tiny_albef}[name]()
            module.save_pretrained(folder)
            BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, model_max_length=24).save_pretrained(folder)
            ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
            made[name] = folder
        return made[name]

    return make


@pytest.fixture
def assembled(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Callable[[Recipe], Federation]:
    """A recipe's federation without a pass through its images; each of them is decoded by the tests of the packs."""
    monkeypatch.setattr(Pixels, "usable", lambda self, examples: (tuple(examples), ()))

    def make(recipe: Recipe) -> Federation:
        changes: dict[str, Any] = {"backbone.cache": False}
        if not (BACKBONES / recipe.backbone.name).is_dir():
            changes["backbone.name"] = str(tiny(recipe.backbone.name))
        return assemble(planned(recipe.altered(changes)))

    return make


def setting(name: str) -> Recipe:
    return load(SETTINGS[name]["recipe"], SETTINGS[name].get("set", {}))


def test_the_suite_asks_for_every_recipe_that_runs_here():
    on_packs = {
        path.stem
        for path in BUILT_IN.glob("*.toml")
        if all(part.data.source.startswith("pack:") for part in load(path.stem).parts.values())
    }
    assert on_packs == {*RECIPES, "quickstart"}


def test_seeds_for_choices_are_none_of_those_for_figures():
    first, last = SUITE["seeds"]["development"]
    begin, end = SUITE["seeds"]["confirmatory"]
    assert not set(range(first, last + 1)) & set(range(begin, end + 1))


REFUSED = {("vqamed-organ-baselines", "promptfl")}  # listed with its reason: questions have no class names


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_is_whole(name: str):
    assert SETTINGS[name].keys() - {"set", "tune"} == {"asks", "recipe", "rows", "views"}
    assert {"majority", "frozen", "linear-probe", "local"} <= set(SETTINGS[name]["rows"])
    recipe = setting(name)
    newcomers = any(part.data.newcomer for part in recipe.parts.values())
    assert SETTINGS[name]["views"] == ["personal", "global", *(["newcomer"] if newcomers else [])]
    for row in SETTINGS[name]["rows"]:
        if (name, row) in REFUSED:
            with pytest.raises(RecipeError, match=f"row '{row}'"):
                recipe.row(row)
        else:
            assert recipe.row(row).parts.keys() == recipe.parts.keys()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_changes_what_it_says_and_nothing_else(name: str):
    said = {dotted(names) for names, _ in leaves(SETTINGS[name].get("set", {})) if names[0] != "compare"}
    changed = set(load(SETTINGS[name]["recipe"]).difference(setting(name)))
    afresh = {key.removesuffix("kind") for key in said if key.endswith(".kind")}  # there every key is said anew
    assert {key for key in said if not key.startswith(tuple(afresh))} <= changed
    assert all(any(key.startswith(f"{table.rpartition('.')[0]}.") for table in said) for key in changed - said)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_becomes_the_sites_that_it_speaks_of(name: str, assembled: Callable[[Recipe], Federation]):
    recipe = setting(name)
    federation = assembled(recipe)
    sites = {**federation.participants, **federation.newcomers}
    assert bool(federation.newcomers) == ("newcomer" in SETTINGS[name]["views"])
    for title, own in sites.items():
        data = recipe.parts[own.group].data
        images = [
            {e.image or e.text for e in split.examples} for split in (own.site.train, own.site.held_out, own.test)
        ]
        assert all(images), title
        assert not images[0] & images[1] | images[0] & images[2] | images[1] & images[2]
        if isinstance(data.test, int):
            assert len(images[2]) == data.test >= 60
        if data.train is not None:
            assert len(images[0]) == data.train, title


def test_eight_organs_three_of_them_together(assembled: Callable[[Recipe], Federation]):
    for recipe in ("vqamed-organ", "vqamed-organ-albef"):
        federation = assembled(load(recipe))
        sites = {**federation.participants, **federation.newcomers}
        assert len(sites) == 8
        parts = (sites["other"].site.train, sites["other"].site.held_out, sites["other"].test)
        merged = {example.site for part in parts for example in part.examples}
        assert merged == {"breast", "heart and great vessels", "vascular and lymphatic"}


def test_no_image_of_the_mixed_tasks_is_at_two_sites(assembled: Callable[[Recipe], Federation]):
    seen: set[str | None] = set()
    for own in assembled(load("vqamed-mixed")).participants.values():
        images = {e.image for part in (own.site.train, own.site.held_out, own.test) for e in part.examples}
        assert not seen & images
        seen |= images


def test_no_image_of_the_question_kinds_is_trained_on_and_tested(assembled: Callable[[Recipe], Federation]):
    sites = assembled(load("vqamed-category")).participants.values()
    trained = {example.image for own in sites for example in own.site.train.examples}
    assert not trained & {example.image for own in sites for example in own.test.examples}


def test_the_suite_command_runs_a_setting_and_goes_on(fedloom: Any, recipe: Path, tmp_path: Path) -> None:
    suite = tmp_path / "suite.toml"
    suite.write_text(
        f'[settings.squares]\nasks = "Is red red?"\nrecipe = "{recipe}"\nrows = ["frozen", "local"]\n'
        "set = { federation.rounds = 1 }\n"
    )
    call = ("suite", "--file", suite, "--out", tmp_path / "out", "--seeds", "0-1")
    (protocol := tmp_path / "protocol.toml").write_text("[grid]\nlr = [0.1]\n")
    code, out, err = fedloom(*call, "--rows", "local", "--protocol", protocol)
    assert (code, err.count("Traceback")) == (0, 0), err
    saved = json.loads((tmp_path / "out" / "squares" / "comparison.json").read_text())
    assert saved["protocols"] == [hashlib.sha256(protocol.read_bytes()).hexdigest()]
    assert "squares: Is red red?" in out
    cells = sorted((tmp_path / "out" / "squares" / "cells").iterdir())
    assert len(cells) == 2
    times = [(cell / "summary.json").stat().st_mtime_ns for cell in cells]
    code, out, _ = fedloom(*call, "--flops", "--target", "local")
    saved = json.loads((tmp_path / "out" / "squares" / "comparison.json").read_text())
    assert saved["target"] == "local"
    assert all(own["costs"]["flops"] > 0 for own in saved["rows"].values())
    assert "local - frozen" in out or "frozen - local" in out
    assert [(cell / "summary.json").stat().st_mtime_ns for cell in cells] == times  # not run again


def test_the_suite_takes_other_weights(backbone: Path) -> None:
    others = {"vilt-small": str(backbone)}
    (one,) = settings(ROOT / "benchmarks" / "suite.toml", ["vqamed-merge"], others, ["training.lr=0.5"])
    assert one.recipe.training.lr == 0.5
    assert one.recipe.backbone.name == str(backbone)
    assert one.recipe.training.epochs == 10
    for others in (
        {"vilt": str(backbone)},
        {"vilt": "x", "vilt-small": str(backbone)},
    ):  # a family's, if nothing nearer
        (one,) = settings(ROOT / "benchmarks" / "suite.toml", ["vqamed-merge"], others)
        assert one.recipe.backbone.name == str(backbone)
    before = settings(ROOT / "benchmarks" / "suite.toml")
    after = settings(ROOT / "benchmarks" / "suite.toml", (), {"vilt": str(backbone)})
    assert [one.name for one in after] == [one.name for one in before if one.recipe.backbone.name == "vilt-small"]


def test_a_setting_of_tuned_rows_is_tuned_unasked(fedloom: Any, recipe: Path, tmp_path: Path) -> None:
    suite = tmp_path / "suite.toml"
    suite.write_text(
        f'[settings.squares]\nasks = "Tuned, is red red?"\nrecipe = "{recipe}"\nrows = ["local"]\ntune = true\n'
        "set = { federation.rounds = 1, compare.tune.training.lr = [1e-4, 1e-1] }\n"
    )
    code, _, err = fedloom("suite", "--file", suite, "--out", tmp_path / "out", "--seeds", "0-0")
    assert code == 0, err
    saved = json.loads((tmp_path / "out" / "squares" / "comparison.json").read_text())
    assert saved["tuning"]["rows"]["local"]["points"] == 2


def test_the_whole_suite_in_bfloat16_still_compares_it_with_float32() -> None:
    (one,) = settings(ROOT / "benchmarks" / "suite.toml", ["caltech-bf16"], {}, ["backbone.dtype=bfloat16"])
    dtypes = [one.recipe.row(row).backbone.dtype for row in ("fedavg", "fedavg-bf16")]
    assert dtypes == ["float32", "bfloat16"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[settings.one]\nrecipe = 'quickstart'\nrows = ['local']", "'asks' is missing in [settings.one] of "),
        ("[settings.one]\nasks = 'x'\nrecipe = 'quickstart'\nrows = 'local'", "expected a list, each a string"),
        ("[settings]\none = 1", 'settings = {"one": 1} in '),
        ("[setting.one]", "is no suite: 'settings'"),
    ],
)
def test_a_damaged_suite_is_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "suite.toml").write_text(text)
    with pytest.raises(RecipeError, match=re.escape(message)):
        settings(tmp_path / "suite.toml")


def test_a_suite_is_read_whole_before_its_first_cell(fedloom: Any, recipe: Path, tmp_path: Path) -> None:
    suite, out = tmp_path / "suite.toml", tmp_path / "out"
    one = f'asks = "?"\nrecipe = "{recipe}"\n'
    suite.write_text(f'[settings.a]\n{one}rows = ["frozen"]\n[settings.b]\n{one}rows = ["locl"]\n')
    code, _, err = fedloom("suite", "--file", suite, "--out", out, "--seeds", "0,1")
    assert (code, out.exists()) == (2, False)
    assert "b has no row 'locl'; did you mean 'local'?" in err
    suite.write_text(f'[settings.a]\n{one}rows = ["frozen"]\n[settings.b]\n{one}rows = ["frozen", "majority"]\n')
    code, _, err = fedloom("suite", "--file", suite, "--out", out, "--seeds", "0,1", "--target", "majority")
    assert (code, "Traceback" in err) == (0, False)
    saved = {name: json.loads((out / name / "comparison.json").read_text()) for name in ("a", "b")}
    assert ("target" in saved["a"], saved["b"]["target"]) == (False, "majority")  # a does not have that row
    call = ("suite", "--file", suite, "--out", tmp_path / "more", "--seeds", "0", "--rows", "frozen")
    code, _, err = fedloom(*call, "--target", "majority")
    assert (code, "the target 'majority' is neither" in err) == (2, True)  # b has it, and was not asked for it


def test_a_suite_and_a_comparison_of_which_nothing_runs_end_with_an_error(
    fedloom: Any, recipe: Path, tmp_path: Path
) -> None:
    suite = tmp_path / "suite.toml"
    suite.write_text(f'[settings.squares]\nasks = "?"\nrecipe = "{recipe}"\nrows = ["local", "fedavg"]\n')
    for call in (
        ("suite", "--file", suite, "--out", tmp_path / "suite", "--rows", "local, fedavg"),
        ("compare", recipe, "--out", tmp_path / "compared", "--methods", "local, fedavg"),
    ):
        code, out, err = fedloom(*call, "--seeds", "1", "--set", "backbone.name=/nowhere")
        assert (code, err.splitlines()[-1].count("could be run")) == (2, 1)
        assert "fedavg, seed" in out
        assert "cannot run: no backbone '/nowhere'" in out
    code, _, err = fedloom("compare", recipe, "--methods", "local", "--out", suite)
    assert (code, err) == (2, f"fedloom: '{suite}' is a file; name another folder (--out).\n")
    code, _, err = fedloom("compare", recipe, "--methods", " ,")
    assert (code, err.count("\n")) == (2, 1)
    assert "--methods is ' ,'; expected rows" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vqamed-merg"], "did you mean 'vqamed-merge'"),
        (["--file", "gone.toml"], "cannot be read"),
        (["--seeds", "a-b"], "expected 0-4"),
        (["--seeds", "5-2"], "the seeds '5-2' are none"),
        (["vqamed-merge", "--rows", "apar"], "did you mean 'apart'"),
        (
            ["vqamed-merge", "--target", "apar"],
            "the target 'apar' is neither a number nor a row; did you mean 'apart'?",
        ),
        (["vqamed-merge", "--target", "60"], "the target is 60; expected a fraction, 0.6 for 60 %"),
        (["vqamed-merge", "--target", "nan"], "the target is nan; expected a fraction"),
        (["vqamed-merge", "--backbone", "clip-small=x"], "has the backbone 'clip-small'; there is vilt-small."),
        (["vqamed-merge", "--backbone", "vilt"], "--backbone is 'vilt'; expected NAME=FOLDER"),
    ],
)
def test_a_mistake_about_the_suite_is_one_sentence(
    fedloom: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(ROOT)
    code, _, err = fedloom("suite", *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
