"""Matrix products in float16 for GPUs without bfloat16, with everything else in float32.

float16 has no number above 65504, which hidden states of Gemma-2 exceed, and few below 1e-5, where gradients are. So
only the two factors of a product are rounded to float16. Each activation or gradient is first divided by a power of
two, which is exact and puts its largest element just below 2**15. The product is summed and returned in float32, so it
cannot overflow. Residuals, norms, attention, soft-caps and adapters stay in float32. No loss scaling is needed.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import bitsandbytes as bnb
import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding
from transformers import PreTrainedModel


def round_to_float16(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a tensor to float16 after dividing it by a power of two, without reading a value on the CPU.

    Args:
        x: float32, any shape.

    Returns:
        The rounded tensor, and the power of two as a float32 scalar; their product is `x` but for rounding. If an
        element is NaN or infinite, the scale is 1, so that rows without such an element can still be computed.
    """
    least, greatest = torch.aminmax(x.detach())
    # Clearing all bits but a float32's exponent leaves the largest power of two that is not above it. A tensor of zeros
    # gets 2**-100: its inverse must be finite. The largest rounded element is at least 2**14 and below 2**15.
    #
    # These numbers are literals. PyTorch 2.11 and 2.13 compile a module's constant as a variable if shapes are dynamic,
    # and then fail where a second `autograd.Function` of the compiled code reads it.
    power = (torch.maximum(greatest, -least).view(torch.int32) & 0x7F800000).view(torch.float32)
    scale = torch.where(power.isfinite(), power.clamp(min=2.0**-100) * 2.0**-14, 1.0)
    return (x * (1 / scale)).to(torch.float16), scale


@torch.library.custom_op("hw3::float16_product", mutates_args=())
def _float16_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return _multiply(a, b)


@_float16_product.register_fake
def _(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)


def _multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()  # PyTorch has this product with a float32 result for GPUs only


def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply two float16 matrices, without gradient.

    Args:
        a: shape (N, K).
        b: shape (K, M).

    Returns:
        float32, shape (N, M).
    """
    if torch.compiler.is_compiling():
        return torch.ops.hw3.float16_product(a, b)
    return _multiply(a, b)


class _Float16Product(torch.autograd.Function):
    """Compute x W^T, and the gradients of x and, if it is trained, of W."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, layer: bnb.nn.Linear4bit | None
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        rounded, scale = round_to_float16(flat)
        frozen, weight_scale = _round_weight(weight, layer)
        ctx.layer = layer
        ctx.save_for_backward(weight, flat if ctx.needs_input_grad[1] else None)
        y = multiply(rounded, frozen.T).mul_(scale * weight_scale)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        weight, x = ctx.saved_tensors
        rounded, scale = round_to_float16(dy.reshape(-1, dy.shape[-1]))
        dx = dw = None
        if ctx.needs_input_grad[0]:
            frozen, weight_scale = _round_weight(weight, ctx.layer)
            dx = multiply(rounded, frozen).mul_(scale * weight_scale)
            dx = dx.view(*dy.shape[:-1], dx.shape[-1])
        if ctx.needs_input_grad[1]:
            rounded_x, x_scale = round_to_float16(x)
            dw = multiply(rounded.T, rounded_x).mul_(scale * x_scale).to(weight.dtype)
        return dx, dw, None


def _round_weight(
    weight: torch.Tensor | None, layer: bnb.nn.Linear4bit | None
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Return a weight in float16 and its scale; trained weights are float32, frozen ones are float16 or in 4 bits."""
    if layer is not None:
        packed: Any = layer.weight
        return bnb.functional.dequantize_4bit(packed.data.view(-1, 1), packed.quant_state), 1.0
    assert weight is not None, "a layer that is not in 4 bits passes its weight"
    return (weight, 1.0) if weight.dtype == torch.float16 else round_to_float16(weight)


class Float16Linear(torch.nn.Linear):
    """A linear layer with products in float16, and inputs and outputs in float32."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return what `nn.Linear` returns, in float32."""
        y = _Float16Product.apply(input.float(), self.weight, None)
        return y if self.bias is None else y + self.bias


class Float16Linear4bit(bnb.nn.Linear4bit):
    """A frozen 4-bit layer with products in float16, and inputs and outputs in float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what `Linear4bit` returns, in float32."""
        y = _Float16Product.apply(x.float(), None, self)
        return y if self.bias is None else y + self.bias


def use_float16_products(model: PreTrainedModel) -> PreTrainedModel:
    """Make a float16 model compute with float32 activations, in place; leave models of other dtypes as they are.

    Weights of linear layers and embeddings stay in float16 or in 4 bits. All other parameters become float32.
    """
    if model.dtype != torch.float16:
        return model
    kept = set()
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = Float16Linear
        elif type(module) is bnb.nn.Linear4bit:
            module.__class__ = Float16Linear4bit
            # A base that was saved in 4 bits may have been quantized from bfloat16.
            packed: Any = module.weight
            packed.quant_state.dtype = torch.float16
        elif isinstance(module, torch.nn.Embedding) and _return_float32 not in module._forward_hooks.values():
            module.register_forward_hook(_return_float32)
        if isinstance(module, Float16Linear | Float16Linear4bit | torch.nn.Embedding):
            kept.add(id(module.weight))
        if isinstance(module, Float16Linear | Float16Linear4bit) and "_old_forward" in vars(module):
            # accelerate has wrapped the forward of the former class, to spread the model over devices.
            module.__dict__["_old_forward"] = MethodType(type(module).forward, module)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == torch.float16 and id(tensor) not in kept:
            tensor.data = tensor.data.float()
    return model


def _return_float32(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    if hasattr(module, "embed_scale"):  # Gemma's embeddings multiply in the dtype of their weight, which may overflow
        return embedding(inputs[0], module.weight, module.padding_idx).float() * module.embed_scale
    return output.float()


def get_export_dtype(dtype: str) -> str:
    """Return the dtype in which to save a model of a recipe's `model.dtype`: one that other programs can compute in.

    They would compute a float16 model with float16 activations, which overflow.
    """
    return "bfloat16" if dtype == "float16" else dtype


def get_activation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the hidden states of a model whose weights have this dtype."""
    return torch.float32 if dtype == torch.float16 else dtype
