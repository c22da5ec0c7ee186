"""The Muon optimizer (Jordan 2024)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalized by Newton-Schulz steps (Jordan 2024), all matrices of one shape at once.

    Updates are scaled to the size of AdamW's, 0.2 · sqrt(longer side) (Liu et al. 2025), so both can use the same
    learning rate.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], lr: float, weight_decay: float) -> None:
        groups: dict[tuple[int, ...], list[torch.nn.Parameter]] = {}
        for matrix in matrices:
            groups.setdefault(tuple(matrix.shape), []).append(matrix)
        super().__init__([{"params": group} for group in groups.values()], {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Update all matrices."""
        for group in self.param_groups:
            matrices = group["params"]
            state = self.state[matrices[0]]
            gradient = torch.stack([matrix.grad for matrix in matrices])
            momentum = state.setdefault("momentum", torch.zeros_like(gradient))
            momentum.lerp_(gradient, 0.05)
            update = orthogonalize(gradient.lerp(momentum, 0.95))
            scale = 0.2 * math.sqrt(max(update.shape[-2:])) * group["lr"]
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(matrices, list(update.to(gradient.dtype).unbind()), alpha=-scale)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Take five Newton-Schulz steps towards the nearest orthogonal matrices; (count, rows, columns) in bfloat16."""
    x = matrices.bfloat16()
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.transpose(1, 2)
    for _ in range(5):
        gram = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.transpose(1, 2) if is_tall else x
