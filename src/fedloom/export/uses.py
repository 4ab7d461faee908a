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
SESSION = """import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
(logits,) = session.run(None, inputs)  # {names}: see docs/export.md"""


def uses(about: About, model_type: str, adapted: bool) -> Iterator[str]:
    """Blocks of Markdown.

    model_type: of the backbone's config.json
    adapted: whether there is an adapter to load
    """
    for form in about.forms:
        if form == "onnx":
            names = [name for name, on in (("images", about.inputs.images), ("input_ids", about.inputs.texts)) if on]
            yield _block(SESSION.format(names=", ".join(names)))
        elif isinstance(about.task, Ranking):
            yield "A decoder ranks the answers, which transformers does not: use fedloom, or the ONNX graph."
        else:
            yield _block("\n".join(_lines(about, form, model_type, adapted)))


def _lines(about: About, form: str, model_type: str, adapted: bool) -> Iterator[str]:
    prompts = isinstance(about.task, Classification) and about.task.head == "prompts"
    by_peft = form == "peft" and adapted
    yield "import torch"
    if not prompts:
        yield "import torch.nn.functional as F"
    if by_peft:
        yield "from peft import PeftModel"
    if not prompts:
        yield "from safetensors.torch import load_file"
    yield "from transformers import AutoModel"
    if by_peft and about.adapter == "bottleneck":
        yield "\nimport fedloom.peft_bottleneck  # PEFT learns of the adapter"
    if model_type == "albef":
        yield "\nimport fedloom.backbones.albef_model  # AutoModel learns of ALBEF"
    folder = about.parts[0] if about.parts and form == "peft" else "."
    if form == "merged":
        yield '\nmodel = AutoModel.from_pretrained("merged").eval()'
    else:
        yield f"\nbase = {json.dumps(about.backbone.name)}{_where(about.backbone.name)}"
        yield f"model = AutoModel.from_pretrained(base, dtype=torch.{about.backbone.dtype}).eval()"
    if by_peft:
        yield f'model = PeftModel.from_pretrained(model, "{folder}").eval()'
    if not prompts:
        yield f'head = load_file("{folder}/head.safetensors")'
    yield "\n\n@torch.no_grad()"
    if prompts:
        yield "def logits(**inputs):  # what the processor makes of pictures, and of a prompt for each label"
        yield "    return model(**inputs).logits_per_image"
        return
    yield "def logits(**inputs):  # what the processor makes of an example"
    texts_alone = model_type in ("clip", "siglip") and not about.inputs.images
    pooled = POOLED.get(model_type, MEAN)
    yield f"    {pooled.replace('get_image', 'get_text') if texts_alone else pooled}"
    yield f"    {MLP if isinstance(about.task, VQA) and about.task.head == 'mlp' else LINEAR}"


def _where(backbone: str) -> str:
    built_in = locate(backbone) not in (backbone, str(Path(backbone)))
    return f'  # its folder: fedloom.backbones.locate("{backbone}")' if built_in else ""


def _block(code: str) -> str:
    return f"```python\n{code}\n```"
