r"""An adapter inside the weights: the same function without it, where the algebra allows that.

    LoRA             W + s B A           (IA)³    l ∘ W, l ∘ b         biases, norms, all weights    what was trained

A bottleneck is not linear, prompts are positions, and attention over features multiplies by what it sees: no weights of
the backbone do the same.
"""

import torch
from torch import Tensor

from fedloom.adapters import IA3, LoRA
from fedloom.backbones.adaptable import Adaptable
from fedloom.errors import ExportError
from fedloom.peft_folder import alive
from fedloom.places import Adapter, Replaced
from fedloom.tensors import Tensors, by_place, of_model, without


def parameters(model: Adaptable, adapter: Adapter, tensors: Tensors) -> dict[str, Tensor]:
    """The parameters of the Hugging Face model that the adapter changes, by name, float32.

    raises ExportError: no weights do what the adapter does
    """
    own = without("head", of_model(tensors))
    weights = dict(model.network.module.named_parameters())
    found: dict[str, Tensor] = {}
    if isinstance(adapter, LoRA):
        for place, (B, A) in alive(own).items():
            name = f"{model.modules[place]}.weight"
            found[name] = weights[name].double() + adapter.scale * (B @ A)
    elif isinstance(adapter, IA3):
        for place, leaves in by_place(own).items():
            factor, module = leaves["l"].double(), model.modules[place]
            found[f"{module}.weight"] = weights[f"{module}.weight"].double() * factor[:, None]
            if f"{module}.bias" in weights:
                found[f"{module}.bias"] = weights[f"{module}.bias"].double() * factor
    elif isinstance(adapter, Replaced):
        for name, tensor in own.items():
            # In the dtype of the frozen weights, which is how it was trained and is served.
            found[name.replace("/", ".").removeprefix(".")] = tensor.to(model.dtype)
    elif own:
        raise ExportError(
            f"an adapter of the kind {type(adapter).__name__} cannot be folded into the backbone's weights; "
            "export its graph (--onnx)."
        )
    return {name: tensor.to(torch.float32) for name, tensor in found.items()}
