"""Tests of the compiled output head."""

from __future__ import annotations

import torch

from hw3.cuda_graphs.output_head import compile_output_head, output_head_loss_and_grad


def test_head_is_compiled_once_for_all_numbers_of_positions() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 32, generator=generator)
    head = compile_output_head(weight, torch.float32, 30.0)
    with torch.compiler.set_stance("fail_on_recompile"), torch.no_grad():
        for positions in (64, 128, 512):
            states = torch.randn(positions, 32, generator=generator)
            targets = torch.randint(-1, 300, (positions,), generator=generator)
            tokens = torch.tensor(float(positions))
            found, expected = (f(states, weight, targets, tokens, 30.0) for f in (head, output_head_loss_and_grad))
            torch.testing.assert_close(found, expected)
