"""The decoder: its cache that grows, grouped attention, and the replayed step against one prompt at a time."""

import pytest
import torch
from fake_cuda_graphs import patch_cuda_graphs
from reference_generation import count_new_tokens, generate_batched, generate_one_by_one, without_common_prefix
from tiny_models import build_gemma2
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hw3.data.tokenization import EncodedRow
from hw3.generation.decoder import GrowableCacheLayer, concat_with_capacity

# By architecture and tokens of cache growth: eager steps, captures, replays.
STEP_COUNTS = {
    ("gemma2", 64): (5, 4, 13),
    ("gemma2", 5): (6, 5, 12),
    ("llama", 64): (5, 5, 19),
    ("llama", 5): (8, 5, 16),
}


@pytest.mark.parametrize("growth_tokens", [64, 5])
def test_replayed_steps_equal_one_by_one(
    model: PreTrainedModel,
    rows: list[EncodedRow],
    limits: list[int],
    growth_tokens: int,
    forward_sizes: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After each change of shapes one step runs eagerly and the next is captured; the cache grows and rows leave."""
    monkeypatch.setattr("hw3.generation.decoder.CACHE_GROWTH_TOKENS", growth_tokens)
    monkeypatch.setattr("hw3.generation.decoder.can_capture", lambda model: True)
    graphs = patch_cuda_graphs(monkeypatch)
    expected = generate_one_by_one(model, rows, limits)
    forward_sizes.clear()
    assert generate_batched(model, rows, limits) == expected
    eager_steps, captures, replays = STEP_COUNTS[model.config.model_type, growth_tokens]
    assert (graphs.captures, graphs.replays) == (captures, replays)
    assert eager_steps + replays == max(map(count_new_tokens, expected)) - 1
    assert len(forward_sizes) == 2 + eager_steps + captures  # the common prefix and the prompts come first
    other_rows = without_common_prefix(rows)
    assert generate_batched(model, other_rows, limits) == generate_one_by_one(model, other_rows, limits)


def test_decoder_uses_grouped_attention_for_new_tokens_only(
    rows: list[EncodedRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call per layer and new token; prompts take the architecture's eager attention."""
    model, shapes = build_gemma2(), []
    grouped_attention = ALL_ATTENTION_FUNCTIONS["eager_grouped"]

    def record_shape(
        module: torch.nn.Module, query: torch.Tensor, *rest: torch.Tensor, **settings: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shapes.append(query.shape)
        return grouped_attention(module, query, *rest, **settings)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "eager_grouped", record_shape)
    generations = generate_batched(model, rows, [5] * len(rows))
    steps = max(map(count_new_tokens, generations)) - 1
    assert len(shapes) == 2 * steps and shapes[0] == (24, 2, 1, 32)
    assert model.config._attn_implementation == "eager"


def test_concat_with_capacity_aligns_rows_on_the_right() -> None:
    """Two rows of one token and one row of three, with two numbers per token."""
    short, long = torch.full((2, 1, 1, 2), 5.0), torch.arange(1.0, 7).reshape(1, 1, 3, 2)
    joined = concat_with_capacity([short, long])
    assert joined.shape == (3, 1, 3 + 64, 2)
    assert joined[:, 0, :3].tolist() == [[[0, 0], [0, 0], [5, 5]]] * 2 + [[[1, 2], [3, 4], [5, 6]]]
    assert joined[:, :, 3:].abs().max() == 0


def test_growable_cache_layer_writes_new_tokens_into_its_capacity() -> None:
    states = torch.arange(1.0, 7).reshape(1, 1, 3, 2)
    cache = DynamicLayer()
    cache.update(states, states)
    layer = GrowableCacheLayer([cache])
    length_before = layer.get_seq_length()
    keys, _ = layer.update(states[:, :, :1] + 10, states[:, :, :1])
    assert (int(length_before), int(layer.get_seq_length())) == (3, 4)
    assert keys[0, 0, 2:5].tolist() == [[5, 6], [11, 12], [0, 0]]
