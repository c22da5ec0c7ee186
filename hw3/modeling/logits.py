"""Compute logits from a model's last hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from hw3.common.errors import UserError
from hw3.data.tokenization import EncodedRow

# Output positions whose logits are in memory at once: half a GiB of float32 with Gemma's vocabulary.
LOGITS_CHUNK_POSITIONS = 512


def compute_logits(model: PreTrainedModel, hidden_states: torch.Tensor) -> torch.Tensor:
    """Compute the logits of hidden states, in float32 before the soft-cap (Gemma-2, arXiv:2408.00118, section 2).

    Args:
        model: the causal language model, without adapter wrapping.
        hidden_states: the backbone's last hidden states, shape (N, D).

    Returns:
        float32, shape (N, V).
    """
    logits = model.get_output_embeddings()(hidden_states).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    # In place, since a copy takes a gigabyte with Gemma's vocabulary.
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


@torch.inference_mode()
def verify_output_head(model: PreTrainedModel, row: EncodedRow) -> None:
    """Compare `compute_logits` with the model's own logits on one row. Some architectures scale logits in other ways.

    Raises:
        UserError: the two differ by more than rounding.
    """
    ids = torch.tensor([row.input_ids], device=model.device)
    expected = model(input_ids=ids, use_cache=False).logits[0].float()
    computed = compute_logits(model, model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0])
    tolerance = 1e-3 if expected.dtype == model.dtype else 0.05
    if not torch.allclose(expected, computed, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
        raise UserError(
            f"model: {model.config.model_type} cannot be scored: its logits differ from its output head "
            "applied to its last hidden states; use another architecture"
        )


@contextmanager
def allow_tf32_for_adapters(model: PreTrainedModel) -> Iterator[None]:
    """Allow TF32 inside the block if the base is bfloat16, which halves the time of the float32 adapters.

    The mantissa of TF32 has 3 bits more than that of bfloat16.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = before or model.dtype == torch.bfloat16
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
