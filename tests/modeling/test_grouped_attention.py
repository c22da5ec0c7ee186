"""Grouped attention against the architecture's own eager attention."""

import torch
from tiny_models import build_gemma2
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from hw3.modeling.grouped_attention import grouped_attention_forward


@torch.no_grad()
def test_grouped_attention_equals_eager_attention() -> None:
    """Three rows, one of which sees four of nine positions; two query heads per key/value head, and soft-caps."""
    attention = build_gemma2().model.layers[0].self_attn
    settings = {"scaling": 0.2, "softcap": 50.0}
    query, key, value = (torch.randn(3, heads, length, 32) for heads, length in ((4, 1), (2, 9), (2, 9)))
    mask = torch.zeros(3, 1, 1, 9)
    mask[1, ..., :5] = torch.finfo(torch.float32).min
    expected = eager_attention_forward(attention, query, key, value, mask, **settings)[0]
    computed = grouped_attention_forward(attention, query, key, value, mask, **settings)[0]
    assert computed.shape == expected.shape == (3, 1, 4, 32)
    assert attention.num_key_value_groups == 2
    torch.testing.assert_close(computed, expected, rtol=1e-5, atol=1e-6)
    assert (computed[:, :, 0] - expected[:, :, 1]).abs().max() > 0.1  # the heads differ from each other
