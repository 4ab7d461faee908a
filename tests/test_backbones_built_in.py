"""The backbones that come with fedloom: small, licensed, readable by plain Hugging Face, and usable as they are."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, PreTrainedModel

import fedloom.backbones.albef_model  # noqa: F401 (AutoModel learns of it)
from fedloom.adapters import Bottleneck, Head
from fedloom.backbones import Batch, load
from fedloom.tasks import VQA, Classification, Ranking, Task
from fedloom.tensors import generator

FOLDER = Path(str(files("fedloom"))) / "assets" / "backbones"
TEXTS = ("what is the plane?", "is there a red circle?", "what modality is shown in this image?")
ANSWERS = ("axial", "red", "ct")
TASKS: Mapping[str, Task] = {
    "albef-small": VQA(ANSWERS),
    "clip-small": Classification(ANSWERS),
    "text-small": Classification(ANSWERS, head="linear"),
    "vilt-small": VQA(ANSWERS),
}
MEDICAL, SYMBOLS = "VQA-Med", ("Noto Emoji", "EmojiTwo", "Material Design Icons")
DATA = {  # what each was trained on, which its card must name, with the licences
    "albef-small": ("easy-VQA", MEDICAL, *SYMBOLS, "CC BY 4.0", "Apache 2.0", "MIT"),
    "clip-small": ("Caltech-101", MEDICAL, *SYMBOLS, "CC BY 4.0", "Apache 2.0", "MIT"),
    "text-small": ("CLINC150", "CC BY 3.0"),
    "vilt-small": ("easy-VQA", MEDICAL, *SYMBOLS, "CC BY 4.0", "Apache 2.0", "MIT"),
}
EVERY = pytest.mark.parametrize("name", TASKS)


def asked(name: str) -> Batch:
    """Three examples of noise, as this backbone takes them."""
    task = TASKS[name]
    noise = torch.randint(0, 256, (3, 3, 96, 96), generator=generator("noise"), dtype=torch.uint8)
    images = None if name == "text-small" else noise
    texts = None if name == "clip-small" else TEXTS
    return Batch(task.targets(ANSWERS), images, texts, task.candidates)


def test_each_is_tested_here() -> None:
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(TASKS)


@EVERY
def test_it_is_small_and_in_half_precision(name: str) -> None:
    assert sum(path.stat().st_size for path in (FOLDER / name).iterdir()) < 15e6
    with safe_open(FOLDER / name / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(key).dtype for key in weights.keys()} == {torch.float16}  # noqa: SIM118
        assert all(weights.get_tensor(key).isfinite().all() for key in weights.keys())  # noqa: SIM118


@EVERY
def test_its_card_names_its_licence_its_data_their_licences_and_its_limits(name: str) -> None:
    card = (FOLDER / name / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    words = " ".join(card.split())
    assert [said for said in (*DATA[name], f"# {name}", "## Limits", "--seed 0") if said not in words] == []
    script = f"benchmarks/pretrain/{name.removesuffix('-small')}.py"
    assert f"python {script} " in words
    repository = Path(__file__).parents[1]
    assert not (repository / "benchmarks").is_dir() or (repository / script).is_file()


@EVERY
def test_plain_hugging_face_reads_it_whole(name: str) -> None:
    module, read = AutoModel.from_pretrained(FOLDER / name, output_loading_info=True, local_files_only=True)
    assert [key for key in read["missing_keys"] if not key.startswith("pooler.")] == []
    assert json.loads((FOLDER / name / "config.json").read_text())["model_type"] == module.config.model_type
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / name, local_files_only=True)
    assert len(tokenizer(TEXTS[0])["input_ids"]) > len(TEXTS[0].split())
    if name != "text-small":
        AutoImageProcessor.from_pretrained(FOLDER / name, local_files_only=True)


@EVERY
def test_it_answers_finitely_and_adapts(name: str) -> None:
    model, task, batch = load(name), TASKS[name], asked(name)
    head = task.init(model.dim, seed=0)
    bare = task.logits(model(batch, Head(), {}), head)
    assert bare.shape == (3, len(ANSWERS))
    assert bare.isfinite().all()
    features = model(batch, Head(), {}).pooled
    assert features is not None
    assert not torch.equal(features[0], features[1])
    adapter = Bottleneck(4)
    tensors = {key: t + 0.1 for key, t in model.init(adapter, 0).items()}
    adapted = model(batch, adapter, tensors).pooled
    assert adapted is not None
    assert adapted.isfinite().all()
    assert not torch.equal(adapted, features)


def test_threads_that_load_at_once_leave_transformers_as_it_was() -> None:
    before = PreTrainedModel.tie_weights
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(load, 4 * ["clip-small", "albef-small"]))
    assert PreTrainedModel.tie_weights is before
    head = loaded[1].network.module.head.decoder
    assert head.weight is loaded[1].network.module.text.embeddings.word_embeddings.weight


def test_the_small_albef_ranks_answers_too() -> None:
    task, batch = Ranking(ANSWERS), asked("albef-small")
    features = load("albef-small")(Batch(batch.targets, batch.images, batch.texts, task.candidates), Head(), {})
    scores = task.logits(features, {})
    assert scores.shape == (3, len(ANSWERS))
    assert scores.isfinite().all()
