"""Linear layers of one input and their LoRA adapters as one operation, for the captured step.

y = x W^T + s (x A^T) B^T (LoRA, arXiv:2106.09685, section 4.1). Left to itself a compiler writes the adapter's share
out, adds it in a kernel of its own, and keeps both for the backward. Here it is added by the matrix product itself, and
the products with A and B, too small to fill a GPU, run beside those with W. Layers of one input, such as an attention's
query, key and value, are one product with their weights end to end.

A 4-bit W may stay packed: it is made plain for each product and forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from bitsandbytes.functional import dequantize_blockwise
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from peft.tuners.lora.layer import Linear as PeftLinear
from torch.nn import Module

# Names of layers that a decoder calls one after the other, in this order, with one input.
OF_ONE_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

_side_streams: dict[torch.device, torch.cuda.Stream] = {}


def _side_by_side(device: torch.device, small: Callable[[], object], large: Callable[[], object]) -> None:
    """Two pieces of work, the first on a second stream where there is a GPU; the current stream waits for both."""
    if device.type != "cuda":
        small()
        large()
        return
    current = torch.cuda.current_stream(device)
    if device not in _side_streams:
        _side_streams[device] = torch.cuda.Stream(device)
    side = _side_streams[device]
    side.wait_stream(current)
    with torch.cuda.stream(side):
        small()
    large()
    current.wait_stream(side)


def _plain(
    x: torch.Tensor, weight: torch.Tensor, absmax: torch.Tensor | None, outs: int, blocksize: int, quant_type: str
) -> torch.Tensor:
    if absmax is None:
        return weight
    return torch.ops.bitsandbytes.dequantize_4bit(weight, absmax, blocksize, quant_type, [outs, x.shape[1]], x.dtype)


@torch.library.custom_op("hw3::lora_linear", mutates_args=())
def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    absmax: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    outs: list[int],
    blocksize: int,
    quant_type: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of G layers side by side and, for the backward, x A^T.

    Args:
        x: shape (N, I).
        weight: of the frozen layers, one below the other, shape (O, I); or packed, as bitsandbytes does, in blocks.
        absmax: float32 scale of each block; None if `weight` is not packed.
        a: shape (G * R, I).
        b: shape (O, R).
        scaling: the factor s.
        outs: how many of the O rows belong to each layer.
        blocksize: packed weights of one scale.
        quant_type: `nf4` or `fp4`, of packed weights.

    Returns:
        y of shape (N, O) and x A^T of shape (N, G * R), in the dtype of `x`.
    """
    y, h = x.new_empty(x.shape[0], b.shape[0]), x.new_empty(x.shape[0], a.shape[0])
    _side_by_side(
        x.device,
        lambda: torch.mm(x, a.T, out=h),
        lambda: torch.mm(x, _plain(x, weight, absmax, len(b), blocksize, quant_type).T, out=y),
    )
    for y_i, h_i, b_i in zip(y.split(outs, 1), h.chunk(len(outs), 1), b.split(outs), strict=True):
        y_i.addmm_(h_i, b_i.T, alpha=scaling)
    return y, h


