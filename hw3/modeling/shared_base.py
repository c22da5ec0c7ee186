"""Modules for scoring that share the weights of a base model while it is trained.

A run needs the base model twice: with the adapters that are trained, and with a saved checkpoint that is scored. PEFT,
TRL and the compiler change the modules of the first. The second has its own modules, so neither disturbs the other,
and the weights are in memory once.
"""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes as bnb
import torch
from transformers import PreTrainedModel

from hw3.modeling.float16_products import Float16Linear, Float16Linear4bit


class SharedDequantizedLinear(torch.nn.Linear):
    """A linear layer that shares the weight of a 4-bit layer, and dequantizes it whenever it is read.

    It computes bitwise what the layer computes that `dequantize` makes, and needs no memory for its weight.

    Args:
        layer: the 4-bit layer.
    """

    def __init__(self, layer: bnb.nn.Linear4bit) -> None:
        torch.nn.Module.__init__(self)  # `nn.Linear` would allocate a weight
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.quantized_weight, self.bias = layer.weight, layer.bias
        self._forward = Float16Linear.forward if isinstance(layer, Float16Linear4bit) else torch.nn.Linear.forward

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The weight in the compute dtype, shape (out_features, in_features)."""
        quantized: Any = self.quantized_weight
        return bnb.functional.dequantize_4bit(quantized.data, quantized.quant_state)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return what `nn.Linear` returns."""
        return self._forward(self, input)  # type: ignore[arg-type]


def share_weights(model: PreTrainedModel, *, dequantized: bool) -> PreTrainedModel:
    """Return a second model in evaluation mode with the parameters of a loaded base model.

    Args:
        model: the base model, without adapters, on one device. Its weights must not change.
        dequantized: return a model that computes what `dequantize` would make of the base model.
    """
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    quantized = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    shared |= {id(module.quant_state): module.quant_state for module in quantized}
    # `deepcopy` takes what it finds in its second argument as copied already.
    twin = copy.deepcopy(model, shared)
    if dequantized:
        for name, module in list(twin.named_modules()):
            if isinstance(module, bnb.nn.Linear4bit):
                twin.set_submodule(name, SharedDequantizedLinear(module))
    return twin.eval()
