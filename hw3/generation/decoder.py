"""Decode a batch of rows token by token, with a key/value cache that has capacity for the next tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import (
    CacheLayerMixin,
    DummyLayer,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
    StaticLayer,
)

from hw3.modeling.cache_argument import CACHE_ARGUMENT
from hw3.modeling.grouped_attention import use_grouped_attention

try:
    from hw3.cuda_graphs.decoding_step import ReplayedStep, can_capture
except ImportError:  # the package is optional; every step then runs eagerly
    ReplayedStep = can_capture = None  # type: ignore[assignment, misc]  # for both, None marks the missing package

CacheLayer = CacheLayerMixin | LinearAttentionCacheLayerMixin | DummyLayer  # as in `Cache.layers`

CACHE_GROWTH_TOKENS = 64  # capacity that the cache gains when it is full


class Decoder:
    """A batch of rows with its key/value cache, and the step that appends one token to every row.

    All tensors that a step reads and writes stay in place until rows are removed or the cache is full. In between, the
    step is captured as a CUDA graph and replayed if `can_capture` allows it.

    Args:
        model: the causal language model.
        caches: keys and values of the prompts, in the order of the rows. They are emptied. A cache may leave out
            positions that are padding in all of its rows.
        attention_mask: mask of the prompts, shape (B, L); 0 is padding, on the left.
    """

    def __init__(self, model: PreTrainedModel, caches: Sequence[Cache], attention_mask: torch.Tensor) -> None:
        self._model = model
        self._layers: list[GrowableCacheLayer] = []
        for index in range(len(caches[0].layers)):
            self._layers.append(GrowableCacheLayer([cache.layers[index] for cache in caches]))
            for cache in caches:
                cache.layers[index] = DynamicLayer()  # frees it: only one layer at a time is in memory twice
        self._cache = Cache(layers=[*self._layers])
        self._length = attention_mask.shape[1]
        self._mask = pad(attention_mask, (0, CACHE_GROWTH_TOKENS))
        self._positions = attention_mask.sum(-1, keepdim=True) - 1
        self._tokens = torch.zeros_like(self._positions)
        self._replayed_step = ReplayedStep() if ReplayedStep is not None and can_capture(model) else None

    @property
    def min_finished_fraction(self) -> float:
        """Fraction of the batch that must be finished before `keep` pays: it copies the cache and drops the graph."""
        return 1 / 2 if self._replayed_step is not None else 1 / 8

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append a token to every row.

        Args:
            tokens: shape (B, 1).

        Returns:
            The last hidden states, shape (B, D). The next step may overwrite them.
        """
        if self._length == self._mask.shape[1]:
            self._drop_graph()
            self._mask = pad(self._mask, (0, CACHE_GROWTH_TOKENS))
            for layer in self._layers:
                layer.grow()
        self._mask[:, self._length] = 1
        self._length += 1
        self._positions += 1
        self._tokens.copy_(tokens)
        return self._run_step() if self._replayed_step is None else self._replayed_step(self._run_step)

    def keep(self, is_kept: torch.Tensor) -> None:
        """Remove the other rows from the batch.

        Args:
            is_kept: shape (B,), true for the rows that stay.
        """
        self._drop_graph()
        indices = is_kept.nonzero().squeeze(1)
        self._mask, self._positions, self._tokens = self._mask[indices], self._positions[indices], self._tokens[indices]
        for layer in self._layers:
            layer.batch_select_indices(indices.to(layer.keys.device))  # layers may be spread over GPUs

    def _drop_graph(self) -> None:
        if self._replayed_step is not None:
            self._replayed_step.reset()

    def _run_step(self) -> torch.Tensor:
        with use_grouped_attention(self._model):
            return compute_last_hidden(self._model, self._tokens, self._mask, self._positions, self._cache)


def compute_last_hidden(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor,
    cache: Cache,
) -> torch.Tensor:
    """Run the backbone and return each row's last hidden state, shape (B, D).

    Args:
        model: the causal language model.
        input_ids: shape (B, L).
        attention_mask: shape (B, C + L), over the C cached positions and the new ones.
        position_ids: shape (B, L).
        cache: keys and values of the C positions before; those of the new ones are added.
    """
    return model.base_model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=True,
        **{CACHE_ARGUMENT: cache},
    ).last_hidden_state[:, -1]


def keys_and_values(layer: CacheLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an attention layer's keys and values, shape (B, H, L, D) each; it must have been updated before."""
    assert isinstance(layer, CacheLayerMixin) and layer.keys is not None and layer.values is not None
    return layer.keys, layer.values


class GrowableCacheLayer(StaticLayer):
    """One layer's keys and values with capacity for more tokens, which grows on request.

    Args:
        parts: the initial keys and values, in the order of the rows. All parts end at the same token.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, parts: Sequence[CacheLayer]) -> None:
        super().__init__(0)
        keys, values = map(list, zip(*map(keys_and_values, parts), strict=True))
        self.device = keys[0].device
        length = max(part.shape[-2] for part in keys)
        self.cumulative_length = torch.tensor(length, device=self.device)
        self._store(keys, values)
        self.is_initialized = True

    # Transformers annotates `int`, but its own static layers return a tensor too.
    def get_seq_length(self) -> torch.Tensor:  # type: ignore[override]
        """Return a copy of the length: `update` adds in place, which a mask evaluated later (flex) would see."""
        return self.cumulative_length.clone()

    def grow(self) -> None:
        """Add capacity for `CACHE_GROWTH_TOKENS` more tokens."""
        self._store([self.keys], [self.values])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows with these indices."""
        self.keys, self.values = self.keys[indices], self.values[indices]

    def _store(self, keys: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        self.keys, self.values = concat_with_capacity(keys), concat_with_capacity(values)
        self.max_cache_len = self.keys.shape[-2]


def concat_with_capacity(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate tensors along the rows, aligned on the right, with empty capacity for new tokens behind them.

    Args:
        parts: tensors of shape (B, H, L, D); B and L may differ.

    Returns:
        Shape (sum of B, H, largest L + CACHE_GROWTH_TOKENS, D). Positions without a token are zeros, since the product
        of a zero attention weight and NaN would be NaN.
    """
    heads, size = parts[0].shape[1], parts[0].shape[3]
    length = max(part.shape[2] for part in parts)
    joined = parts[0].new_zeros((sum(map(len, parts)), heads, length + CACHE_GROWTH_TOKENS, size))
    for rows, part in zip(joined.split([len(part) for part in parts]), parts, strict=True):
        rows[:, :, length - part.shape[2] : length].copy_(part)
    return joined