@lora_linear.register_fake
def _(x, weight, absmax, a, b, scaling, outs, blocksize, quant_type):  # type: ignore[no-untyped-def]
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
    outs: list[int],
    blocksize: int,
    quant_type: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients by x, A and B: dy W + dh A, dh^T x and s dy^T h, with dh = s dy B, layer by layer.

    Args:
        dy: gradient by y, shape (N, O).
        h: x A^T, shape (N, G * R).
        others: as in `lora_linear`.
    """
    dx, dh, da, db = torch.empty_like(x), torch.empty_like(h), torch.empty_like(a), torch.empty_like(b)

    def adapters() -> None:
        parts = (dy.split(outs, 1), h.chunk(len(outs), 1), b.split(outs), dh.chunk(len(outs), 1), db.split(outs))
        for dy_i, h_i, b_i, dh_i, db_i in zip(*parts, strict=True):
            torch.addmm(dh_i, dy_i, b_i, beta=0, alpha=scaling, out=dh_i)
            torch.addmm(db_i, dy_i.T, h_i, beta=0, alpha=scaling, out=db_i)
        torch.mm(dh.T, x, out=da)

    _side_by_side(
        x.device,
        adapters,
        lambda: torch.mm(dy, _plain(x, weight, absmax, len(b), blocksize, quant_type), out=dx),
    )
    return dx.addmm_(dh, a), da, db


@lora_linear_backward.register_fake
def _(dy, x, h, weight, absmax, a, b, scaling, outs, blocksize, quant_type):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(a), torch.empty_like(b)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, absmax, a, b, *ctx.rest = inputs
    ctx.save_for_backward(x, output[1], weight, absmax, a, b)


def _backward(ctx, dy, dh_unused):  # type: ignore[no-untyped-def]
    x, h, weight, absmax, a, b = ctx.saved_tensors
    dx, da, db = torch.ops.hw3.lora_linear_backward(dy.contiguous(), x, h, weight, absmax, a, b, *ctx.rest)
    return dx, None, None, da, db, None, None, None, None


lora_linear.register_autograd(_backward, setup_context=_keep)


def can_replace(layer: Module) -> bool:
    """Whether a layer is a plain or 4-bit linear one with one plain adapter: no dropout, bias or variant of LoRA."""
    if type(layer) not in (PeftLinear, PeftLinear4bit) or len(layer.active_adapters) != 1:
        return False
    base, (name,) = layer.base_layer, layer.active_adapters
    if type(base) is Linear4bit:
        # Packed blocks do not run over the end of a layer, so that layers may be laid end to end.
        whole = base.in_features * base.out_features % base.weight.quant_state.blocksize == 0
    else:
        whole = type(base) is torch.nn.Linear
    return (
        whole
        and isinstance(layer.lora_dropout[name], torch.nn.Identity)
        and name not in layer.lora_variant
        and layer.lora_B[name].bias is None
    )


def replaceable(model: Module) -> list[list[tuple[Module, str, Module]]]:
    """The layers that `LoraLinears` can stand for, those of one input together: (parent, name in it, layer)."""
    groups = []
    for parent in model.modules():
        found = {name: layer for name, layer in parent.named_children() if can_replace(layer)}
        for names in OF_ONE_INPUT:
            if set(names) <= set(found) and len({_kind(found[name]) for name in names}) == 1:
                groups.append([(parent, name, found.pop(name)) for name in names])
        groups += [[(parent, name, layer)] for name, layer in found.items()]
    return groups


def adapter_weights(layers: Sequence[Module]) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """The A and the B of layers that `can_replace` takes."""
    names = [layer.active_adapters[0] for layer in layers]
    return (
        [layer.lora_A[name].weight for layer, name in zip(layers, names, strict=True)],
        [layer.lora_B[name].weight for layer, name in zip(layers, names, strict=True)],
    )


def _kind(layer: Module) -> tuple[object, ...]:
    """What must be the same of layers that are joined."""
    (name,) = layer.active_adapters
    return type(layer.base_layer), layer.r[name], layer.scaling[name], layer.in_features


class LoraLinears(Module):
    """PEFT's LoRA layers of one input, one adapter each, as one operation in the dtype of their adapters' copies.

    Args:
        layers: what it takes the place of. Their weights are laid end to end, and they keep them as views of that.
        a: the adapters' A, one below the other, shape (G * R, I).
        b: their B, likewise, shape (O, R).
    """

    def __init__(self, layers: Sequence[Module], a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        bases = [layer.base_layer for layer in layers]
        self.a, self.b = a, b
        self.scaling = float(next(iter(layers[0].scaling.values())))
        self.outs = [layer.out_features for layer in layers]
        self.biases = [base.bias for base in bases]
        absmax, self.blocksize, self.quant_type = None, 0, ""
        if type(bases[0]) is Linear4bit:
            states = [base.weight.quant_state for base in bases]
            absmax = torch.cat([_scales(state) for state in states])
            self.blocksize, self.quant_type = states[0].blocksize, states[0].quant_type
        with torch.no_grad():
            weights = [base.weight.data for base in bases]
            joined = weights[0] if len(weights) == 1 else torch.cat(weights)
            for base, part in zip(bases, joined.split([len(weight) for weight in weights]), strict=True):
                base.weight.data = part
        # Packed weights may be stored in another dtype; their bytes are the same.
        self.register_buffer("weight", joined if absmax is None else joined.view(torch.uint8), persistent=False)
        self.register_buffer("absmax", absmax, persistent=False)
        self.left: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Each layer's output; any leading dimensions."""
        flat = x.to(self.a.dtype).reshape(-1, x.shape[-1])
        rest = (self.scaling, self.outs, self.blocksize, self.quant_type)
        y = torch.ops.hw3.lora_linear(flat, self.weight, self.absmax, self.a, self.b, *rest)[0]
        parts = [part.reshape(*x.shape[:-1], part.shape[-1]) for part in y.split(self.outs, 1)]
        return [part if bias is None else part + bias for part, bias in zip(parts, self.biases, strict=True)]


class LoraLinear(Module):
    """One layer of a group: called first it computes all, the others take what it has left for them.

    Args:
        group: the layers of one input.
        index: which of them this is, in the order in which they are called.
    """

    def __init__(self, group: LoraLinears, index: int) -> None:
        super().__init__()
        self.group, self.index = group, index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the layer it stands for."""
        if self.index == 0:
            self.group.left = self.group(x)
        return self.group.left.pop(0)


def _scales(state) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Float32 scales of the blocks, as each forward of a 4-bit layer makes them (bitsandbytes, dequantize_4bit)."""
    if not state.nested:
        return state.absmax.float()
    return dequantize_blockwise(state.absmax, state.state2).float() + state.offset
