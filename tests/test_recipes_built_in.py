"""The built-in recipes of both papers' settings: each is assembled, on small files in the published layouts, with tiny
backbones of random weights; one of each family is run."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import published
import pytest
import torch
from test_docs import commands

from fedloom.assembly import Federation, assemble, planned
from fedloom.backbones.albef_model import AlbefConfig, AlbefModel
from fedloom.layouts import LAYOUTS
from fedloom.methods import FedDLP
from fedloom.recipe import BUILT_IN, Recipe, load

Fedloom = Callable[..., tuple[int, str, str]]

LETTERS = tuple("abcdefghijklmnopqrstuvwxyz0123456789")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS))
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
QUESTIONS = ("slake", "vqa-rad", "vqa-med-2019", "vqa-med-2020", "vqa-med-2021")
FEDPIA = [f"fedpia-{setting}-{backbone}" for setting in range(1, 6) for backbone in ("vilt", "albef")]
FEDDLP = [f"feddlp-{name}" for name in ("aircraft", "dtd", "flowers", "pets")]
ALSO = ["cocovqa", "flickr30k"]
SMALLER = {  # what files of 20 images cannot give
    "fedpia-3": ["data.partition.minimum=3"],
    "fedpia-4": ["data.partition.minimum=3", "data.partition.sites=4"],
    "feddlp": ["data.partition.minimum=2", "data.partition.sites=3"],
    "cocovqa": ["data.partition.merge_below=1"],
    "flickr30k": ["data.partition.minimum=4", "data.partition.sites=3"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published.write(tmp_path_factory.mktemp("data"), *sorted(set(published.SETS) - {"pathvqa"}))


@pytest.fixture(autouse=True)
def here(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLOOM_DATA", str(data))


@pytest.fixture(scope="module")
def vilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertTokenizer, ViltConfig, ViltModel, ViTImageProcessorPil

    folder = tmp_path_factory.mktemp("vilt")
    sizes = {**SIZES, "num_hidden_layers": 2, "max_position_embeddings": 16, "image_size": 16, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ViltModel(ViltConfig(vocab_size=len(WORDS), **sizes)).save_pretrained(folder)
    words = {word: number for number, word in enumerate(WORDS)}
    BertTokenizer(vocab=words, model_max_length=16).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def albef(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertTokenizer, ViTImageProcessorPil

    folder = tmp_path_factory.mktemp("albef")
    vision = {**SIZES, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
    words = {**SIZES, "num_hidden_layers": 2, "vocab_size": len(WORDS), "max_position_embeddings": 48}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AlbefConfig(vision_config=vision, text_config=words, fusion_layers=1, projection_dim=8)
        AlbefModel(config).save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, model_max_length=48).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture
def small(vilt: Path, albef: Path, backbone: Path) -> Callable[..., list[str]]:
    """`small(name)`: what makes a recipe small."""

    def make(name: str) -> list[str]:
        tiny = backbone if name.startswith("feddlp") else albef if name.endswith("albef") else vilt
        fewer = [override for family, own in SMALLER.items() if name.startswith(family) for override in own]
        narrow = [] if name.startswith("feddlp") else ["method.adapter.width=4"]
        return [f"backbone.name={tiny}", "federation.rounds=1", *narrow, *fewer]

    return make


def assembled(name: str, overrides: list[str]) -> Federation:
    return assemble(planned(load(name, overrides)))


@pytest.mark.parametrize("path", sorted(BUILT_IN.glob("*.toml")), ids=lambda path: path.stem)
def test_a_built_in_recipe_loads_and_says_how_to_run_it(path: Path) -> None:
    assert f"#     fedloom run {path.stem}\n" in path.read_text() + "\n"
    recipe = load(path.stem)
    assert isinstance(recipe, Recipe)


@pytest.mark.parametrize("name", [*FEDPIA, *FEDDLP, *ALSO])
def test_the_papers_training_is_in_the_recipe(name: str) -> None:
    recipe = load(name)
    training = recipe.training
    if name in FEDDLP:
        assert replace(recipe.method, gamma=0.01) == FedDLP.official()
        assert (training.lr, training.batch, training.clip, recipe.federation.rounds) == (5e-5, 32, 1.0, 101)
        assert set(recipe.compare) == {"image-0.1", "image-0.01", "text-0.1", "text-0.01"}
    else:
        adapter: Any = recipe.method.adapter
        assert (adapter.width, adapter.activation, recipe.federation.rounds) == (48, "relu", 30)
        assert (training.lr, training.weight_decay, training.epochs) == (1e-4, 1e-2, 1)


@pytest.mark.parametrize("backbone_name", ["vilt", "albef"])
def test_setting_1_has_five_sets_of_questions_as_sites(small: Callable[..., list[str]], backbone_name: str) -> None:
    federation = assembled(f"fedpia-1-{backbone_name}", small(backbone_name))
    assert set(federation.participants) == set(QUESTIONS)
    answers = {name: own.site.task.labels for name, own in federation.participants.items()}
    assert len(set(answers.values())) == 5  # each its own
    assert not set(answers["vqa-med-2019"]) & set(answers["vqa-med-2021"])
    assert all(own.test for own in federation.participants.values())


@pytest.mark.parametrize("backbone_name", ["vilt", "albef"])
def test_setting_2_has_eight_modalities_as_sites(small: Callable[..., list[str]], backbone_name: str) -> None:
    federation = assembled(f"fedpia-2-{backbone_name}", small(backbone_name))
    assert len(federation.participants) == 8


@pytest.mark.parametrize("backbone_name", ["vilt", "albef"])
@pytest.mark.parametrize("setting", [3, 4])
def test_settings_3_and_4_detect_diseases(small: Callable[..., list[str]], backbone_name: str, setting: int) -> None:
    name = f"fedpia-{setting}-{backbone_name}"
    assert load(name).data.partition.sites == {3: 4, 4: 10}[setting]  # type: ignore[union-attr]
    federation = assembled(name, small(name))
    assert len(federation.participants) == 4
    own = next(iter(federation.participants.values()))
    assert own.site.task.metric == "f1_micro"
    assert own.site.train.texts([0]) is not None
    towers = {place.tower for place in federation.model.places}
    assert towers == ({"joint"} if backbone_name == "vilt" else {"vision", "text"})


@pytest.mark.parametrize("backbone_name", ["vilt", "albef"])
def test_setting_5_mixes_tasks(small: Callable[..., list[str]], backbone_name: str) -> None:
    federation = assembled(f"fedpia-5-{backbone_name}", small(backbone_name))
    metrics = {name: own.site.task.metric for name, own in federation.participants.items()}
    assert metrics == {**dict.fromkeys(QUESTIONS[:3], "accuracy"), "openi": "f1_micro", "mimic-cxr": "f1_micro"}
    assert len(federation.participants["mimic-cxr"].site.train) < 40  # one tenth of the patients, p10
    assert federation.task is None


@pytest.mark.parametrize("name", FEDDLP)
@pytest.mark.parametrize("row", ["image-0.1", "text-0.01"])
def test_feddlp_adapts_one_tower_of_clip(small: Callable[..., list[str]], name: str, row: str) -> None:
    federation = assemble(planned(load(name, small(name)).row(row)))
    assert {place.tower for place in federation.model.places} == {"vision" if row == "image-0.1" else "text"}
    assert federation.recipe.data.partition.alpha == float(row.partition("-")[2])  # type: ignore[union-attr]
    method: Any = federation.method
    assert method.gamma == (0.01 if row == "image-0.1" else 1.0)
    for own in federation.participants.values():
        assert not len(own.site.held_out)
        assert len(own.test) > 0


def test_beyond_medicine(small: Callable[..., list[str]]) -> None:
    asked = assembled("cocovqa", [*small("cocovqa"), "data.held_out=2"])
    assert set(asked.participants) == {"how many", "is the"}
    assert asked.groups[""].labels == ("2", "two", "yes")  # answers of fewer than nine questions are not learnt
    shown = assembled("flickr30k", small("flickr30k"))
    assert len(shown.participants) == 3


PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
SHOWN = [words for words in commands(PAGE) if words[0] == "run" and words[1] in (*FEDPIA, *FEDDLP)]
FAMILIES = ("fedpia-5-vilt", "fedpia-5-albef", "fedpia-3-vilt", "cocovqa")


@pytest.mark.parametrize("words", [*SHOWN, *(["run", name] for name in FAMILIES)], ids=" ".join)
def test_one_of_each_family_and_what_is_shown_runs(
    fedloom: Fedloom, small: Callable[..., list[str]], words: list[str], tmp_path: Path
) -> None:
    name = words[1]
    overrides = [*small(name), "reference.rows=[]", "training.batch=32"]
    overrides += ["method.probe=1"] * (load(name).method_name == "fedpia")
    settings = [part for override in overrides for part in ("--set", override)]
    code, _, err = fedloom(*words, *settings, "--out", tmp_path / "run")
    assert (code, err) == (0, "")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(summary["views"]["personal"]["sites"]) == len(assembled(name, overrides).participants)


@pytest.mark.parametrize("name", [*FEDPIA, *FEDDLP, *ALSO])
def test_missing_data_is_said_with_what_to_download_and_where_to_put_it(
    fedloom: Fedloom, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDLOOM_DATA", str(tmp_path / "none"))
    code, out, err = fedloom("run", name, "--out", tmp_path / "run")
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 1
    layout = next(part.data.source for part in load(name).parts.values()).rstrip(":")
    for said in (str(tmp_path / "none" / layout), "download", LAYOUTS[layout].where, LAYOUTS[layout].terms):
        assert said in err
    assert not (tmp_path / "run").exists()


def test_the_page_of_recipes_names_every_recipe_and_where_each_set_is_from() -> None:
    page = PAGE.read_text("utf-8")
    assert [path.stem for path in sorted(BUILT_IN.glob("*.toml")) if f"`{path.stem}`" not in page] == []
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `") and "https://" in line}
    assert rows.keys() == LAYOUTS.keys()
    for name, layout in LAYOUTS.items():
        address = rows[name].split("|")[3].strip()
        assert address in layout.where
