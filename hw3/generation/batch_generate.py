"""Generate outputs for a list of prompts in batches. In float32 they equal those of one prompt at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from hw3.config.schema import GenerationSection
from hw3.data.batching import batch_by_length, common_prefix_length
from hw3.data.tokenization import EncodedRow
from hw3.generation.batch_memory import estimate_prefill_bytes, estimate_row_bytes, get_batch_bytes
from hw3.generation.decoder import Decoder, compute_last_hidden, keys_and_values
from hw3.modeling.cache_argument import CACHE_ARGUMENT
from hw3.modeling.logits import allow_tf32_for_adapters, compute_logits

PREFILL_MEMORY_DIVISOR = 4  # a quarter of a batch's memory is reserved for the activations of the prefill


@dataclass(frozen=True, slots=True)
class Generation:
    """The generated continuation of one prompt.

    Attributes:
        token_ids: the new token ids, without the stop token.
        finished: whether the model generated a stop token; otherwise the output was cut at its limit.
    """

    token_ids: list[int]
    finished: bool


def get_stop_token_ids(model: PreTrainedModel, eos_token_id: int) -> list[int]:
    """Return the ids that end an output: the tokenizer's EOS first, then those of the base's generation config."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [] if own is None else [own]
    return list(dict.fromkeys([eos_token_id, *own]))


def build_generation_config(section: GenerationSection, stop_token_ids: Sequence[int]) -> GenerationConfig:
    """Return the recipe's `generation` section as a `GenerationConfig`, with no defaults from the base model."""
    values = section.model_dump(exclude_none=True, exclude={"max_new_tokens"})
    return GenerationConfig(**values, eos_token_id=list(stop_token_ids), pad_token_id=stop_token_ids[0], use_cache=True)


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    rows: Sequence[EncodedRow],
    *,
    max_new_tokens: Sequence[int],
    generation_config: GenerationConfig,
    on_generation: Callable[[int, Generation], None],
    batch_bytes: int | None = None,
) -> None:
    """Generate an output for every prompt.

    - Rows are sorted by length and padded on the left. The tokens that all prompts begin with are computed once.
    - A prompt needs more memory than its output. Except in beam search, the prompts of a batch are therefore computed
      in several parts, and the batch has as many rows as fit into memory while they are decoded.
    - Without beam search and logits processors, finished rows are removed from their batch from time to time, so that
      one long output does not delay the next batches.

    Args:
        model: the causal language model in evaluation mode; adapters, if any, are injected into it.
        rows: encoded rows; their outputs are ignored.
        max_new_tokens: limit of each row, EOS included.
        generation_config: how to generate; `eos_token_id` must be a list.
        on_generation: called with a row's index and its output as soon as the row is finished, in any order.
        batch_bytes: memory that a batch may take; None derives it from the free memory.
    """
    # `generate` would fill unset values from the base model's own config (sampling, penalties).
    model.generation_config = GenerationConfig()
    prompts = [row.prompt_ids for row in rows]
    with allow_tf32_for_adapters(model):
        prefix = _prefill_common_prefix(model, rows) if len(rows) > 1 else None
        prefix_length = prefix.get_seq_length() if prefix is not None else 0
        batch_bytes = batch_bytes or get_batch_bytes(model)
        prefill_bytes = batch_bytes // PREFILL_MEMORY_DIVISOR
        row_prefill_bytes = [estimate_prefill_bytes(model, prefix_length, len(ids)) for ids in prompts]
        row_bytes = estimate_row_bytes(model, [len(ids) for ids in prompts], max_new_tokens)
        if generation_config.num_beams > 1:
            # Beam search computes all prompts of a batch at once.
            both = zip(row_bytes, row_prefill_bytes, strict=True)
            row_bytes = [generation_config.num_beams * (cached + prefill) for cached, prefill in both]
            decoding_bytes = batch_bytes
        else:
            decoding_bytes = batch_bytes - prefill_bytes
        for indices in batch_by_length(row_bytes, decoding_bytes):
            parts = list(batch_by_length([row_prefill_bytes[index] for index in indices], prefill_bytes))
            indices = [indices[index] for part in parts for index in part]
            batch = _Batch(
                indices, [max_new_tokens[index] for index in indices], [len(part) for part in parts], on_generation
            )
            _generate_batch(model, [prompts[index] for index in indices], prefix, generation_config, batch)


@dataclass(frozen=True, slots=True)
class _Batch:
    """The rows of one batch.

    Attributes:
        row_indices: each row's index among all rows.
        max_new_tokens: each row's limit.
        prefill_sizes: numbers of rows whose prompts are computed together, in order.
        on_generation: see `generate`.
    """

    row_indices: list[int]
    max_new_tokens: list[int]
    prefill_sizes: list[int]
    on_generation: Callable[[int, Generation], None]

    def report(self, row: int, token_ids: list[int], stop_token_ids: set[int]) -> None:
        """Report one row of the batch; `token_ids` may continue after a stop token or the row's limit."""
        token_ids = token_ids[: self.max_new_tokens[row]]
        end = next((position for position, token_id in enumerate(token_ids) if token_id in stop_token_ids), None)
        self.on_generation(self.row_indices[row], Generation(token_ids[:end], end is not None))


