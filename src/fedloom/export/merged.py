"""A merged model: the backbone with the adapter inside its weights, as a Hugging Face model of its own.

It is the model that `AutoModel` makes of the backbone, in float32; a ViLT with a VQA head of two layers is a
`ViltForQuestionAnswering`, which has the same one. Any other head stands beside it, in head.safetensors.
"""

import copy
from pathlib import Path
from typing import Any

import torch

from fedloom.backbones import quietly
from fedloom.export.folded import parameters
from fedloom.serving import Served
from fedloom.tasks import VQA, Task
from fedloom.tensors import Tensors, under

CLASSIFIER = {  # of ViltForQuestionAnswering: our names
    "0.weight": "hidden_weight",
    "0.bias": "hidden_bias",
    "1.weight": "norm_weight",
    "1.bias": "norm_bias",
    "3.weight": "weight",
    "3.bias": "bias",
}


def write_merged(folder: Path, served: Served) -> None:
    """The model and its processor; raises ExportError where the adapter cannot be folded."""
    changed = parameters(served.site.model, served.adapter, served.tensors)
    model: Any = copy.deepcopy(served.site.model.network.module).float()
    with torch.no_grad():
        for name, tensor in changed.items():
            model.get_parameter(name).copy_(tensor)
    model.config.dtype = torch.float32
    with quietly():
        _answering(model, served.site.task, served.tensors).save_pretrained(folder)
    write_processor(folder, served)


def write_processor(folder: Path, served: Served) -> None:
    """What makes pixels of a picture and pieces of a text."""
    for part in served.site.model.network.processor:
        part.save_pretrained(folder)


def _answering(model: Any, task: Task, tensors: Tensors) -> Any:
    """The model with the head inside, where transformers has a class for the two."""
    pooled = model.config.model_type == "vilt" and model.pooler is not None
    if not (pooled and isinstance(task, VQA) and task.head == "mlp"):
        return model
    from transformers import ViltForQuestionAnswering

    config = copy.deepcopy(model.config)
    config.id2label = dict(enumerate(task.labels))
    config.label2id = {label: i for i, label in enumerate(task.labels)}
    head = under("head", tensors)
    with torch.device("meta"):  # no weights are drawn, since all are given
        whole = ViltForQuestionAnswering(config)
    whole.vilt = model
    whole.classifier.load_state_dict({name: head[ours] for name, ours in CLASSIFIER.items()}, assign=True)
    return whole
