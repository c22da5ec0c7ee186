"""The operation of `FusedLoraLinear` with products in float16, and inputs, outputs and adapters in float32.

As in `hw3.modeling.float16_products`, inputs and gradients are rounded to float16 with a scale, and products are summed
in float32. The custom operations neither round nor scale, so that a compiler fuses this with norms and activations.
"""

from __future__ import annotations

from typing import Any

import torch

from hw3.cuda_graphs.operations import dequantize_weight, run_concurrently
from hw3.modeling.float16_products import round_to_float16

# Powers of two, by which float32 factors are multiplied before they are rounded to float16. Elements of B are about the
# learning rate at first, and too small. x A^T and dy B are sums of products with elements of up to 2**15.
B_SCALE = 2.0**8
INNER_SCALE = 2.0**-11


def _addmm(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: float, beta: float = 1) -> torch.Tensor:
    """Compute beta * out + alpha * a b in place, for float16 factors and a float32 result."""
    if out.device.type == "cuda":
        # No product of float16 matrices that returns float32 has an `addmm_`.
        return torch.addmm(out, a, b, out_dtype=torch.float32, beta=beta, alpha=alpha, out=out)
    return out.addmm_(a.float(), b.float(), beta=beta, alpha=alpha)


def _new_float32(like: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return torch.empty(rows, columns, dtype=torch.float32, device=like.device)


@torch.library.custom_op("hw3::float16_lora_linear", mutates_args=())
def float16_lora_linear(
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
        x: float16, shape (N, I).
        weight: as in `lora_linear`, float16 or 4-bit.
        absmax: as in `lora_linear`.
        a: float16, shape (G * R, I).
        b: B * `B_SCALE` in float16, shape (O, R).
        scaling: as in `lora_linear`, like all further arguments.

    Returns:
        y in float32, shape (N, O), and x A^T * `INNER_SCALE` in float16, shape (N, G * R).
    """
    y, h = _new_float32(x, len(x), len(b)), _new_float32(x, len(x), len(a))
    run_concurrently(
        x.device,
        lambda: _addmm(h, x, a.T, INNER_SCALE, beta=0),
        lambda: _addmm(y, x, dequantize_weight(x, weight, absmax, len(b), blocksize, quant_type).T, 1, beta=0),
    )
    h16, alpha = h.half(), scaling / (INNER_SCALE * B_SCALE)
    groups = zip(y.split(out_features, 1), h16.chunk(len(out_features), 1), b.split(out_features), strict=True)
    for y_i, h_i, b_i in groups:
        _addmm(y_i, h_i, b_i.T, alpha)
    return y, h16


@float16_lora_linear.register_fake
def _(
    x: torch.Tensor, weight: object, absmax: object, a: torch.Tensor, b: torch.Tensor, *settings: object
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape[0], b.shape[0], dtype=torch.float32), x.new_empty(x.shape[0], a.shape[0])


@torch.library.custom_op("hw3::float16_lora_linear_backward", mutates_args=())
def float16_lora_linear_backward(
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
    """Compute the gradients with respect to x, A and B in float32; see `lora_linear_backward`.

    Args:
        dy: float16, shape (N, O).
        x: as in `float16_lora_linear`, like all arguments after `h`.
        h: x A^T * `INNER_SCALE` in float16, shape (N, G * R).
    """
    count, alpha = len(out_features), scaling * INNER_SCALE / B_SCALE
    dx, dh = _new_float32(x, *x.shape), _new_float32(x, *h.shape)
    da, db = _new_float32(x, *a.shape), _new_float32(x, *b.shape)
    dh16 = torch.empty_like(h)

    def compute_adapter_gradients() -> None:
        parts = (dy.split(out_features, 1), h.chunk(count, 1), b.split(out_features), dh.chunk(count, 1))
        for dy_i, h_i, b_i, dh_i, db_i in zip(*parts, db.split(out_features), strict=True):
            _addmm(dh_i, dy_i, b_i, alpha, beta=0)
            _addmm(db_i, dy_i.T, h_i, scaling / INNER_SCALE, beta=0)
        dh16.copy_(dh)
        _addmm(da, dh16.T, x, 1 / INNER_SCALE, beta=0)

    run_concurrently(
        x.device,
        compute_adapter_gradients,
        lambda: _addmm(dx, dy, dequantize_weight(x, weight, absmax, len(b), blocksize, quant_type), 1, beta=0),
    )
    return _addmm(dx, dh16, a, 1 / INNER_SCALE), da, db


@float16_lora_linear_backward.register_fake
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
    dx, da, db = (torch.empty_like(tensor, dtype=torch.float32) for tensor in (x, a, b))
    return dx, da, db


class Float16LoraLinear(torch.autograd.Function):
    """Compute fused LoRA layers of a float32 input, with the arguments of `lora_linear`; `a` and `b` are float32."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        absmax: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        *settings: Any,
    ) -> torch.Tensor:
        """Return y in float32, shape (N, O)."""
        rounded, scale = round_to_float16(x)
        a16, b16 = a.half(), (b * 2.0**8).half()  # `B_SCALE` as a literal, for the reason in `round_to_float16`
        y, h = torch.ops.hw3.float16_lora_linear(rounded, weight, absmax, a16, b16, *settings)
        ctx.settings = settings
        ctx.save_for_backward(rounded, scale, h, weight, absmax, a16, b16)
        return y * scale

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x, A and B in float32."""
        x, x_scale, h, weight, absmax, a, b = ctx.saved_tensors
        rounded, scale = round_to_float16(dy)
        dx, da, db = torch.ops.hw3.float16_lora_linear_backward(rounded, x, h, weight, absmax, a, b, *ctx.settings)
        return dx * scale, None, None, da * (scale * x_scale), db * (scale * x_scale), None, None, None, None
