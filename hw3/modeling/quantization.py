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
from hw3.modeling.float16_products import use_float16_products


def build_quantization_config(section: QuantizationSection) -> BitsAndBytesConfig:
    """Return the configuration that training, scoring and generation share."""
    return BitsAndBytesConfig(**section.model_dump())


def find_quantization_problems(recipe: Recipe, config: Any) -> list[str]:
    """Return where the recipe differs from a base that was saved quantized, whose own settings take effect.

    Args:
        recipe: the recipe.
        config: the base's configuration.
    """
    saved, name = getattr(config, "quantization_config", None), recipe.model.pretrained_model_name_or_path
    if saved is None:
        return []
    saved = saved if isinstance(saved, dict) else saved.to_dict()
    if saved.get("quant_method") != "bitsandbytes" or not saved.get("load_in_4bit"):
        return [
            f"model.pretrained_model_name_or_path: {name} is quantized by {saved.get('quant_method')}; use a base "
            "without quantization, or one in bitsandbytes' 4-bit format"
        ]
    values = BitsAndBytesConfig.from_dict(saved).to_dict()
    section = QuantizationSection(**{key: values[key] for key in QuantizationSection.model_fields})
    if recipe.quantization is None:
        return [f"quantization: {name} is saved in 4 bits; the recipe must have this section: {section.model_dump()}"]
    return [
        f"quantization.{key}: found {value}, but {name} is saved with {saved_value}; use "
        f'SET="quantization.{key}={saved_value}"'
        for key, saved_value in section.model_dump().items()
        if (value := getattr(recipe.quantization, key)) != saved_value
    ]


class _GatheredLinear4bitFunction(torch.autograd.Function):
    """A frozen 4-bit layer that does not need its weight between forward and backward."""

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
            # DeepSpeed has gathered the weight again.
            dequantized = bnb.functional.dequantize_4bit(weight.data.view(-1, 1), weight.quant_state)
            dx = (dy.to(ctx.dtype) @ dequantized.to(ctx.dtype)).to(dy.dtype)
        if ctx.needs_input_grad[1]:
            db = dy.flatten(0, -2).sum(0, dtype=bias.dtype)
        return dx, db, None


class GatheredLinear4bit(bnb.nn.Linear4bit):
    """A frozen 4-bit layer for ZeRO-3, which gathers weights for a forward or a backward and frees them after it.

    The layer of bitsandbytes 0.50.2 (`MatMul4Bit`) keeps a view of the gathered weight for its backward, even with
    activation checkpointing. In the end every GPU would store all layers' complete weights beside its shard.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what `Linear4bit` returns."""
        return _GatheredLinear4bitFunction.apply(x, self.bias, self)


def should_dequantize(recipe: Recipe, num_parameters: int, device: torch.device) -> bool:
    """Return whether to dequantize the 4-bit weights once before scoring, which saves every forward that work.

    The choice is part of an entry's key, because rounding differs: PEFT adds an adapter's output to that of a 4-bit
    layer in another order. It therefore depends on the device's total memory, not on what is free at the moment. Both
    forms must compute in the same dtype.

    Args:
        recipe: the recipe.
        num_parameters: parameters of the base.
        device: where it will run.
    """
    if recipe.quantization is None or recipe.quantization.bnb_4bit_compute_dtype != recipe.model.dtype:
        return False
    return fits_on_device(device, num_parameters * getattr(torch, recipe.model.dtype).itemsize)


def fits_on_device(device: torch.device, weight_bytes: int) -> bool:
    """Return whether a device has memory for the weights and for computing with them; always true for a CPU."""
    if device.type == "cpu":
        return True
    return torch.cuda.mem_get_info(device)[1] > 1.2 * weight_bytes + 2 * 2**30


def dequantize(model: PreTrainedModel) -> PreTrainedModel:
    """Replace 4-bit layers by linear layers in the compute dtype.

    Their weights are bitwise those that a 4-bit layer computes in every forward.
    """
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # transformers warns about the dtype
    try:
        return use_float16_products(model.dequantize())
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
