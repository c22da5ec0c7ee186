"""Attention masks against those that the models build themselves."""

import pytest
import torch
from tiny_models import TRAINING_MODELS

from hw3.modeling.attention_masks import build_attention_masks


@pytest.mark.parametrize("name", TRAINING_MODELS)
def test_build_attention_masks_gives_the_models_own_hidden_states(name: str) -> None:
    torch.manual_seed(0)
    model = TRAINING_MODELS[name]().eval()
    ids, mask = torch.randint(1, 50, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = mask[2, 3:] = 0
    with torch.no_grad():
        expected = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        computed = model.base_model(
            input_ids=ids,
            attention_mask=build_attention_masks(model, mask),
            position_ids=torch.arange(9)[None],
            use_cache=False,
        ).last_hidden_state
    assert torch.allclose(expected[mask.bool()], computed[mask.bool()], atol=1e-6)
