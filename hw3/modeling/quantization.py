"""4-bit quantization: its configuration, dequantization, and a 4-bit layer for ZeRO-3."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
import transformers
from torch.autograd.function import once_differentiable
from transformers import BitsAndBytesConfig, PreTrainedModel

from hw3.config.recipe import Recipe
from hw3.config.schema import QuantizationSection


def quantization_config(quantization: QuantizationSection) -> BitsAndBytesConfig:
    """The one configuration that training, scoring and generation share."""
    return BitsAndBytesConfig(**quantization.model_dump())


def quantized_already(recipe: Recipe, config: Any) -> list[str]:
    """Where a base that was saved quantized differs from what the recipe says; its own way is the one that counts.

    Args:
        recipe: the recipe.
        config: the base's configuration.
    """
    found, name = getattr(config, "quantization_config", None), recipe.model.pretrained_model_name_or_path
    if found is None:
        return []
    found = found if isinstance(found, dict) else found.to_dict()
    if found.get("quant_method") != "bitsandbytes" or not found.get("load_in_4bit"):
        return [
            f"{name} is quantized by {found.get('quant_method')}; hw3 takes plain weights, or bitsandbytes' 4-bit ones"
        ]
    full = BitsAndBytesConfig.from_dict(found).to_dict()
    section = QuantizationSection(**{key: full[key] for key in QuantizationSection.model_fields})
    if recipe.quantization is None:
        return [f"quantization: {name} is saved in 4 bits; the recipe must say so: {section.model_dump()}"]
    return [
        f'quantization.{key}: found {value}; {name} is saved with {saved}; this works: SET="quantization.{key}={saved}"'
        for key, saved in section.model_dump().items()
        if (value := getattr(recipe.quantization, key)) != saved
    ]


class _Gathered(torch.autograd.Function):
    """A frozen 4-bit layer whose weight need not be there between forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, layer: bnb.nn.Linear4bit) -> torch.Tensor:
        y = bnb.nn.Linear4bit.forward(layer, x)
        ctx.layer, ctx.dtype = layer, layer.compute_dtype or x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        weight, bias = ctx.layer.weight, ctx.layer.bias
        dx = db = None
        if ctx.needs_input_grad[0]:
            plain = bnb.functional.dequantize_4bit(weight.data.view(-1, 1), weight.quant_state)  # gathered again
            dx = (dy.to(ctx.dtype) @ plain.to(ctx.dtype)).to(dy.dtype)
        if ctx.needs_input_grad[1]:
            db = dy.flatten(0, -2).sum(0, dtype=bias.dtype)
        return dx, db, None


class GatheredLinear4bit(bnb.nn.Linear4bit):
    """A frozen 4-bit layer for ZeRO-3, which gathers weights for a forward or a backward and frees them after it.

    bitsandbytes' own keeps a view of what was gathered for its backward, activation checkpointing or not (0.50.2,
    MatMul4Bit), so that in the end a GPU holds every layer's whole weight beside its share.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the layer it is made of."""
        return _Gathered.apply(x, self.bias, self)


def scores_dequantized(recipe: Recipe, parameters: int, device: torch.device) -> bool:
    """Whether 4-bit layers become plain ones of the same weights, once, before scoring.

    It saves every forward the same work. By the device's whole memory, not by what happens to be free, and only where
    both ways compute in one dtype: PEFT adds the adapter's share in another order of rounding to a 4-bit layer, so the
    choice is part of an entry's key.

    Args:
        recipe: the recipe.
        parameters: of the base.
        device: where it will run.
    """
    if recipe.quantization is None or recipe.quantization.bnb_4bit_compute_dtype != recipe.model.dtype:
        return False
    return holds(device, parameters * getattr(torch, recipe.model.dtype).itemsize)


def holds(device: torch.device, weights: int) -> bool:
    """Whether a device has room for weights of this many bytes and for working with them; a CPU always."""
    if device.type == "cpu":
        return True
    return torch.cuda.get_device_properties(device).total_memory > 1.2 * weights + 2 * 2**30


def dequantize(model: PreTrainedModel) -> PreTrainedModel:
    """4-bit layers as plain ones, bit for bit the weights that each of their forwards makes."""
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # it would report the dtype as a warning
    try:
        return model.dequantize()
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
