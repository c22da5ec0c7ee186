"""Run the part of a model's own forward that lies behind its backbone, on given hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

TEST_LOGIT = 50.0  # every known soft-cap and scale changes a logit of this size


class _BackboneOutput(BaseModelOutputWithPast):
    """The output of any backbone: hidden states, and None for everything else."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


@contextmanager
def replace_backbone(model: PreTrainedModel, hidden_states: torch.Tensor) -> Iterator[None]:
    """Make the model's backbone return the given hidden states inside the block, whatever its input is.

    Args:
        model: the causal language model.
        hidden_states: shape (B, L, D).
    """
    backbone = model.get_decoder()
    own_forward = backbone.__dict__.get("forward")  # of accelerate, if the model is spread over devices
    backbone.forward = lambda *args, **kwargs: _BackboneOutput(last_hidden_state=hidden_states)
    try:
        yield
    finally:
        del backbone.forward
        if own_forward is not None:
            backbone.forward = own_forward


def apply_own_head(model: PreTrainedModel, hidden_states: torch.Tensor) -> torch.Tensor:
    """Return the logits that the model's own forward computes from hidden states.

    Args:
        model: the causal language model, without adapter wrapping.
        hidden_states: the backbone's last hidden states, shape (N, D).

    Returns:
        float32, shape (N, V).
    """
    input_ids = torch.zeros(1, len(hidden_states), dtype=torch.long, device=hidden_states.device)
    with replace_backbone(model, hidden_states[None]):
        return model(input_ids=input_ids, use_cache=False).logits[0].float()


def draw_hidden_states(head: torch.nn.Module, count: int = 8) -> torch.Tensor:
    """Return random hidden states of shape (N, D) whose logits reach `TEST_LOGIT`.

    Args:
        head: the output head.
        count: number of hidden states N.
    """
    weight: Any = head.weight  # of a layer, or of PEFT's wrapper around it
    hidden_states = torch.randn(count, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    return hidden_states * (TEST_LOGIT / head(hidden_states).abs().max())
