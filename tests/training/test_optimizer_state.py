"""Conversion of AdamW's saved state between PyTorch and bitsandbytes."""

import pytest
import torch

from hw3.training.optimizer_state import convert_optimizer_state


@pytest.mark.parametrize("paged_first", [True, False])
def test_convert_optimizer_state_continues_as_one_optimizer(paged_first: bool) -> None:
    """Four steps by one implementation and four by the other equal eight by either."""
    from bitsandbytes.optim import AdamW

    torch.manual_seed(0)
    gradients = [torch.randn(64, 80) for _ in range(8)]
    implementations = [
        lambda p: AdamW([p], lr=1e-2, weight_decay=0.1, optim_bits=32),
        lambda p: torch.optim.AdamW([p], lr=1e-2, weight_decay=0.1),
    ]

    def take_steps(
        parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer, gradients: list[torch.Tensor]
    ) -> None:
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()

    straight = torch.nn.Parameter(torch.ones(64, 80))
    take_steps(straight, implementations[1](straight), gradients)
    first, second = implementations if paged_first else reversed(implementations)
    changed = torch.nn.Parameter(torch.ones(64, 80))
    optimizer = first(changed)
    take_steps(changed, optimizer, gradients[:4])
    other = second(changed)
    state = optimizer.state_dict()
    assert convert_optimizer_state(optimizer, state) is state
    other.load_state_dict(convert_optimizer_state(other, state))
    take_steps(changed, other, gradients[4:])
    assert torch.allclose(changed, straight, rtol=1e-5, atol=1e-6)
