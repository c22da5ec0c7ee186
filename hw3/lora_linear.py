"""A linear layer and its LoRA adapter as one operation, for the captured step.

y = x W^T + s (x A^T) B^T (LoRA, arXiv:2106.09685, section 4.1). Left to itself a compiler writes the adapter's share
out, adds it in a kernel of its own, and keeps both for the backward. Here it is added by the matrix product itself, and
the products with A and B, too small to fill a GPU, run beside those with W.
"""

from __future__ import annotations

import torch
from peft.tuners.lora.layer import Linear as PeftLinear

_side_streams: dict[torch.device, torch.cuda.Stream] = {}


class _Beside:
    """Work on a second stream, beside what the current one does meanwhile; joined at the end."""

    def __init__(self, device: torch.device) -> None:
        self._current = torch.cuda.current_stream(device)
        if device not in _side_streams:
            _side_streams[device] = torch.cuda.Stream(device)
        self._side = _side_streams[device]
        self._work = torch.cuda.stream(self._side)

    def __enter__(self) -> None:
        self._side.wait_stream(self._current)
        self._work.__enter__()

    def __exit__(self, *error: object) -> None:
        self._work.__exit__(*error)

    def join(self) -> None:
        """Let the current stream wait for the work."""
        self._current.wait_stream(self._side)


@torch.library.custom_op("hw3::lora_linear", mutates_args=())
def lora_linear(
    x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's output and, for the backward, x A^T.

    Args:
        x: shape (N, I).
        weight: of the frozen layer, shape (O, I).
        a: shape (R, I).
        b: shape (O, R).
        scaling: the factor s.

    Returns:
        y of shape (N, O) and x A^T of shape (N, R), in the dtype of `x`.
    """
    y, h = x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], a.shape[0])
    if x.is_cuda:
        beside = _Beside(x.device)
        with beside:
            torch.mm(x, a.T, out=h)
        torch.mm(x, weight.T, out=y)
        beside.join()
    else:
        torch.mm(x, a.T, out=h)
        torch.mm(x, weight.T, out=y)
    return y.addmm_(h, b.T, alpha=scaling), h


@lora_linear.register_fake
def _(x, weight, a, b, scaling):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], a.shape[0])


@torch.library.custom_op("hw3::lora_linear_backward", mutates_args=())
def lora_linear_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients by x, A and B: dy W + dh A, dh^T x and s dy^T h, with dh = s dy B.

    Args:
        dy: gradient by y, shape (N, O).
        h: x A^T, shape (N, R).
        others: as in `lora_linear`.
    """
    dx, dh, da, db = torch.empty_like(x), torch.empty_like(h), torch.empty_like(a), torch.empty_like(b)
    if x.is_cuda:
        beside = _Beside(x.device)
        with beside:
            torch.addmm(dh, dy, b, beta=0, alpha=scaling, out=dh)
            torch.mm(dh.T, x, out=da)
            torch.addmm(db, dy.T, h, beta=0, alpha=scaling, out=db)
        torch.mm(dy, weight, out=dx)
        beside.join()
    else:
        torch.addmm(dh, dy, b, beta=0, alpha=scaling, out=dh)
        torch.mm(dh.T, x, out=da)
        torch.addmm(db, dy.T, h, beta=0, alpha=scaling, out=db)
        torch.mm(dy, weight, out=dx)
    return dx.addmm_(dh, a), da, db


@lora_linear_backward.register_fake
def _(dy, x, h, weight, a, b, scaling):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(a), torch.empty_like(b)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, a, b, ctx.scaling = inputs
    ctx.save_for_backward(x, output[1], weight, a, b)


def _backward(ctx, dy, dh_unused):  # type: ignore[no-untyped-def]
    x, h, weight, a, b = ctx.saved_tensors
    dx, da, db = torch.ops.hw3.lora_linear_backward(dy.contiguous(), x, h, weight, a, b, ctx.scaling)
    return dx, None, da, db, None


lora_linear.register_autograd(_backward, setup_context=_keep)


class LoraLinear(torch.nn.Module):
    """PEFT's LoRA layer with one adapter, as one operation in the dtype of its frozen weight.

    Args:
        layer: what it takes the place of; weights are shared.
    """

    def __init__(self, layer: PeftLinear) -> None:
        super().__init__()
        (name,) = layer.active_adapters
        self.weight = layer.base_layer.weight
        self.bias = layer.base_layer.bias
        self.a, self.b = layer.lora_A[name].weight, layer.lora_B[name].weight
        self.scaling = float(layer.scaling[name])

    @staticmethod
    def can_replace(layer: PeftLinear) -> bool:
        """Whether the layer is a plain linear one with one plain adapter: no dropout, bias or variant of LoRA."""
        if len(layer.active_adapters) != 1 or type(layer.base_layer) is not torch.nn.Linear:
            return False
        (name,) = layer.active_adapters
        return (
            isinstance(layer.lora_dropout[name], torch.nn.Identity)
            and name not in layer.lora_variant
            and layer.lora_B[name].bias is None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the layer it stands for, any leading dimensions."""
        flat = x.to(self.weight.dtype).reshape(-1, x.shape[-1])
        y = torch.ops.hw3.lora_linear(flat, self.weight, self.a, self.b, self.scaling)[0]
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        return y if self.bias is None else y + self.bias
