"""One token after the other for a batch of rows: keys and values with room for them, on a GPU a captured step.

A token of every row is a thousand small kernels, which a GPU waits for one by one: a batch of a hundred rows takes as
long as one row. As a CUDA graph they are launched at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.masking_utils import eager_mask

from hw3.modeling.attention_masks import MASKS_BY_KIND

ROOM = 64  # tokens that keys and values are given room for at a time
GROUPED = "eager_grouped"


class Decoder:
    """Rows that are being answered, their keys and values, and the step that takes all of them one token further.

    What the step reads and writes stays in its place until rows leave or the room is used up. On one GPU, with an
    architecture and an attention that are known to take it, the first step after that runs as it is, and loads what the
    next one needs, which is captured; a step after that is a replay.

    Args:
        model: the causal language model.
        caches: keys and values of the prompts, rows of one after rows of the other; they are emptied. One may leave out
            what is padding for all of its rows.
        mask: of the prompts, shape (B, L); 0 is padding, on the left.
    """

    def __init__(self, model: PreTrainedModel, caches: Sequence[Cache], mask: torch.Tensor) -> None:
        self._model = model
        self._cache = Cache(layers=[])
        for number in range(len(caches[0].layers)):
            self._cache.layers.append(RoomyLayer([cache.layers[number] for cache in caches]))
            for cache in caches:
                cache.layers[number] = DynamicLayer()  # so that no more than one layer is there twice
        self._length = mask.shape[1]
        self._mask = pad(mask, (0, ROOM))
        self._positions = mask.sum(-1, keepdim=True) - 1
        self._tokens = torch.zeros_like(self._positions)
        self._captures = can_capture(model)
        self._hidden: torch.Tensor | None = None  # of the last step, if it had the shape of the next
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def least_leaving(self) -> float:
        """The share of a batch that must have ended to leave it: all that is kept is copied, and captured again."""
        return 1 / 2 if self._captures else 1 / 8

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append a token to every row; returns their last hidden states, shape (B, H), to be used before the next step.

        Args:
            tokens: shape (B, 1).
        """
        if self._length == self._mask.shape[1]:
            self._changed()
            self._mask = pad(self._mask, (0, ROOM))
            for layer in self._cache.layers:
                layer.make_room()
        self._mask[:, self._length] = 1
        self._length += 1
        self._positions += 1
        self._tokens.copy_(tokens)
        if self._captures and self._graph is None and self._hidden is not None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._hidden = self._run()
            self._graph = graph
        if self._graph is not None:
            self._graph.replay()
        else:
            self._hidden = self._run()
        return self._hidden

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with some of the rows.

        Args:
            rows: shape (B,), true where a row stays.
        """
        self._changed()
        numbers = rows.nonzero().squeeze(1)
        self._mask, self._positions, self._tokens = self._mask[numbers], self._positions[numbers], self._tokens[numbers]
        for layer in self._cache.layers:
            layer.batch_select_indices(numbers.to(layer.keys.device))  # layers may be spread over GPUs

    def _changed(self) -> None:
        # The graph's memory goes with it.
        self._graph = self._hidden = None

    def _run(self) -> torch.Tensor:
        with _grouped(self._model):
            return run(self._model, self._tokens, self._mask, self._positions, self._cache)


def run(
    model: PreTrainedModel, input_ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Cache
) -> torch.Tensor:
    """The last hidden state of each row, shape (B, H); `mask` is of all places, the cached ones included."""
    return model.base_model(
        input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    ).last_hidden_state[:, -1]


def can_capture(model: PreTrainedModel) -> bool:
    """Whether a step of this model can be a CUDA graph: on one GPU, and nothing in it looks at values.

    A rope that grows with the positions does, and so do some adapters that are not LoRA.
    """
    config = model.config.get_text_config()
    known = config.model_type in MASKS_BY_KIND and config._attn_implementation in ("eager", "sdpa")
    rope = getattr(config, "rope_parameters", None) or {}
    adapters = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    plain = rope.get("rope_type") != "dynamic" and all(isinstance(module, LoraLayer) for module in adapters)
    devices = {parameter.device for parameter in model.parameters()}
    return known and plain and len(devices) == 1 and devices.pop().type == "cuda"


def grouped_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    **settings: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """An architecture's eager attention of one new token a row, without copies of keys and values for each head.

    The heads of a group become positions of one head, as transformers does it for sdpa (`pack_gqa`).

    Args:
        module: the attention layer.
        query: shape (B, H, 1, D).
        key: shape (B, K, L, D), each for H / K heads.
        value: likewise.
        attention_mask: shape (B, 1, 1, L), added to the scores.
        settings: for the architecture's own function.

    Returns:
        shape (B, 1, H, D), and the weights, shape (B, K, H / K, L).
    """
    rows, heads, _, size = query.shape
    groups, module.num_key_value_groups = module.num_key_value_groups, 1
    try:
        eager = sys.modules[type(module).__module__].eager_attention_forward
        packed = query.reshape(rows, heads // groups, groups, size)
        output, weights = eager(module, packed, key, value, attention_mask, **settings)
    finally:
        module.num_key_value_groups = groups
    return output.transpose(1, 2).reshape(rows, 1, heads, size), weights


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, eager_mask)


@contextmanager
def _grouped(model: PreTrainedModel) -> Iterator[None]:
    """Eager attention as `grouped_attention` does it."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    if before == "eager" and config.model_type in MASKS_BY_KIND:
        config._attn_implementation = GROUPED
    try:
        yield
    finally:
        config._attn_implementation = before


class RoomyLayer(StaticLayer):
    """A layer's keys and values, with room for the next tokens, that makes more when asked to.

    Args:
        parts: what it begins with, rows of one after rows of the other; they end at the same token.
    """

    def __init__(self, parts: Sequence[DynamicLayer]) -> None:
        super().__init__(0)
        self.dtype, self.device = parts[0].dtype, parts[0].device
        length = max(part.get_seq_length() for part in parts)
        self.cumulative_length = torch.tensor(length, device=self.device)
        self._hold([part.keys for part in parts], [part.values for part in parts])
        self.is_initialized = True

    def get_seq_length(self) -> torch.Tensor:
        """Not the tensor that `update` adds to: a mask that is worked out later (flex) would see the sum."""
        return self.cumulative_length.clone()

    def make_room(self) -> None:
        """For `ROOM` more tokens."""
        self._hold([self.keys], [self.values])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.keys, self.values = self.keys[indices], self.values[indices]

    def _hold(self, keys: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        self.keys, self.values = with_room(keys), with_room(values)
        self.max_cache_len = self.keys.shape[-2]


def with_room(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Parts of shape (B, H, L, D), one after the other in rows, each up to where room for new tokens begins.

    Returns:
        Shape (sum of B, H, the longest L + ROOM, D). Masked places are zeros: 0 times what is not a number is not 0.
    """
    heads, size = parts[0].shape[1], parts[0].shape[3]
    length = max(part.shape[2] for part in parts)
    room = parts[0].new_zeros((sum(map(len, parts)), heads, length + ROOM, size))
    for rows, part in zip(room.split([len(part) for part in parts]), parts, strict=True):
        rows[:, :, length - part.shape[2] : length].copy_(part)
    return room
