"""Asking a run: what its sites answer for questions, texts, folders and DICOM files, and how right they are."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import fedloom as package
from fedloom import views
from fedloom.data import Dataset, Example
from fedloom.methods import FedAvg
from fedloom.tasks import VQA, Classification, Detection, Ranking
from fedloom.tensors import Private, Shared, generator
from fedloom.views import balanced

Fedloom = Callable[..., tuple[int, str, str]]
COLOURS = ("red", "green", "blue")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "which", "colour", "?", "square", *COLOURS)
TRAINING = (
    '[method]\nname = "fedavg"\n[method.adapter]\nkind = "lora"\nrank = 2\n'
    "[training]\nlr = 0.01\nbatch = 8\n[federation]\nrounds = 1\n[reference]\nrows = []\n"
)


@pytest.fixture(scope="module")
def vilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ViLT as a Hugging Face folder."""
    from transformers import BertTokenizer, ViltConfig, ViltModel, ViTImageProcessorPil

    folder = tmp_path_factory.mktemp("vilt")
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    config = ViltConfig(**shape, vocab_size=len(WORDS), max_position_embeddings=12, image_size=16, patch_size=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ViltModel(config).save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, model_max_length=12).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def squares(folder: Path, label: Callable[[int], Any], text: str) -> None:
    """36 squares of three colours at two sites, taken by two scanners, with a text each."""
    rows = []
    for i in range(36):
        noise = torch.randint(0, 90, (16, 16, 3), generator=generator("square", i), dtype=torch.uint8)
        noise[4:12, 4:12, i % 3] = 255
        Image.fromarray(noise.numpy()).save(folder / f"{i}.png")
        scanner = {"scanner": ("GE", "Philips")[i // 3 % 2]} if i else {}  # the first row names none
        rows.append({"image": f"{i}.png", "text": text, "label": label(i), "site": ("oslo", "rome")[i // 18]} | scanner)
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def vqa(vilt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose sites answer questions; at rome one answer is only in the test."""
    folder = tmp_path_factory.mktemp("vqa")
    squares(folder, lambda i: "grey" if i == 35 else COLOURS[i % 3], "which colour ?")
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    marked = [row | {"split": "test" if i % 4 == 3 else "train"} for i, row in enumerate(rows)]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in marked))
    recipe = folder / "ask.toml"
    recipe.write_text(
        '[data]\nsource = "manifest.jsonl"\nvocabulary = "site"\ntest = "column"\nheld_out = 2\n'
        f'[task]\nkind = "vqa"\n[backbone]\nname = "{vilt}"\n{TRAINING}'
    )
    return package.run(recipe, folder / "run").folder


@pytest.fixture
def detection(vilt: Path, tmp_path: Path) -> Path:
    """A recipe of several labels; at oslo no example has any."""
    squares(tmp_path, lambda i: [] if i < 18 else [COLOURS[i % 3], "square"], "square")
    path = tmp_path / "find.toml"
    path.write_text(
        f'[data]\nsource = "manifest.jsonl"\n[task]\nkind = "detection"\n[backbone]\nname = "{vilt}"\n{TRAINING}'
    )
    return path


def test_scores_are_of_one_choice_or_of_each_label() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.0, 3.0]])
    for task in (Classification(COLOURS), VQA(COLOURS, objective="cross_entropy"), Ranking(COLOURS)):
        scores = task.scores(logits)
        assert_close(scores.sum(1), torch.ones(2))
        assert_close(scores[:, 0] / scores[:, 1], (logits[:, 0] - logits[:, 1]).exp())
    for each in (VQA(COLOURS), Detection(COLOURS)):
        assert_close(each.scores(logits), 1 / (1 + (-logits).exp()))


def test_a_question_is_asked_by_its_name(fedloom: Fedloom, vqa: Path) -> None:
    ask = ("predict", vqa, "--site", "oslo", "--image", vqa.parent / "4.png")
    code, out, _ = fedloom(*ask, "--question", "which colour ?", "--top", 2)
    assert code == 0
    answers = package.Run(vqa).predict("oslo", vqa.parent / "4.png", question="which colour ?")
    assert [line.split()[-1] for line in out.splitlines()] == [label for label, _ in answers[:2]]
    assert all(0 <= score <= 1 for _, score in answers)
    for more, said in (
        ((), "the examples of site 'oslo' come with question; give --question."),
        (("--text", "which?"), "the examples of site 'oslo' come with question; give --question."),
        (("--question", "which?", "--text", "a"), "the examples of site 'oslo' come without text; leave out --text."),
        (("--question", " "), "the question is empty; give one with --question."),
        (("--question", "which?", "--out", "a.csv"), "--out is for a folder of images; name one with --image."),
    ):
        code, out, err = fedloom(*ask, *more)
        assert (code, out, err) == (2, "", f"fedloom: {said}\n")


def test_a_folder_of_images_becomes_a_csv(fedloom: Fedloom, vqa: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    for name in ("b.png", "a.png"):
        (tmp_path / "new" / name).write_bytes((vqa.parent / ("1.png" if name[0] == "a" else "2.png")).read_bytes())
    (tmp_path / "new" / "notes.txt").write_text("not an image")
    table = tmp_path / "answers.csv"
    ask = ("predict", vqa, "--site", "rome", "--question", "which colour ?", "--image")
    code, out, _ = fedloom(*ask, tmp_path / "new", "--top", 2, "--out", table)
    assert (code, out) == (0, f"{table}: 2 images\n")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["rank"]) for row in rows] == [
        ("a.png", "1"),
        ("a.png", "2"),
        ("b.png", "1"),
        ("b.png", "2"),
    ]
    run = package.Run(vqa)
    for number, name in ((0, "1.png"), (2, "2.png")):
        single = run.predict("rome", vqa.parent / name, question="which colour ?")
        assert rows[number]["label"] == single[0][0]
        assert float(rows[number]["score"]) == pytest.approx(single[0][1], abs=1e-5)
    (tmp_path / "new" / "a0.png").write_text("not an image either")
    code, out, _ = fedloom(*ask, tmp_path / "new", "--top", 2, "--out", table)
    assert code == 0
    assert "new/a0.png is truncated or no image" in out.splitlines()[0]
    assert out.splitlines()[1:] == [f"{table}: 2 images; 1 could not be read"]
    with table.open(newline="") as file:
        assert list(csv.DictReader(file)) == rows
    (tmp_path / "broken").mkdir()
    (tmp_path / "new" / "a0.png").rename(tmp_path / "broken" / "a0.png")
    code, _, err = fedloom(*ask, tmp_path / "broken")
    assert (code, err) == (2, "fedloom: 0 of 1 images can be read.\n")
    (tmp_path / "empty").mkdir()
    code, _, err = fedloom(*ask, tmp_path / "empty")
    assert code == 2
    assert "holds no image" in err
    code, _, err = fedloom(*ask, tmp_path / "new", "--out", tmp_path / "nowhere" / "a.csv")
    assert code == 2
    assert "cannot be written" in err


def test_a_dicom_file_is_a_picture_too(fedloom: Fedloom, vqa: Path, tmp_path: Path) -> None:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPInstanceUID = ExplicitVRLittleEndian, "1.2.3"
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    pixels = np.asarray(Image.open(vqa.parent / "4.png"))
    dataset = FileDataset(tmp_path / "a.dcm", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, "1.2.3"
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel, dataset.PlanarConfiguration = 16, 16, 3, 0
    dataset.PhotometricInterpretation, dataset.PixelRepresentation = "RGB", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
    dataset.PixelData = pixels.tobytes()
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    run = package.Run(vqa)
    as_dicom = run.predict("oslo", tmp_path / "a.dcm", question="which colour ?")
    assert as_dicom == run.predict("oslo", vqa.parent / "4.png", question="which colour ?")


def test_evaluate_counts_answers_that_a_site_does_not_know(fedloom: Fedloom, vqa: Path) -> None:
    code, out, _ = fedloom("evaluate", vqa)
    found = package.Run(vqa).measure()
    assert code == 0
    assert found["rome"].unseen == 1
    assert found["oslo"].unseen == 0
    assert f"rome: 1 of {found['rome'].metrics['examples']:.0f} have an answer that it does not know" in " ".join(
        out.split()
    )
    assert "oslo:" not in out


def test_evaluate_by_a_column(fedloom: Fedloom, vqa: Path) -> None:
    run = package.Run(vqa)
    parts, whole = run.measure("train", by="scanner"), run.measure("train")
    assert set(parts) == {"oslo, -", "oslo, GE", "oslo, Philips", "rome, GE", "rome, Philips"}
    for site in ("oslo", "rome"):
        own = [row.metrics for name, row in parts.items() if name.startswith(site)]
        examples = sum(row["examples"] for row in own)
        assert examples == whole[site].metrics["examples"]
        for metric in ("accuracy", "loss"):
            mean = sum(row[metric] * row["examples"] for row in own) / examples
            assert mean == pytest.approx(whole[site].metrics[metric], abs=1e-6)
    code, out, _ = fedloom("evaluate", vqa, "--site", "rome", "--by", "scanner")
    assert code == 0
    assert "rome, GE" in out
    assert "oslo" not in out
    assert "mean" not in out  # parts of a site are no sites, and of unlike sizes
    code, _, err = fedloom("evaluate", vqa, "--by", "scaner")
    assert code == 2
    assert "no example has a column 'scaner' (did you mean 'scanner'?); the columns are scanner, site, split." in err


def test_a_site_without_the_column_is_named_and_stops_nothing(
    fedloom: Fedloom, detection: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    (tmp_path / "manifest.jsonl").write_text(
        "".join(json.dumps(row if row["site"] == "rome" else row | {"scanner": ""}) + "\n" for row in rows)
    )
    assert fedloom("run", detection, "--out", tmp_path / "run")[0] == 0
    code, out, _ = fedloom("evaluate", tmp_path / "run", "--by", "scanner")
    assert code == 0
    assert out.startswith("Site 'oslo' has no column 'scanner', and is left out.\n")
    assert "rome, GE" in out
    assert "oslo, " not in out
    code, _, err = fedloom("evaluate", tmp_path / "run", "--by", "scanner", "--site", "oslo")
    assert code == 2
    assert "no example has a column 'scanner'" in err


def test_an_undefined_metric_is_named_and_in_no_mean(fedloom: Fedloom, detection: Path, tmp_path: Path) -> None:
    code, out, err = fedloom("run", detection, "--out", tmp_path / "run", "--set", "training.lr=1e-9")
    assert (code, err) == (0, "")
    summary = package.Run(tmp_path / "run").summary
    assert set(summary["views"]["personal"]["sites"]) == {"rome"}
    assert "oslo was not measured, and counts in no mean" in out
    code, out, _ = fedloom("evaluate", tmp_path / "run")
    text = " ".join(out.split())
    assert code == 0
    assert "oslo: never or always there, and in no mean over labels: 'blue', 'green', 'red' and 'square'" in text
    assert "rome: never or always there, and in no mean over labels: 'square'" in text


def test_each_label_has_a_score_of_its_own(fedloom: Fedloom, detection: Path, tmp_path: Path) -> None:
    assert fedloom("run", detection, "--out", tmp_path / "run", "--set", "training.epochs=8")[0] == 0
    answers = package.Run(tmp_path / "run").predict("rome", tmp_path / "20.png", text="square")
    assert {label for label, _ in answers} == {*COLOURS, "square"}
    assert dict(answers)["square"] > 0.5
    assert sum(score for _, score in answers) != pytest.approx(1)
    code, _, err = fedloom(
        "predict", tmp_path / "run", "--site", "rome", "--image", tmp_path / "20.png", "--question", "?"
    )
    assert code == 2
    assert "come with text; give --text." in err or "come without question; leave out --question." in err


def test_texts_are_asked_for_as_texts(fedloom: Fedloom, recipe: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    texts = [{"text": f"a photo of a {row['label']} {i}", **row} for i, row in enumerate(rows)]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    changes = ("--set", "data.columns.image=none", "--set", 'backbone.towers=["text"]')
    assert fedloom("run", recipe, "--out", tmp_path / "run", *changes)[0] == 0
    ask = ("predict", tmp_path / "run", "--site", "kyiv")
    code, out, _ = fedloom(*ask, "--text", "a photo of a red")
    assert code == 0
    assert {line.split()[-1] for line in out.splitlines()} == {"red", "green", "blue"}
    assert "come with text; give --text." in fedloom(*ask)[2]
    assert "come without image; leave out --image." in fedloom(*ask, "--text", "red", "--image", tmp_path / "1.png")[2]


def test_a_metric_that_is_undefined_for_all_labels_is_no_number() -> None:
    task = Detection(COLOURS)
    nothing = Dataset((Example((), text="a"), Example((), text="b")))
    assert balanced(task, torch.full((2, 3), -1.0), nothing) is None
    assert balanced(task, torch.full((2, 3), 1.0), nothing) == 0
    assert balanced(VQA(COLOURS), torch.empty(0, 3), Dataset(())) is None


def test_a_site_is_asked_about_all_labels_and_about_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows red and green, and gets one red of two right, both greens, and no blue, as it cannot say so."""
    red, green = [1.0, 0.0], [0.0, 1.0]
    monkeypatch.setattr(views, "predict", lambda *_: torch.tensor([red, green, green, green, red, red]))
    pool = Dataset(tuple(Example(colour, text=f"{colour} {i}") for colour in COLOURS for i in (1, 2)))
    own = SimpleNamespace(site=SimpleNamespace(task=VQA(COLOURS[:2])))
    found = views.spread(FedAvg(), own, Shared({}), Private({}), pool, VQA(COLOURS))
    assert found == pytest.approx({"value": (0.5 + 1 + 0) / 3, "examples": 6, "own_labels": (0.5 + 1) / 2})
    knows_all = {"value": 0.6, "examples": 6}
    assert views.summarised([found, knows_all])["own_labels"] == pytest.approx((0.75 + 0.6) / 2)
    assert "own_labels" not in views.summarised([knows_all])
