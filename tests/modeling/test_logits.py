"""The logits that scoring computes are those of the model."""

import math

import pytest
import torch
from helpers import compute_row_perplexity
from tiny_models import OTHER_ARCHITECTURES, TRAINING_MODELS, build_other_architecture
from transformers import PreTrainedModel

from hw3.common.errors import UserError
from hw3.data.tokenization import EncodedRow
from hw3.evaluation.perplexity import score_rows
from hw3.modeling.logits import PLAIN_HEADS, compute_logits, verify_output_head
from hw3.modeling.own_head import apply_own_head, draw_hidden_states


def test_verify_output_head_refuses_a_model_that_scales_its_logits(
    mini_model: PreTrainedModel, encoded_rows: list[EncodedRow]
) -> None:
    verify_output_head(mini_model, encoded_rows[0])
    forward = mini_model.forward

    def forward_with_scaled_logits(**inputs: torch.Tensor) -> object:
        outputs = forward(**inputs)
        outputs.logits = outputs.logits * 2
        return outputs

    mini_model.forward = forward_with_scaled_logits
    with pytest.raises(UserError, match="cannot be scored"):
        verify_output_head(mini_model, encoded_rows[0])


def test_verify_output_head_compares_few_positions_of_a_long_row(mini_model: PreTrainedModel) -> None:
    computed = []
    mini_model.lm_head.register_forward_hook(lambda head, inputs, logits: computed.append(logits.shape[-2]))
    verify_output_head(mini_model, EncodedRow("row", [2, *range(5, 30)] * 4, [9, 10, 1], 3))
    assert computed == [64, 64]


ROWS = [
    EncodedRow("long", [2, 5, 6, 7, 8], [9, 10, 11, 12, 1], 4),
    EncodedRow("short", [2, 5, 6, 13], [14, 1], 1),
    EncodedRow("shorter", [2, 5, 6], [1], 0),
]


@pytest.mark.parametrize("name", OTHER_ARCHITECTURES)
def test_score_rows_gives_the_cross_entropy_of_the_model_s_own_logits(name: str) -> None:
    model = build_other_architecture(name)
    verify_output_head(model, ROWS[0])
    scores = score_rows(model, ROWS, tokens_per_batch=64)
    for row, score in zip(ROWS, scores, strict=True):
        assert score.perplexity == pytest.approx(compute_row_perplexity(model, row), rel=1e-4)


@pytest.mark.parametrize("name", TRAINING_MODELS)
@torch.inference_mode()
def test_the_plain_head_gives_the_logits_of_the_model_s_own_forward(name: str) -> None:
    model = TRAINING_MODELS[name]().eval()
    assert model.config.model_type in PLAIN_HEADS
    hidden_states = draw_hidden_states(model.get_output_embeddings())
    assert torch.allclose(compute_logits(model, hidden_states), apply_own_head(model, hidden_states), rtol=1e-5)


@torch.inference_mode()
def test_compute_logits_scales_as_granite_does() -> None:
    model = build_other_architecture("granite")
    hidden_states = draw_hidden_states(model.get_output_embeddings())
    logits = compute_logits(model, hidden_states)
    assert torch.allclose(logits, hidden_states @ model.lm_head.weight.T / 8, rtol=1e-5)
    assert math.isclose(logits.abs().max(), 50 / 8, rel_tol=1e-5)
    assert "forward" not in model.model.__dict__  # the backbone is as before


def test_verify_output_head_refuses_a_model_without_a_backbone(mini_model: PreTrainedModel) -> None:
    mini_model.base_model_prefix = "none"
    with pytest.raises(UserError, match="gemma2 cannot be scored: its backbone is not a model of its own"):
        verify_output_head(mini_model, ROWS[0])
