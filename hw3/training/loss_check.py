"""Check that TRL's loss is the loss of a model's own logits, before any weights are loaded."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from hw3.modeling.own_head import apply_own_head, draw_hidden_states, replace_backbone

VOCABULARY_SIZE = 64  # of the small output head that is compared


@torch.no_grad()
def find_loss_problem(config: Any) -> str | None:
    """Return why TRL cannot train a model of this configuration; None if it can.

    TRL 1.16 computes its loss from the output head's weight. It knows the soft-caps and scales of some architectures
    only. So its log-probabilities are compared with those of the model's own forward, behind random hidden states. The
    model has no weights here, except for a small output head.

    Args:
        config: the base model's configuration.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    head = model.get_output_embeddings()
    try:
        small = torch.nn.Linear(head.in_features, VOCABULARY_SIZE, bias=head.bias is not None)
        model.set_output_embeddings(small)
        hidden_states = draw_hidden_states(small)
        labels = torch.arange(len(hidden_states))
        own = apply_own_head(model, hidden_states).log_softmax(-1)[labels[:-1], labels[1:]]
        add_fused_lm_head(model)
        with replace_backbone(model, hidden_states[None]):
            fused = model(input_ids=labels[None], labels=labels[None], fused_lm_head=True).log_probs[0]
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return "has a backbone or an output head of an unknown form; use another architecture"
    if torch.allclose(own, fused, rtol=1e-3, atol=1e-3):
        return None
    return "changes its logits in a way that TRL's loss does not know; use another architecture"
