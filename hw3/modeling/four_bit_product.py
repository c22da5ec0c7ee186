"""Check that bitsandbytes' 4-bit layers work on a device. Some systems and GPUs lack the kernels."""

from __future__ import annotations

import torch

from hw3.common.errors import first_line


def find_4bit_problem(device: torch.device) -> str | None:
    """Multiply a matrix in 4 bits, as the layers of a quantized model do; return a message if this fails."""
    try:
        from bitsandbytes.nn import Linear4bit

        with torch.random.fork_rng(devices=[]):  # the layer draws weights
            layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        if not torch.isfinite(layer.to(device)(torch.ones(2, 64, device=device))).all():
            raise ValueError("the result is not finite")
    except torch.OutOfMemoryError:
        return None  # the layers may work; the command that needs the memory reports that there is none
    except Exception as error:  # a broken library or driver raises errors of any class
        return (
            f"4-bit layers of bitsandbytes do not work on this machine ({device.type}): {type(error).__name__}: "
            f'{first_line(error)}; to train without them, which needs more memory, use SET="quantization=null"'
        )
    return None
