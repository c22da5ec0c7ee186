"""Compute logits from a model's last hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from hw3.common.errors import UserError
from hw3.data.tokenization import EncodedRow
from hw3.modeling.own_head import apply_own_head, draw_hidden_states

# Output positions whose logits are in memory at once: half a GiB of float32 with Gemma's vocabulary.
LOGITS_CHUNK_POSITIONS = 512
# Positions at which `verify_output_head` compares logits. All of a long row would take gigabytes.
COMPARED_POSITIONS = 64


def compute_logits(model: PreTrainedModel, hidden_states: torch.Tensor) -> torch.Tensor:
    """Compute the logits of hidden states.

    Most models apply their output head, and Gemma-2 a soft-cap (arXiv:2408.00118, section 2), here in float32. Others
    scale their logits in ways of their own. For them the model's own code is run.

    Args:
        model: the causal language model, without adapter wrapping.
        hidden_states: the backbone's last hidden states, shape (N, D).

    Returns:
        float32, shape (N, V).
    """
    return _apply_plain_head(model, hidden_states) if _has_plain_head(model) else apply_own_head(model, hidden_states)


def _apply_plain_head(model: PreTrainedModel, hidden_states: torch.Tensor) -> torch.Tensor:
    logits = model.get_output_embeddings()(hidden_states).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    # In place, since a copy takes a gigabyte with Gemma's vocabulary.
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


# Architectures whose logits are known to be those of `_apply_plain_head`.
PLAIN_HEADS = frozenset({"gemma2", "llama", "qwen3"})
_has_plain_head_by_model: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


@torch.inference_mode()
def _has_plain_head(model: PreTrainedModel) -> bool:
    """Return whether the model's own logits are those of `_apply_plain_head`; compared once for each model."""
    if model.config.model_type in PLAIN_HEADS:
        return True
    if model not in _has_plain_head_by_model:
        hidden_states = draw_hidden_states(model.get_output_embeddings())
        own, plain = apply_own_head(model, hidden_states), _apply_plain_head(model, hidden_states)
        _has_plain_head_by_model[model] = bool(plain.isfinite().all()) and _agree(model, own, plain)
    return _has_plain_head_by_model[model]


@torch.inference_mode()
def verify_output_head(model: PreTrainedModel, row: EncodedRow) -> None:
    """Compare `compute_logits` with the model's own logits at the first positions of one row.

    Raises:
        UserError: the two differ by more than rounding, or the model has no backbone of its own.
    """
    if model.base_model is model or model.get_decoder() is model:
        raise UserError(f"model: {model.config.model_type} cannot be scored: its backbone is not a model of its own")
    ids = torch.tensor([row.input_ids[:COMPARED_POSITIONS]], device=model.device)
    expected = model(input_ids=ids, use_cache=False).logits[0].float()
    computed = compute_logits(model, model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0])
    if not _agree(model, expected, computed):
        raise UserError(
            f"model: {model.config.model_type} cannot be scored: its logits differ from its output head "
            "applied to its last hidden states; use another architecture"
        )


@torch.inference_mode()
def verify_adapter_logits(model: PreTrainedModel, peft_model: PeftModel) -> None:
    """Compare `compute_logits` on a padded batch with PEFT's logits of its rows, computed one by one.

    Adapters that work outside of the base's layers, or mix a row with its padding, are recognized by this.

    Args:
        model: the base model, with the adapter's layers.
        peft_model: the PEFT model around it.

    Raises:
        ValueError: the two differ by more than rounding, or are not finite.
    """
    ids = torch.arange(16, device=model.device) % model.config.get_text_config().vocab_size
    batch, lengths = torch.stack([ids, ids.flip(0)]), torch.tensor([16, 7], device=model.device)
    mask = (torch.arange(16, device=model.device) < lengths[:, None]).long()
    hidden_states = model.base_model(input_ids=batch, attention_mask=mask, use_cache=False).last_hidden_state
    for row, states, length in zip(batch, hidden_states, lengths.tolist(), strict=True):
        expected = peft_model(input_ids=row[None, :length], use_cache=False).logits[0].float()
        if not expected.isfinite().all():
            raise ValueError("its logits are NaN or infinite")
        if not _agree(model, expected, compute_logits(model, states[:length])):
            raise ValueError("the logits of a row depend on more than the base's layers and the row's tokens")


def _agree(model: PreTrainedModel, expected: torch.Tensor, computed: torch.Tensor) -> bool:
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.05
    return torch.allclose(expected, computed, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


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
