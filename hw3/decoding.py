"""One token after the other for a batch of rows: keys and values with room for them, on a GPU a captured step.

A token of every row is a thousand small kernels, which a GPU waits for one by one: a batch of a hundred rows takes as
long as one row. As a CUDA graph they are launched at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, StaticLayer

from hw3.captured_step import MASKS_BY_KIND

ROOM = 64  # tokens that keys and values are given room for at a time


class Decoder:
    """Rows that are being answered, their keys and values, and the step that takes all of them one token further.

    What the step reads and writes stays in its place until rows leave or the room is used up. On one GPU, with an
    architecture and an attention that are known to take it, the first step after that runs as it is, and loads what the
    next one needs, which is captured; a step after that is a replay.

    Args:
        model: the causal language model.
        caches: keys and values of the prompts, rows of one after rows of the other; they are emptied.
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
        self._mask, self._positions, self._tokens = self._mask[rows], self._positions[rows], self._tokens[rows]
        for layer in self._cache.layers:
            layer.batch_select_indices(rows.to(layer.keys.device))  # layers may be spread over GPUs

    def _changed(self) -> None:
        # The graph's memory goes with it.
        self._graph = self._hidden = None

    def _run(self) -> torch.Tensor:
        return run(self._model, self._tokens, self._mask, self._positions, self._cache)


def run(
    model: PreTrainedModel, input_ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Cache
) -> torch.Tensor:
    """The last hidden state of each row, shape (B, H); `mask` is of all places, the cached ones included."""
    return model.base_model(
        input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    ).last_hidden_state[:, -1]


def can_capture(model: PreTrainedModel) -> bool:
    """Whether a step of this model can be a CUDA graph: on one GPU, and nothing in it looks at values."""
    config = model.config.get_text_config()
    devices = {parameter.device for parameter in model.parameters()}
    known = config.model_type in MASKS_BY_KIND and config._attn_implementation in ("eager", "sdpa")
    return known and len(devices) == 1 and model.device.type == "cuda"


class RoomyLayer(StaticLayer):
    """A layer's keys and values, with room for the next tokens, that makes more when asked to.

    Args:
        parts: what it begins with, rows of one after rows of the other.
    """

    def __init__(self, parts: Sequence[DynamicLayer]) -> None:
        super().__init__(0)
        self.dtype, self.device = parts[0].dtype, parts[0].device
        self.cumulative_length = torch.tensor(parts[0].get_seq_length(), device=self.device)
        self._hold([part.keys for part in parts], [part.values for part in parts])
        self.is_initialized = True

    def make_room(self) -> None:
        """For `ROOM` more tokens."""
        self._hold([self.keys], [self.values])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.keys, self.values = self.keys[indices], self.values[indices]

    def _hold(self, keys: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        self.keys, self.values = with_room(keys), with_room(values)
        self.max_cache_len = self.keys.shape[-2]


def with_room(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Parts of shape (B, H, L, D) one after the other, zeros behind them: shape (sum of B, H, L + ROOM, D)."""
    _, heads, length, size = parts[0].shape
    room = parts[0].new_empty((sum(map(len, parts)), heads, length + ROOM, size))
    room[..., length:, :] = 0  # masked, but 0 times what is not a number is not 0
    for rows, part in zip(room[..., :length, :].split([len(part) for part in parts]), parts, strict=True):
        rows.copy_(part)
    return room
