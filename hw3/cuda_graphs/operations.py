"""What the operations of fused LoRA layers share: a second stream, and weights that may be in 4 bits."""

from __future__ import annotations

from collections.abc import Callable

import torch

_side_streams: dict[torch.device, torch.cuda.Stream] = {}


def run_concurrently(device: torch.device, small: Callable[[], object], large: Callable[[], object]) -> None:
    """Run two functions, on a GPU the first one on a second stream; the current stream then waits for both."""
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


def dequantize_weight(
    x: torch.Tensor,
    weight: torch.Tensor,
    absmax: torch.Tensor | None,
    out_features: int,
    blocksize: int,
    quant_type: str,
) -> torch.Tensor:
    """Return the weight in the dtype of `x`, shape (out_features, I); as given if it is not in 4 bits."""
    if absmax is None:
        return weight
    shape = [out_features, x.shape[1]]
    return torch.ops.bitsandbytes.dequantize_4bit(weight, absmax, blocksize, quant_type, shape, x.dtype)
