"""Runs of the built-in CLIP, ViLT and ALBEF, exported in every form, and each form read by the library it is for."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from fedloom.backbones import load as load_backbone
from fedloom.backbones import locate
from fedloom.export import export
from fedloom.export.fingerprint import TEXTS, picture
from fedloom.recipe import load
from fedloom.runs import Run, run
from fedloom.tensors import generator

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # by PEFT
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),  # by torch
]
TASKS = {
    "clip-small": {"kind": "classification"},
    "vilt-small": {"kind": "vqa"},
    "albef-small": {"kind": "ranking"},
}


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Run]:
    """`made("vilt-small")`: a run of a round at two sites, six squares and questions each."""

    def make(backbone: str) -> Run:
        rows = []
        for i in range(12):
            pixels = torch.randint(0, 256, (48, 48, 3), generator=generator("squares", i), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / f"{i}.png")
            label = ("red", "dark green", "blue")[i % 3]
            rows.append({"image": f"{i}.png", "label": label, "question": "which one?", "site": "ab"[i // 6]})
        (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        columns = {} if backbone == "clip-small" else {"text": "question"}
        told = {
            "data": {"source": "manifest.jsonl", "columns": columns},
            "backbone": {"name": backbone},
            "task": TASKS[backbone],
            "method": {"name": "fedavg", "adapter": {"kind": "lora", "rank": 2}},
            "training": {"lr": 0.01, "batch": 4, "epochs": 2},
            "federation": {"rounds": 1, "evaluate_every": 0},
            "reference": {"rows": []},
        }
        (tmp_path / "recipe.toml").write_text(tomli_w.dumps(told))
        return run(load(tmp_path / "recipe.toml"), tmp_path / "run")

    return make


def processed(folder: Path, texts: list[str]) -> dict[str, Tensor]:
    """What transformers' own processors make of the fixed pictures and of texts."""
    from transformers import AutoImageProcessor, AutoTokenizer

    pixels = AutoImageProcessor.from_pretrained(folder)([picture(i) for i in range(4)], return_tensors="pt")
    return {**pixels, **AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")}


def equal(found: Tensor, expected: Tensor, within: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=within, atol=within)


def graph(folder: Path, given: dict[str, Tensor]) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx")
    return torch.from_numpy(session.run(None, {name: t.numpy() for name, t in given.items()})[0])


def answer_by_their_cards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block of Python of the card answers as the federation."""
    monkeypatch.chdir(folder)
    said = json.loads(Path("fedloom.json").read_text())
    blocks = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.S)
    assert len(blocks) == len(said["forms"]) == 3
    for block in blocks:
        code: dict[str, Any] = {}
        exec(block, code)
        given = [[picture(i) for i in range(4)], *[list(TEXTS)] * said["inputs"]["texts"]]
        equal(torch.as_tensor(code["answers"](*given)), load_file("fingerprint.safetensors")["logits"], 1e-4)


def test_a_clip_run_in_every_form(made: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import PeftModel
    from transformers import AutoModel

    (folder,) = export(made("clip-small"), tmp_path / "to", ["b"], ["merged", "onnx"])
    expected = load_file(folder / "fingerprint.safetensors")["logits"]
    labels = json.loads((folder / "fedloom.json").read_text())["task"]["labels"]
    inputs = processed(folder, [f"a photo of a {label}." for label in labels])
    base = AutoModel.from_pretrained(locate("clip-small"), dtype=torch.float32)
    assert not torch.allclose(base(**inputs).logits_per_image, expected, atol=1e-2)
    equal(PeftModel.from_pretrained(base, folder).eval()(**inputs).logits_per_image, expected)
    equal(AutoModel.from_pretrained(folder / "merged").eval()(**inputs).logits_per_image, expected)
    decode = load_backbone("clip-small").network.decode
    images = torch.stack([decode(picture(i)) for i in range(4)])
    for n in (1, 4):
        equal(graph(folder, {"images": images[:n]}), expected[:n], 1e-4)
    answer_by_their_cards(folder, monkeypatch)


def test_a_vilt_run_in_every_form(made: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import PeftModel
    from transformers import AutoModel, ViltForQuestionAnswering

    (folder,) = export(made("vilt-small"), tmp_path / "to", ["b"], ["merged", "onnx"])
    expected = load_file(folder / "fingerprint.safetensors")["logits"]
    inputs = processed(folder, list(TEXTS))
    whole = ViltForQuestionAnswering.from_pretrained(folder / "merged").eval()
    equal(whole(**inputs).logits, expected)
    assert list(whole.config.id2label.values()) == ["blue", "dark green", "red"]
    base = AutoModel.from_pretrained(locate("vilt-small"), dtype=torch.float32)
    pooled = PeftModel.from_pretrained(base, folder).eval()(**inputs).pooler_output
    equal(whole.classifier(pooled), expected)
    decode = load_backbone("vilt-small").network.decode
    images = torch.stack([decode(picture(i)) for i in range(4)])
    words = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    equal(graph(folder, {"images": images, **words}), expected, 1e-4)
    n = int(words["attention_mask"][0].sum())  # one example, without padding
    one = {name: t[:1, :n] for name, t in words.items()}
    equal(graph(folder, {"images": images[:1], **one}), expected[:1], 1e-4)
    answer_by_their_cards(folder, monkeypatch)


def test_an_albef_run_in_every_form(made: Callable[..., Run], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModel

    (folder,) = export(made("albef-small"), tmp_path / "to", ["b"], ["merged", "onnx"])
    expected = load_file(folder / "fingerprint.safetensors")["logits"]
    labels = json.loads((folder / "fedloom.json").read_text())["task"]["labels"]
    inputs = processed(folder, list(TEXTS))
    inputs.pop("token_type_ids", None)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def ranked(model: Any) -> Tensor:
        """The log-likelihood of each answer by itself, through the model's own causal decoder."""
        states = model(**inputs).last_hidden_state
        columns = []
        for label in labels:
            ids = tokenizer(label, return_tensors="pt")["input_ids"].expand(len(states), -1)
            words = model.answer(ids, torch.ones_like(ids), states, inputs["attention_mask"]).log_softmax(-1)
            columns.append(words[:, :-1].gather(2, ids[:, 1:, None]).sum((1, 2)))
        return torch.stack(columns, 1)

    import fedloom.backbones.albef_model  # noqa: F401  (AutoModel learns of ALBEF)

    base = AutoModel.from_pretrained(locate("albef-small"), dtype=torch.float32)
    equal(ranked(PeftModel.from_pretrained(base, folder).eval()), expected)
    equal(ranked(AutoModel.from_pretrained(folder / "merged").eval()), expected)
    decode = load_backbone("albef-small").network.decode
    images = torch.stack([decode(picture(i)) for i in range(4)])
    words = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    equal(graph(folder, {"images": images, **words}), expected, 1e-4)


def test_a_blend_of_bottlenecks_is_one_graph_and_the_same_each_time(recipe: Path, tmp_path: Path) -> None:
    told = {"method": {"name": "ensemble", "adapter": {"kind": "bottleneck", "width": 3, "last": 1}}}
    fast = {"reference.rows": [], "federation": {"rounds": 1, "evaluate_every": 0}, "training.finetune": 0}
    done = run(load(recipe, {**told, **fast}), tmp_path / "run")
    (first,) = (a := export(done, tmp_path / "a", ["rome"], ["onnx"]))
    (second,) = export(done, tmp_path / "b", ["rome"], ["onnx"])
    assert {check.form for check in a[first]} == {"peft", "onnx"}
    assert (first / "model.onnx").read_bytes() == (second / "model.onnx").read_bytes()
    assert not re.search(rb"fedloom|site-packages", (first / "model.onnx").read_bytes()), "where a node came from"
