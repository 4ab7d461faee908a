"""How an export is used without fedloom: the lines of Python that its card shows."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from fedloom.backbones import locate
from fedloom.export.about import About
from fedloom.tasks import VQA, Classification, Ranking

POOLED: Mapping[str, str] = {  # by the backbone's model_type: its features, of what its processor returns
    "albef": "pooled = model(**inputs).last_hidden_state[:, 0]",
    "clip": "pooled = model.get_image_features(**inputs).pooler_output",
    "siglip": "pooled = model.get_image_features(**inputs).pooler_output",
    "vilt": "pooled = model(**inputs).pooler_output",
}
MEAN = """states, shown = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
    pooled = (states * shown).sum(1) / shown.sum(1)"""
LINEAR = """pooled = F.layer_norm(pooled.float(), pooled.shape[-1:])
    return F.linear(pooled, head["head/weight"], head["head/bias"])"""
MLP = """hidden = F.linear(pooled.float(), head["head/hidden_weight"], head["head/hidden_bias"])
    hidden = F.layer_norm(hidden, hidden.shape[-1:], head["head/norm_weight"], head["head/norm_bias"])
    return F.linear(F.gelu(hidden), head["head/weight"], head["head/bias"])"""
GRAPH = """pixels = images(pictures, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
    given["images"] = pixels.round().clip(0, 255).astype("uint8")"""
PIECES = "pieces({of}, padding={padding}, truncation=True, return_token_type_ids=False, return_tensors={kind!r})"


def uses(about: About, model_type: str, adapted: bool) -> Iterator[str]:
    """Blocks of Markdown: each makes `answers`, the logits of pictures and texts, a column for each label.

    model_type: of the backbone's config.json
    adapted: whether there is an adapter to load
    """
    for form in about.forms:
        if form == "onnx":
            yield _block("\n".join(_graph(about)))
        elif isinstance(about.task, Ranking):
            yield "A decoder ranks the answers, which transformers does not: use fedloom, or the ONNX graph."
        else:
            yield _block("\n".join(_lines(about, form, model_type, adapted)))


def _lines(about: About, form: str, model_type: str, adapted: bool) -> Iterator[str]:
    prompts = isinstance(about.task, Classification) and about.task.head == "prompts"
    by_peft = form == "peft" and adapted
    yield from ["import json\nfrom pathlib import Path\n"] * prompts
    yield "import torch"
    if not prompts:
        yield "import torch.nn.functional as F"
    if by_peft:
        yield "from peft import PeftModel"
    if not prompts:
        yield "from safetensors.torch import load_file"
    yield f"from transformers import {', '.join(_classes(about, about.inputs.texts or prompts, 'AutoModel'))}"
    name = about.backbone.name
    built_in = form != "merged" and locate(name) not in (name, str(Path(name)))
    if by_peft and about.adapter == "bottleneck":
        yield "\nimport fedloom.peft_bottleneck  # PEFT learns of the adapter"
    if model_type == "albef":
        yield "\nimport fedloom.backbones.albef_model  # AutoModel learns of ALBEF"
    if built_in:
        yield "\nfrom fedloom.backbones import locate"
    folder = about.parts[0] if about.parts and form == "peft" else "."
    if form == "merged":
        yield '\nmodel = AutoModel.from_pretrained("merged").eval()'
    else:
        quoted = json.dumps(name)
        yield f"\nbase = {f'locate({quoted})  # a folder that comes with fedloom' if built_in else quoted}"
        yield f"model = AutoModel.from_pretrained(base, dtype=torch.{about.backbone.dtype}).eval()"
    if by_peft:
        yield f'model = PeftModel.from_pretrained(model, "{folder}").eval()'
    if not prompts:
        yield f'head = load_file("{folder}/head.safetensors")'
    yield from _processing(about, about.inputs.texts or prompts)
    if prompts:
        yield 'task = json.loads(Path("fedloom.json").read_text())["task"]'
        yield 'prompts = [task["template"].replace("{}", label) for label in task["labels"]]'
    yield "\n\n@torch.no_grad()"
    yield "def logits(**inputs):"
    if prompts:
        yield "    return model(**inputs).logits_per_image"
    else:
        texts_alone = model_type in ("clip", "siglip") and not about.inputs.images
        pooled = POOLED.get(model_type, MEAN)
        yield f"    {pooled.replace('get_image', 'get_text') if texts_alone else pooled}"
        yield f"    {MLP if isinstance(about.task, VQA) and about.task.head == 'mlp' else LINEAR}"
    given = ['**images(pictures, return_tensors="pt")'] * about.inputs.images
    if about.inputs.texts or prompts:
        padding = '"max_length"' if model_type == "siglip" else "True"
        given.append(f"**{PIECES.format(of='texts' if about.inputs.texts else 'prompts', padding=padding, kind='pt')}")
    yield f"\n\n{_answers(about)}"
    yield f"    return logits({', '.join(given)})"


def _graph(about: About) -> Iterator[str]:
    yield "import onnxruntime"
    yield f"from transformers import {', '.join(_classes(about, about.inputs.texts))}"
    yield '\nsession = onnxruntime.InferenceSession("model.onnx")'
    yield from _processing(about, about.inputs.texts)
    yield f"\n\n{_answers(about)}"
    pieces = f"dict({PIECES.format(of='texts', padding='True', kind='np')})"
    yield f"    given = {pieces if about.inputs.texts else '{}'}"
    if about.inputs.images:
        yield f"    {GRAPH}"
    yield "    (logits,) = session.run(None, given)"
    yield "    return logits"


def _answers(about: About) -> str:
    takes = ["pictures"] * about.inputs.images + ["texts"] * about.inputs.texts
    return f"def answers({', '.join(takes)}):  # a row each, a column for each label of fedloom.json"


def _classes(about: About, texts: bool, *others: str) -> list[str]:
    """Those of transformers that a block imports, in order."""
    return sorted([*others, *["AutoImageProcessor"] * about.inputs.images, *["AutoTokenizer"] * texts])


def _processing(about: About, texts: bool) -> Iterator[str]:
    yield from ['images = AutoImageProcessor.from_pretrained(".")'] * about.inputs.images
    yield from ['pieces = AutoTokenizer.from_pretrained(".")'] * texts


def _block(code: str) -> str:
    return f"```python\n{code}\n```"
