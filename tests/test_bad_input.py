"""Bad input: one clear sentence on stderr, exit code 2, no traceback, and nothing is lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from fedloom.tensors import generator

Refused = Callable[..., str]
Fedloom = Callable[..., tuple[int, str, str]]


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def refused(fedloom: Fedloom, tmp_path: Path) -> Refused:
    """`refused("run", ...)`: the one sentence that is said; no file is changed, lost or left behind."""

    def call(*arguments: object) -> str:
        before = files(tmp_path)
        code, _, err = fedloom(*arguments)
        assert code == 2
        assert err.startswith("fedloom: ")
        assert err.count("\n") == 1
        assert files(tmp_path) == before
        return err

    return call


@pytest.fixture
def done(fedloom: Fedloom, recipe: Path, tmp_path: Path) -> Path:
    """The folder of a finished run of one round."""
    folder = tmp_path / "run"
    quick = ("federation.rounds=1", "training.finetune=0", "reference.rows=[]")
    assert fedloom("run", recipe, "--out", folder, *(part for key in quick for part in ("--set", key)))[::2] == (0, "")
    return folder


def add(manifest: Path, **row: str) -> None:
    manifest.write_text(manifest.read_text() + json.dumps(row) + "\n")


# Recipes


def test_a_recipe_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    assert "there is no recipe 'quikstart', as a file or built in; did you mean 'quickstart'?" in refused(
        "run", "quikstart"
    )
    assert "is a folder; expected a TOML file" in refused("run", tmp_path)


def test_a_recipe_that_is_no_toml(refused: Refused, recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace('"linear"', '"linear'))
    err = refused("run", recipe)
    assert f"{recipe} is not TOML" in err
    assert "line 7" in err


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("trainig.lr=0.1", "unknown key 'trainig' in squares.toml; did you mean 'training'?"),
        ("federation.round=3", "unknown key 'round' in [federation] of squares.toml; did you mean 'rounds'?"),
        ("method.adapter.ranks=3", "unknown key 'ranks' in [method.adapter] of squares.toml; did you mean 'rank'?"),
        ("training.lr=-1", "lr = -1 in [training] of squares.toml; expected a number above 0."),
        ("training.batch=0", "batch = 0 in [training] of squares.toml; expected an integer of 1 or more."),
        ("federation.participation=1.5", "participation = 1.5 in [federation] of squares.toml; expected a number"),
        ("method.adapter.rank=-1", "rank = -1 in [method.adapter] of squares.toml; expected an integer of 1 or more."),
        ("method.adapter.alpha=0", "alpha = 0 in [method.adapter] of squares.toml; expected a number above 0."),
        ("method.adapter.last=-1", "last = -1 in [method.adapter] of squares.toml; expected an integer of 0 or more"),
        ("method.mu=-0.5", "[method] of squares.toml: mu is -0.5; FedProx needs mu >= 0"),
        ("data.held_out=1.5", "held_out = 1.5 in [data] of squares.toml; expected"),
        ("method.adapter={kind='bottleneck', width=0}", "width = 0 in [method.adapter] of squares.toml; expected"),
        ("method.adapter={kind='lorra'}", 'kind = "lorra" in [method.adapter] of squares.toml; did you mean \'lora\'?'),
        ("method.name=fedavgg", "unknown method 'fedavgg' in [method] of squares.toml; did you mean 'fedavg'?"),
        ("method.name=no_such:Method", "cannot be imported (ModuleNotFoundError: No module named 'no_such'); is it"),
        ("data.on_bad_image=ignore", 'on_bad_image = "ignore" in [data] of squares.toml; expected "error" or "skip".'),
        ("sites.paris.joins=1", "there is no site 'paris' (named in squares.toml); the sites are ['kyiv', "),
        ("sites.oslo.initial=manifest.jsonl", "manifest.jsonl', which [sites] oslo initial of squares.toml names"),
        ("data.newcomer=['paris']", "there is no site 'paris' (named in squares.toml); the sites are"),
        ("data.newcomer=3", "makes newcomers of all 3 sites; leave one to take part."),
        ("backbone.name=clip-smal", "no backbone 'clip-smal' (did you mean 'clip-small'?): not a folder"),
        ("backbone.name=nobody/no-such-model", "backbone 'nobody/no-such-model' cannot be had from the hub"),
        ("backbone.towers=['audio']", "audio"),
        ("task.labels=['red','green','blue','pink']", "the label 'pink' of [task] labels has no example in"),
        ("task.labels=['red','green','bleu']", "(did you mean 'blue'?); leave it out, or add examples."),
        ("data.source=nobody/no-such-dataset", "`datasets` cannot load it"),
        ("data.source=pack:caltek", "there is no pack 'caltek' (did you mean 'caltech'?)"),
        ("data.source=./no/manifest.jsonl", "there is no file or folder"),
        ("data.columns.label=colour", "has no column 'colour' for the label"),
        ("data.partition={kind='dirichlet', sites=100}", "ask for fewer sites, a smaller minimum or a greater alpha"),
        ("data.where.scanner=['A']", "[data.where] scanner asks for ['A'], and no row of"),
        ("training.lr", "cannot set 'training.lr'; expected key=value, as in federation.rounds=20."),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be(
    refused: Refused, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refused("run", recipe.name, "--set", key, "--out", tmp_path / "run")


def test_data_and_groups_are_one_or_the_other(refused: Refused, recipe: Path, groups: Path) -> None:
    needs = "needs [data] and [task], or [groups.NAME] with a data and a task each."
    assert needs in refused("run", groups, "--set", "data.source=manifest.jsonl")
    text = recipe.read_text()
    recipe.write_text(
        text[text.index("[backbone]") :].replace('[task]\nkind = "classification"\nhead = "linear"\n', "")
    )
    assert needs in refused("run", recipe)
    recipe.write_text(text[text.index("[backbone]") :])
    assert "has no [data]" in refused("run", recipe)


# Data


def test_images_that_cannot_be_read_are_named_or_skipped_and_counted(
    refused: Refused, fedloom: Fedloom, recipe: Path, tmp_path: Path
) -> None:
    missing, truncated = tmp_path / "3.png", tmp_path / "20.png"
    content = missing.read_bytes()
    missing.unlink()
    err = refused("run", recipe, "--out", tmp_path / "run")
    assert f"image {missing} is missing. To go on without it, set on_bad_image = 'skip' in [data]." in err
    missing.write_bytes(content)
    truncated.write_bytes(truncated.read_bytes()[:400])
    assert f"image {truncated} is truncated or no image" in refused("run", recipe, "--out", tmp_path / "run")
    missing.unlink()
    skip = ("--set", "data.on_bad_image=skip", "--set", "federation.rounds=1", "--set", "reference.rows=[]")
    code, out, err = fedloom("run", recipe, *skip, "--out", tmp_path / "run")
    assert (code, err) == (0, "")
    said = [line for line in out.splitlines() if line.startswith("skipped")]
    assert len(said) == 2
    assert said[0].startswith(f"skipped image 1 of 2: image {missing} is missing")
    assert said[1].startswith(f"skipped image 2 of 2: image {truncated} is truncated")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["skipped_images"] == 2
    assert "skipped image 2 of 2" in fedloom("check", recipe, *skip)[1]


def test_a_class_folder_without_an_image(refused: Refused, recipe: Path, tmp_path: Path) -> None:
    for name in ("cat", "dog", "bird"):
        (tmp_path / "photos" / name).mkdir(parents=True)
    for name in ("cat", "dog"):
        shutil.copy(tmp_path / "0.png", tmp_path / "photos" / name / "0.png")
    err = refused("run", recipe, "--set", f"data.source={tmp_path / 'photos'}", "--set", "data.partition.kind=iid")
    assert f"class folder {tmp_path / 'photos' / 'bird'} holds no image" in err


def test_a_site_of_one_example(refused: Refused, recipe: Path, tmp_path: Path) -> None:
    noise = torch.randint(0, 256, (32, 32, 3), generator=generator("one"), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(tmp_path / "one.png")
    add(tmp_path / "manifest.jsonl", image="one.png", label="red", site="bern")
    err = refused("run", recipe, "--out", tmp_path / "run")
    assert "site 'bern': 1 units" in err
    assert "more data, fewer sites, or smaller parts" in err


def test_a_manifest_with_a_broken_line(refused: Refused, recipe: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(manifest.read_text() + '{"image": "1.png", \n')
    assert f"{manifest}, line 49 is not JSON" in refused("run", recipe, "--out", tmp_path / "run")


def test_a_backbone_of_broken_files(refused: Refused, recipe: Path, backbone: Path, tmp_path: Path) -> None:
    own = tmp_path / "backbone"
    shutil.copytree(backbone, own)
    arguments = ("run", recipe, "--set", f"backbone.name={own}", "--out", tmp_path / "run")
    weights = own / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert f"backbone '{own}' cannot be read" in refused(*arguments)
    (own / "config.json").write_text("{}")
    assert f"'{own / 'config.json'}' is not the config.json of a Hugging Face model" in refused(*arguments)


# Runs


def test_a_loss_that_is_not_finite_names_site_round_and_batch(fedloom: Fedloom, recipe: Path, tmp_path: Path) -> None:
    settings = ("--set", "training.lr=1e30", "--set", "training.warmup_head=0", "--set", "training.batch=2")
    code, _, err = fedloom("run", recipe, *settings, "--out", tmp_path / "run")
    assert code == 2
    assert err.count("\n") == 1
    assert "site 'oslo', round 1, batch " in err
    assert "the loss is nan" in err or "the loss is inf" in err
    assert "Lower [training] lr" in err


def test_a_run_that_failed_before_its_first_round_is_in_nobodys_way(
    fedloom: Fedloom, recipe: Path, tmp_path: Path
) -> None:
    arguments = ("run", recipe, "--set", "federation.rounds=1", "--set", "reference.rows=[]", "--out", tmp_path / "run")
    code, _, err = fedloom(*arguments, "--set", "method.adapter.targets=['query']")
    assert code == 2
    assert "finds no place in the adapted towers; their linear layers are ['fc1', " in err
    assert fedloom(*arguments)[0] == 0


def test_a_folder_that_holds_a_run(refused: Refused, recipe: Path, done: Path) -> None:
    kept = ("--set", "federation.rounds=1", "--set", "training.finetune=0", "--set", "reference.rows=[]")
    assert f"'{done}' holds a run already; go on with it (--resume)" in refused("run", recipe, *kept, "--out", done)
    changed = refused("run", recipe, *kept, "--set", "method.adapter.rank=4", "--resume", "--out", done)
    assert "was of another recipe: method.adapter.rank changed" in changed
    assert "training.finetune, reference.rows changed" in refused("run", recipe, "--resume", "--out", done)


def test_rounds_may_only_grow(refused: Refused, fedloom: Fedloom, recipe: Path, tmp_path: Path) -> None:
    settings = ("--set", "training.finetune=0", "--set", "reference.rows=[]", "--out", tmp_path / "run")
    assert fedloom("run", recipe, *settings)[0] == 0
    err = refused("run", recipe, *settings, "--resume", "--set", "federation.rounds=1")
    assert "was of 2 rounds, not of 1; on --resume rounds may only grow." in err
    assert fedloom("run", recipe, *settings, "--resume", "--set", "federation.rounds=3")[0] == 0


def test_a_folder_that_cannot_be_written(refused: Refused, recipe: Path, tmp_path: Path) -> None:
    assert "cannot be written" in refused("run", recipe, "--out", tmp_path / "0.png" / "run")
    assert "0.png' is a file; name a folder with --out" in refused("run", recipe, "--out", tmp_path / "0.png")
    assert "is not empty and is no run" in refused("run", recipe, "--out", tmp_path)


def test_what_is_no_run_or_has_no_such_site(refused: Refused, done: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    for command in (("evaluate", nowhere), ("predict", nowhere, "--site", "oslo", "--image", tmp_path / "1.png")):
        assert f"'{nowhere}' is not a run folder: it has no recipe.toml." in refused(*command)
    unknown = "there is no site 'paris' in '{}'; its sites are ['kyiv', 'oslo', 'rome']."
    assert unknown.format(done) in refused("evaluate", done, "--site", "paris")
    assert unknown.format(done) in refused("predict", done, "--site", "paris", "--image", tmp_path / "1.png")
    assert "there is no split 'dev'; expected train, held_out or test." in refused("evaluate", done, "--split", "dev")


def test_a_prediction_for_nothing_or_for_what_cannot_be_read(refused: Refused, done: Path, tmp_path: Path) -> None:
    ask = ("predict", done, "--site", "oslo")
    assert "the examples of site 'oslo' come with image; give --image." in refused(*ask)
    image = ("--image", tmp_path / "1.png")
    assert "come without text; leave out --text." in refused(*ask, *image, "--text", "a square")
    assert f"image {tmp_path / 'none.png'} is missing" in refused(*ask, "--image", tmp_path / "none.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "1.png").read_bytes()[:300])
    assert f"image {tmp_path / 'cut.png'} is truncated or no image" in refused(*ask, "--image", tmp_path / "cut.png")


def test_a_run_without_a_round_serves_nothing(refused: Refused, done: Path) -> None:
    shutil.rmtree(done / "server")
    assert f"the run in '{done}' has no round yet; go on with it: --resume." in refused("evaluate", done)


def test_a_recipe_of_one_s_own_is_never_overwritten(fedloom: Fedloom, recipe: Path) -> None:
    own = recipe.rename(recipe.parent / "recipe.toml")
    text = own.read_text()
    code, _, err = fedloom("run", own, "--out", own.parent)
    assert code == 2
    assert "is not empty and is no run" in err
    assert own.read_text() == text


def test_a_task_without_labels_is_refused_by_name(fedloom: Fedloom, recipe: Path, tmp_path: Path) -> None:
    code, _, err = fedloom("run", recipe, "--set", "data.label_minimum=100", "--out", tmp_path / "run")
    assert code == 2
    assert "has no label of 100 examples or more; lower [data] label_minimum." in err


def test_a_backbone_that_would_not_read_the_question_is_refused(fedloom: Fedloom, recipe: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (recipe.parent / "manifest.jsonl").read_text().splitlines()]
    asked = [json.dumps({**row, "text": "which colour?"}) for row in rows]
    (recipe.parent / "manifest.jsonl").write_text("\n".join(asked))
    code, _, _ = fedloom("run", recipe, "--dry-run")  # a classification of images goes by the image
    assert code == 0
    recipe.write_text(recipe.read_text().replace('kind = "classification"', 'kind = "vqa"'))
    code, _, err = fedloom("run", recipe, "--out", tmp_path / "run")
    assert code == 2
    assert "have an image and a question, and this backbone reads one of the two" in err
    assert not (tmp_path / "run").exists()
