"""Compute linear layers that share an input, together with their LoRA adapters, as one operation.

y = x W^T + s (x A^T) B^T (LoRA, arXiv:2106.09685, section 4.1). A compiler would write the adapter's product to memory,
add it in a separate kernel, and save both for the backward. Here the matrix product itself adds it. The products with A
and B are too small to fill a GPU, so they run at the same time as those with W. Layers that share an input, such as the
query, key and value projections, become one product with their weights concatenated.

A 4-bit W may stay in 4 bits. It is then dequantized for each product and discarded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from bitsandbytes.functional import QuantState, dequantize_blockwise
from bitsandbytes.nn import Linear4bit, Params4bit
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from peft.tuners.lora.layer import Linear as PeftLinear
from torch.nn import Module

from hw3.cuda_graphs.float16_lora import Float16LoraLinear
from hw3.cuda_graphs.operations import dequantize_weight, run_concurrently
from hw3.modeling.float16_products import Float16Linear, Float16Linear4bit

LoraLinear = PeftLinear | PeftLinear4bit

# Names of layers that a decoder layer calls with the same input, one after the other in this order.
FUSABLE_PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@torch.library.custom_op("hw3::lora_linear", mutates_args=())
def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    absmax: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    out_features: list[int],
    blocksize: int,
    quant_type: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the outputs of G layers side by side, and x A^T for the backward.

    Args:
        x: shape (N, I).
        weight: the frozen weights, concatenated, shape (O, I); or their 4-bit blocks in bitsandbytes' format.
        absmax: float32 scale of each block; None if `weight` is not in 4 bits.
        a: the adapters' A, concatenated, shape (G * R, I).
        b: the adapters' B, concatenated, shape (O, R).
        scaling: the factor s.
        out_features: output features of each layer; their sum is O.
        blocksize: 4-bit weights per scale.
        quant_type: `nf4` or `fp4`, for 4-bit weights.

    Returns:
        y of shape (N, O) and x A^T of shape (N, G * R), in the dtype of `x`.
    """
    y, h = x.new_empty(x.shape[0], b.shape[0]), x.new_empty(x.shape[0], a.shape[0])
    run_concurrently(
        x.device,
        lambda: torch.mm(x, a.T, out=h),
        lambda: torch.mm(x, dequantize_weight(x, weight, absmax, len(b), blocksize, quant_type).T, out=y),
    )
    groups = zip(y.split(out_features, 1), h.chunk(len(out_features), 1), b.split(out_features), strict=True)
    for y_i, h_i, b_i in groups:
        y_i.addmm_(h_i, b_i.T, alpha=scaling)
    return y, h


@lora_linear.register_fake
def _(
    x: torch.Tensor, weight: object, absmax: object, a: torch.Tensor, b: torch.Tensor, *settings: object
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape[0], b.shape[0]), x.new_empty(x.shape[0], a.shape[0])


