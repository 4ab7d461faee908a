r"""The bottleneck adapter as a method of Hugging Face PEFT, which has none of its own.

    import fedloom.peft_bottleneck                      # PEFT learns of it
    PeftModel.from_pretrained(model, "exports/oslo")    # and loads what fedloom exported

.. math:: y = x + W_u\,\sigma(W_d x + b_d) + b_u

after a block, x being what the block returns; in ALBEF's text layers, at the junction inside. Files and names are those
of `fedloom.peft_folder`. It is for inference: nothing is merged, one adapter is active at a time.
"""

# mypy: disallow-subclassing-any=False, disallow-untyped-calls=False
# (PEFT has no annotations that can be read here)

from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from fedloom.backbones.network import Junction
from fedloom.peft_folder import BOTTLENECK


@dataclass
class BottleneckConfig(PeftConfig):
    """What adapter_config.json says."""

    target_modules: list[str] | None = None
    exclude_modules: list[str] | None = None
    activation: str = "relu"  # or "gelu"
    shapes: dict[str, list[int]] = field(default_factory=dict)  # by module: dimensions of the block, hidden units

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = BOTTLENECK


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A block with bottlenecks after it, by their names."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")

    def __init__(self, base_layer: nn.Module, activation: str):
        super().__init__()
        self.base_layer = base_layer
        self.activation = F.relu if activation == "relu" else F.gelu
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False

    def put(self, name: str, dim: int, width: int, inference: bool) -> None:
        """One adapter more, of a shape that its weights will have."""
        self.bottleneck_down[name] = nn.Linear(dim, width)
        self.bottleneck_up[name] = nn.Linear(width, dim)
        self.set_adapter(name, inference_mode=inference)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the block returns, with what the active adapter adds."""
        out: Tensor = self.base_layer(*args, **kwargs)
        read = args[0] if isinstance(self.base_layer, Junction) else out
        for name in () if self.disable_adapters else self.active_adapters:
            if name in self.bottleneck_down:
                units = self.activation(self.bottleneck_down[name](read.float()))
                out = out + self.bottleneck_up[name](units).to(out.dtype)
        return out


class BottleneckModel(BaseTuner):
    """A model whose blocks have bottlenecks after them."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  (as PEFT has it)

    def _create_and_replace(  # type: ignore[override]  # by the types of its own configuration
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        wrapped = isinstance(target, BottleneckLayer)
        layer: Any = target if wrapped else BottleneckLayer(target, peft_config.activation)
        layer.put(adapter_name, *peft_config.shapes[current_key], peft_config.inference_mode)
        if not wrapped:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own looks for the weight of the layer that it replaces, and a block has none of its own.
        setattr(parent, child_name, new_module)
        new_module.to(next(self.model.parameters()).device)


_KIND: Any = BOTTLENECK  # a string, where PEFT's own are of an enumeration that cannot be extended
PEFT_TYPE_TO_CONFIG_MAPPING[_KIND] = BottleneckConfig
PEFT_TYPE_TO_TUNER_MAPPING[_KIND] = BottleneckModel
PEFT_TYPE_TO_PREFIX_MAPPING[_KIND] = BottleneckModel.prefix