def _generate_batch(
    model: PreTrainedModel,
    prompts: list[list[int]],
    prefix: Cache | None,
    generation_config: GenerationConfig,
    batch: _Batch,
) -> None:
    width = max(map(len, prompts))
    # Padding is masked. It repeats the prompt's own first id, so that a repetition penalty sees no other token.
    input_ids = torch.tensor([[ids[0]] * (width - len(ids)) + ids for ids in prompts])
    attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    generation_config = copy.deepcopy(generation_config)
    generation_config.max_new_tokens = max(batch.max_new_tokens)
    inputs: dict[str, Any] = {
        "input_ids": input_ids.to(model.device),
        "attention_mask": attention_mask.to(model.device),
        "generation_config": generation_config,
    }
    generate: Any = model.generate  # of GenerationMixin, which the type PreTrainedModel does not include
    if generation_config.num_beams == 1:
        generate(**inputs, custom_generate=_decode, batch=batch, prefix=prefix)
        return
    cache = _expand_prefix_cache(model, prefix, attention_mask)
    if prefix is not None:
        cache.batch_repeat_interleave(generation_config.num_beams)
    stop_token_ids = set(generation_config.eos_token_id)
    sequences = generate(**inputs, **{CACHE_ARGUMENT: cache})
    for row, token_ids in enumerate(sequences[:, width:].tolist()):
        batch.report(row, token_ids, stop_token_ids)


def _decode(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    batch: _Batch,
    prefix: Cache | None,
    **inputs: Any,  # if named here, `generate` would take them for generation arguments
) -> None:
    """Run greedy search or sampling as `generate` has prepared it, and remove finished rows from the batch."""
    width, device = input_ids.shape[1], input_ids.device
    attention_mask: torch.Tensor | None = inputs["attention_mask"]
    if attention_mask is None:  # `generate` drops a mask without padding
        attention_mask = torch.ones_like(input_ids)
    stop_token_ids = torch.tensor(generation_config.eos_token_id, device=device)
    limits = torch.tensor(batch.max_new_tokens, device=device)
    row_indices = torch.arange(len(input_ids), device=device)
    active = torch.ones_like(row_indices, dtype=torch.bool)
    hidden, decoder = _prefill(model, input_ids, attention_mask, prefix, batch.prefill_sizes)
    while True:
        # Transformers annotates the parameter as LongTensor, which no function of PyTorch returns.
        scores = logits_processor(input_ids, compute_logits(model, hidden).to(device))  # type: ignore[arg-type]
        if generation_config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), 1)
        else:
            tokens = scores.argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, tokens], dim=-1)
        finished = active & (torch.isin(tokens[:, 0], stop_token_ids) | (input_ids.shape[1] - width >= limits))
        if finished.any():
            finished_rows = zip(row_indices[finished].tolist(), input_ids[finished, width:].tolist(), strict=True)
            for row, token_ids in finished_rows:
                batch.report(row, token_ids, set(generation_config.eos_token_id))
            active &= ~finished
            if not active.any():
                return
            # Some logits processors have state for every row of the batch.
            if not logits_processor and int((~active).sum()) >= decoder.min_finished_fraction * len(active):
                decoder.keep(active)
                input_ids, limits, row_indices = input_ids[active], limits[active], row_indices[active]
                active = active[active]
        hidden = decoder.step(input_ids[:, -1:])


def _prefill(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    prefix: Cache | None,
    part_sizes: Sequence[int],
) -> tuple[torch.Tensor, Decoder]:
    """Compute the prompts, `part_sizes` rows at a time.

    Returns:
        The last hidden states of all prompts, shape (B, D), and the decoder that continues from there.
    """
    hidden, caches = [], []
    for ids, mask in zip(input_ids.split(part_sizes), attention_mask.split(part_sizes), strict=True):
        width = int(mask.sum(-1).max())
        ids, mask = ids[:, -width:], mask[:, -width:]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = _expand_prefix_cache(model, prefix, mask)
        new = slice(cache.get_seq_length(), None)
        last_hidden = compute_last_hidden(model, ids[:, new], mask, positions[:, new], cache)
        hidden.append(last_hidden.clone())  # a view would keep all positions in memory
        caches.append(cache)
    return torch.cat(hidden), Decoder(model, caches, attention_mask)


def _prefill_common_prefix(model: PreTrainedModel, rows: Sequence[EncodedRow]) -> Cache | None:
    """Return keys and values of the tokens that all prompts begin with, as a batch of one; None if there are none."""
    length = common_prefix_length(rows)
    if not length:
        return None
    cache = _create_cache(model)
    ids = torch.tensor([rows[0].prompt_ids[:length]], device=model.device)
    model.base_model(input_ids=ids, use_cache=True, **{CACHE_ARGUMENT: cache})
    return cache


def _create_cache(model: PreTrainedModel) -> Cache:
    """Return a cache whose layers store every position; only the masks implement sliding windows."""
    return Cache(layers=[DynamicLayer() for _ in range(model.config.get_text_config().num_hidden_layers)])


def _expand_prefix_cache(model: PreTrainedModel, prefix: Cache | None, attention_mask: torch.Tensor) -> Cache:
    """Copy the prefix's keys and values to every row of a batch, shifted behind the row's padding.

    What the shift moves beyond length S is computed again with the rest of the prompt.

    Args:
        model: the model.
        prefix: cache of the shared prefix, of length S, a batch of one.
        attention_mask: mask of the prompts, shape (B, L); 0 is padding, on the left.

    Returns:
        A cache of length S for B rows. Values at padded positions are arbitrary, since they are masked.
    """
    cache = _create_cache(model)
    if prefix is None:
        return cache
    paddings = (attention_mask == 0).sum(-1, keepdim=True)
    positions = torch.arange(prefix.get_seq_length(), device=attention_mask.device) - paddings
    for layer_index, layer in enumerate(prefix.layers):
        prefix_keys, prefix_values = keys_and_values(layer)
        index = positions.clamp(min=0).to(prefix_keys.device)
        # (1, H, S, D) indexed by (B, S) to (B, H, S, D)
        keys, values = (states[0, :, index].transpose(0, 1) for states in (prefix_keys, prefix_values))
        cache.update(keys, values, layer_index)
    return cache