@torch.library.custom_op("hw3::lora_linear_backward", mutates_args=())
def lora_linear_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    absmax: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    out_features: list[int],
    blocksize: int,
    quant_type: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients with respect to x, A and B.

    They are dy W + dh A, dh^T x and s dy^T h, with dh = s dy B, for each layer.

    Args:
        dy: gradient with respect to y, shape (N, O).
        x: as in `lora_linear`, like all arguments after `h`.
        h: x A^T, shape (N, G * R).
    """
    dx, dh, da, db = torch.empty_like(x), torch.empty_like(h), torch.empty_like(a), torch.empty_like(b)
    count = len(out_features)

    def compute_adapter_gradients() -> None:
        parts = (dy.split(out_features, 1), h.chunk(count, 1), b.split(out_features), dh.chunk(count, 1))
        for dy_i, h_i, b_i, dh_i, db_i in zip(*parts, db.split(out_features), strict=True):
            torch.addmm(dh_i, dy_i, b_i, beta=0, alpha=scaling, out=dh_i)
            torch.addmm(db_i, dy_i.T, h_i, beta=0, alpha=scaling, out=db_i)
        torch.mm(dh.T, x, out=da)

    run_concurrently(
        x.device,
        compute_adapter_gradients,
        lambda: torch.mm(dy, dequantize_weight(x, weight, absmax, len(b), blocksize, quant_type), out=dx),
    )
    return dx.addmm_(dh, a), da, db


@lora_linear_backward.register_fake
def _(
    dy: object,
    x: torch.Tensor,
    h: object,
    weight: object,
    absmax: object,
    a: torch.Tensor,
    b: torch.Tensor,
    *settings: object,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(a), torch.empty_like(b)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, absmax, a, b, *ctx.settings = inputs
    ctx.save_for_backward(x, output[1], weight, absmax, a, b)


def _backward(ctx: Any, dy: torch.Tensor, unused_dh: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    x, h, weight, absmax, a, b = ctx.saved_tensors
    dx, da, db = torch.ops.hw3.lora_linear_backward(dy.contiguous(), x, h, weight, absmax, a, b, *ctx.settings)
    return dx, None, None, da, db, None, None, None, None


lora_linear.register_autograd(_backward, setup_context=_setup_context)


def is_fusable(layer: Module) -> TypeGuard[LoraLinear]:
    """Return whether a layer is a PEFT LoRA layer that `FusedLoraLinear` can replace.

    Its base must be an `nn.Linear` or bitsandbytes' `Linear4bit`. It must have one active adapter, without dropout,
    bias or a LoRA variant such as DoRA.
    """
    # Subclasses may compute something else.
    if not isinstance(layer, PeftLinear | PeftLinear4bit) or type(layer) not in (PeftLinear, PeftLinear4bit):
        return False
    if len(layer.active_adapters) != 1:
        return False
    base, (name,) = layer.base_layer, layer.active_adapters
    if isinstance(base, Linear4bit) and type(base) in (Linear4bit, Float16Linear4bit):
        # Weights can be concatenated only if no 4-bit block crosses the end of a layer.
        assert isinstance(base.weight, Params4bit), "a 4-bit layer has a 4-bit weight"
        is_supported = base.in_features * base.out_features % base.weight.quant_state.blocksize == 0
    else:
        is_supported = type(base) in (torch.nn.Linear, Float16Linear)
    return (
        is_supported
        and isinstance(layer.lora_dropout[name], torch.nn.Identity)
        and name not in layer.lora_variant
        and layer.lora_B[name].bias is None
    )


class FusableLayer(NamedTuple):
    """A LoRA layer that `FusedLoraLinear` can replace.

    Attributes:
        parent: the module that the layer is an attribute of.
        name: the attribute's name.
        layer: the layer.
    """

    parent: Module
    name: str
    layer: LoraLinear


def find_fusable_layers(model: Module) -> list[list[FusableLayer]]:
    """Return the layers that `FusedLoraLinear` can replace, grouped by their input.

    Within a group, the layers are in the order in which they are called.
    """
    groups = []
    for parent in model.modules():
        layers = {name: layer for name, layer in parent.named_children() if is_fusable(layer)}
        for names in FUSABLE_PROJECTIONS:
            if set(names) <= set(layers) and len({_fusion_key(layers[name]) for name in names}) == 1:
                groups.append([FusableLayer(parent, name, layers.pop(name)) for name in names])
        groups += [[FusableLayer(parent, name, layer)] for name, layer in layers.items()]
    return groups


def get_adapter_weights(layers: Sequence[LoraLinear]) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """Return the A and the B matrices of fusable layers."""
    names = [layer.active_adapters[0] for layer in layers]
    return (
        [layer.lora_A[name].get_parameter("weight") for layer, name in zip(layers, names, strict=True)],
        [layer.lora_B[name].get_parameter("weight") for layer, name in zip(layers, names, strict=True)],
    )


def _fusion_key(layer: LoraLinear) -> tuple[object, ...]:
    """Return what must be equal in layers that are fused with each other."""
    (name,) = layer.active_adapters
    return type(layer.base_layer), layer.r[name], layer.scaling[name], layer.in_features


class FusedLoraLinear(Module):
    """PEFT LoRA layers that share an input, computed as one operation in the dtype of `a` and `b`.

    If the base's layers have products in float16, so has this operation; `a` and `b` are then float32.

    Args:
        layers: the layers to replace. Their weights are concatenated; the layers keep views of the result.
        a: the adapters' A, concatenated, shape (G * R, I).
        b: the adapters' B, concatenated, shape (O, R).
    """

    weight: torch.Tensor
    absmax: torch.Tensor | None

    def __init__(self, layers: Sequence[LoraLinear], a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        bases = [layer.base_layer for layer in layers]
        self.a, self.b = a, b
        self.in_float16 = isinstance(bases[0], Float16Linear | Float16Linear4bit)
        self.scaling = float(next(iter(layers[0].scaling.values())))
        self.out_features = [layer.out_features for layer in layers]
        self.biases = [base.bias for base in bases]
        absmax, self.blocksize, self.quant_type = None, 0, ""
        parameters = [base.get_parameter("weight") for base in bases]
        states = [parameter.quant_state for parameter in parameters if isinstance(parameter, Params4bit)]
        if states:
            absmax = torch.cat([_dequantize_absmax(state) for state in states])
            self.blocksize, self.quant_type = states[0].blocksize, states[0].quant_type
        with torch.no_grad():
            weights = [parameter.data for parameter in parameters]
            joined = weights[0] if len(weights) == 1 else torch.cat(weights)
            for parameter, part in zip(parameters, joined.split([len(weight) for weight in weights]), strict=True):
                parameter.data = part
        # 4-bit weights may be stored in another dtype; their bytes are the same.
        self.register_buffer("weight", joined if absmax is None else joined.view(torch.uint8), persistent=False)
        self.register_buffer("absmax", absmax, persistent=False)
        self.pending_outputs: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return each layer's output, shape (..., out_features of the layer), for `x` of shape (..., I)."""
        flat = x.to(self.a.dtype).reshape(-1, x.shape[-1])
        settings = (self.scaling, self.out_features, self.blocksize, self.quant_type)
        inputs = flat, self.weight, self.absmax, self.a, self.b
        if self.in_float16:
            y = Float16LoraLinear.apply(*inputs, *settings)
        else:
            y = torch.ops.hw3.lora_linear(*inputs, *settings)[0]
        parts = [part.reshape(*x.shape[:-1], part.shape[-1]) for part in y.split(self.out_features, 1)]
        return [part if bias is None else part + bias for part, bias in zip(parts, self.biases, strict=True)]


class FusedLoraOutput(Module):
    """The module that takes the place of one fused layer.

    The first layer of a group computes the outputs of all. The others return theirs.

    Args:
        group: the fused layers.
        index: the layer's index in the group, in the order of the calls.
    """

    def __init__(self, group: FusedLoraLinear, index: int) -> None:
        super().__init__()
        self.group, self.index = group, index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the replaced layer returns."""
        if self.index == 0:
            self.group.pending_outputs = self.group(x)
        return self.group.pending_outputs.pop(0)


def _dequantize_absmax(state: QuantState) -> torch.Tensor:
    """Return the blocks' float32 scales, as bitsandbytes' `dequantize_4bit` computes them in each forward."""
    if not state.nested:
        return state.absmax.float()
    return dequantize_blockwise(state.absmax, state.state2).float() + state.offset
