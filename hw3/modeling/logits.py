"""Logits from a model's last hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from hw3.common.errors import UserError
from hw3.data.tokenization import EncodedRow

HEAD_POSITIONS = 512  # output positions whose logits are alive at once: half a GiB of float32 for Gemma's vocabulary


def output_logits(model: PreTrainedModel, hidden_states: torch.Tensor) -> torch.Tensor:
    """Logits of chosen hidden states, float32 before the soft-cap (Gemma-2, arXiv:2408.00118, section 2).

    Args:
        model: the causal language model, without adapter wrapping.
        hidden_states: the backbone's last hidden states, shape (N, D).

    Returns:
        float32, shape (N, V).
    """
    logits = model.get_output_embeddings()(hidden_states).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    # In place: each copy is a gigabyte with Gemma's vocabulary.
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


@torch.inference_mode()
def check_head(model: PreTrainedModel, row: EncodedRow) -> None:
    """Compare `output_logits` with the model's own on one row; other architectures may scale logits in other ways.

    Raises:
        UserError: the two differ by more than rounding.
    """
    ids = torch.tensor([row.input_ids], device=model.device)
    own = model(input_ids=ids, use_cache=False).logits[0].float()
    ours = output_logits(model, model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0])
    tolerance = 1e-3 if own.dtype == model.dtype else 0.05
    if not torch.allclose(own, ours, rtol=tolerance, atol=tolerance * float(own.abs().max())):
        raise UserError(
            f"{model.config.model_type}: its logits are not those of its last hidden states; this architecture cannot "
            "be scored yet"
        )


@contextmanager
def adapters_in_tf32(model: PreTrainedModel) -> Iterator[None]:
    """Beside a bfloat16 base, float32 adapters may use TF32, whose mantissa is still 3 bits longer: half the time."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = before or model.dtype == torch.bfloat16
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
