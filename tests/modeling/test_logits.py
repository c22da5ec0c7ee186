"""The logits that scoring computes are those of the model."""

import pytest
import torch
from transformers import PreTrainedModel

from hw3.common.errors import UserError
from hw3.data.tokenization import EncodedRow
from hw3.modeling.logits import verify_output_head


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
