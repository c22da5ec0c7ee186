"""Prompt ids in, answer ids out, in any batch: the same answers as one prompt at a time, in float32."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from hw3.config.schema import GenerationSection
from hw3.data.batching import batches, common_prefix
from hw3.data.tokenization import EncodedRow
from hw3.generation.decoder import ROOM, Decoder, run
from hw3.modeling.logits import adapters_in_tf32, output_logits

CPU_BATCH_BYTES = 2**28  # some 90 rows of the small model
PROMPTS_SHARE = 4  # a quarter of a batch's memory is for what a layer holds while prompts run


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model wrote after one prompt.

    Attributes:
        ids: the new ids, the one that ended it left out.
        finished: whether the model ended it; otherwise it was cut at its limit.
    """

    ids: list[int]
    finished: bool


def stop_ids(model: PreTrainedModel, eos_id: int) -> list[int]:
    """Ids that end an answer: EOS of the trained tokenizer first, then what the base's own generation stops at."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [] if own is None else [own]
    return list(dict.fromkeys([eos_id, *own]))


def generation_config(section: GenerationSection, stops: Sequence[int]) -> GenerationConfig:
    """The recipe's `generation` section for `generate`; nothing else is taken from the base's own settings."""
    values = section.model_dump(exclude_none=True, exclude={"max_new_tokens"})
    return GenerationConfig(**values, eos_token_id=list(stops), pad_token_id=stops[0], use_cache=True)


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    rows: Sequence[EncodedRow],
    *,
    limits: Sequence[int],
    config: GenerationConfig,
    on_answer: Callable[[int, Answer], None],
    batch_bytes: int | None = None,
) -> None:
    """Answer every prompt.

    Rows are sorted by length and padded on the left, so that new tokens of all follow their prompts at once; what all
    prompts begin with runs through the model once. Prompts need more memory than answers: without beams they run in
    parts of a batch, so that it may have as many rows as answers allow. Under plain greedy search rows leave their
    batch some time after they have ended, so that one that never ends holds up no other.

    Args:
        model: the causal language model in evaluation mode; adapters, if any, are injected into it.
        rows: encoded rows; outputs, where there are any, are not looked at.
        limits: most new tokens of each row, EOS included.
        config: how to generate; `eos_token_id` is a list.
        on_answer: called with a row's index and its answer as soon as it is there, in no certain order.
        batch_bytes: memory that a batch may take; from free memory if None.
    """
    # Settings of the base's authors (sampling, penalties) would fill what the recipe leaves out.
    model.generation_config = GenerationConfig()
    prompts = [row.prompt_ids for row in rows]
    with adapters_in_tf32(model):
        prefix = _prefix_cache(model, rows) if len(rows) > 1 else None
        common = prefix.get_seq_length() if prefix is not None else 0
        memory = batch_bytes or _free_bytes(model)
        at_work = memory // PROMPTS_SHARE
        at_once = [_prompt_bytes(model, common, len(ids)) for ids in prompts]
        costs = row_costs(model, [len(ids) for ids in prompts], limits)
        if config.num_beams > 1:
            # `generate` runs all prompts at once.
            costs = [config.num_beams * (kept + more) for kept, more in zip(costs, at_once, strict=True)]
        for batch in batches(costs, memory if config.num_beams > 1 else memory - at_work):
            parts = list(batches([at_once[index] for index in batch], at_work))
            batch = [batch[place] for part in parts for place in part]
            answer = _Batch([limits[index] for index in batch], batch, on_answer, [len(part) for part in parts])
            _generate_batch(model, [prompts[index] for index in batch], prefix, config, answer)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Limits and numbers of a batch's rows, who is told their answers, how many prompts run at a time."""

    limits: list[int]
    indices: list[int]
    on_answer: Callable[[int, Answer], None]
    parts: list[int]

    def ended(self, row: int, ids: list[int], stops: set[int]) -> None:
        """Report one row of the batch; `ids` may go on after a stop id or the row's limit."""
        ids = ids[: self.limits[row]]
        end = next((place for place, id in enumerate(ids) if id in stops), None)
        self.on_answer(self.indices[row], Answer(ids[:end], end is not None))


def _generate_batch(
    model: PreTrainedModel,
    prompts: list[list[int]],
    prefix: Cache | None,
    config: GenerationConfig,
    batch: _Batch,
) -> None:
    width = max(map(len, prompts))
    # Padding is masked; with the prompt's own first id it does not count for a repetition penalty either.
    input_ids = torch.tensor([[ids[0]] * (width - len(ids)) + ids for ids in prompts])
    attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    config = copy.deepcopy(config)
    config.max_new_tokens = max(batch.limits)
    inputs: dict[str, Any] = {
        "input_ids": input_ids.to(model.device),
        "attention_mask": attention_mask.to(model.device),
        "generation_config": config,
    }
    if config.num_beams == 1:
        model.generate(**inputs, custom_generate=_decode, batch=batch, prefix=prefix)
        return
    cache = _shifted(model, prefix, attention_mask)
    if prefix is not None:
        cache.batch_repeat_interleave(config.num_beams)
    stops = set(config.eos_token_id)
    sequences = model.generate(**inputs, past_key_values=cache)
    for row, ids in enumerate(sequences[:, width:].tolist()):
        batch.ended(row, ids, stops)


def _decode(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    batch: _Batch,
    prefix: Cache | None,
    **inputs: Any,  # named here, `generate` would take them for arguments of its own
) -> None:
    """Greedy search or sampling as `generate` has prepared it, rows leaving the batch as they end."""
    width, device = input_ids.shape[1], input_ids.device
    attention_mask: torch.Tensor | None = inputs["attention_mask"]
    if attention_mask is None:  # nothing is padded
        attention_mask = torch.ones_like(input_ids)
    stops = torch.tensor(generation_config.eos_token_id, device=device)
    limits = torch.tensor(batch.limits, device=device)
    here = torch.arange(len(input_ids), device=device)
    going = torch.ones_like(here, dtype=torch.bool)
    hidden, decoder = _run_prompts(model, input_ids, attention_mask, prefix, batch.parts)
    while True:
        scores = logits_processor(input_ids, output_logits(model, hidden).to(device))
        if generation_config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), 1)
        else:
            tokens = scores.argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, tokens], dim=-1)
        ended = going & (torch.isin(tokens[:, 0], stops) | (input_ids.shape[1] - width >= limits))
        if ended.any():
            for row, ids in zip(here[ended].tolist(), input_ids[ended, width:].tolist(), strict=True):
                batch.ended(row, ids, set(generation_config.eos_token_id))
            going &= ~ended
            if not going.any():
                return
            # Some processors count the batch's rows.
            if not logits_processor and int((~going).sum()) >= decoder.least_leaving * len(going):
                decoder.keep(going)
                input_ids, limits, here, going = input_ids[going], limits[going], here[going], going[going]
        hidden = decoder.step(input_ids[:, -1:])


def _run_prompts(
    model: PreTrainedModel, input_ids: torch.Tensor, mask: torch.Tensor, prefix: Cache | None, sizes: Sequence[int]
) -> tuple[torch.Tensor, Decoder]:
    """The last hidden states of all prompts, shape (B, H), and what goes on from there; so many rows run at a time."""
    hidden, caches = [], []
    for ids, seen in zip(input_ids.split(sizes), mask.split(sizes), strict=True):
        width = int(seen.sum(-1).max())
        ids, seen = ids[:, -width:], seen[:, -width:]
        positions = (seen.cumsum(-1) - 1).clamp(min=0)
        cache = _shifted(model, prefix, seen)
        new = slice(cache.get_seq_length(), None)
        last = run(model, ids[:, new], seen, positions[:, new], cache)
        hidden.append(last.clone())  # not the other positions with it
        caches.append(cache)
    return torch.cat(hidden), Decoder(model, caches, mask)


def _prefix_cache(model: PreTrainedModel, rows: Sequence[EncodedRow]) -> Cache | None:
    """Keys and values of what all prompts begin with, in a batch of one; None where that is nothing."""
    length = common_prefix(rows)
    if not length:
        return None
    cache = _empty_cache(model)
    ids = torch.tensor([rows[0].prompt_ids[:length]], device=model.device)
    model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache


def _empty_cache(model: PreTrainedModel) -> Cache:
    """Every layer keeps every position: the masks alone know of sliding windows, padded rows or not."""
    return Cache(layers=[DynamicLayer() for _ in range(model.config.get_text_config().num_hidden_layers)])


def _shifted(model: PreTrainedModel, prefix: Cache | None, mask: torch.Tensor) -> Cache:
    """The prefix for a batch, each row's behind its padding; what falls off its end is run again with the rest.

    Args:
        model: the model.
        prefix: of length P, in a batch of one.
        mask: of the prompts, shape (B, L); 0 is padding, on the left.

    Returns:
        A cache of length P for as many rows; what stands at padded positions is masked.
    """
    cache = _empty_cache(model)
    if prefix is None:
        return cache
    paddings = (mask == 0).sum(-1, keepdim=True)
    places = torch.arange(prefix.get_seq_length(), device=mask.device) - paddings
    for number, layer in enumerate(prefix.layers):
        index = places.clamp(min=0).to(layer.keys.device)
        # (1, H, P, D) by (B, P) to (B, H, P, D)
        keys, values = (states[0, :, index].transpose(0, 1) for states in (layer.keys, layer.values))
        cache.update(keys, values, number)
    return cache


def row_costs(model: PreTrainedModel, prompts: Sequence[int], limits: Sequence[int]) -> list[int]:
    """Memory of each row in any batch with rows that cost no more: as wide as their longest prompt and longest limit.

    Args:
        model: the model.
        prompts: tokens of each prompt.
        limits: most new tokens of each row.

    Returns:
        Bytes.
    """
    costs = [0] * len(prompts)
    widest = longest = 0
    for index in sorted(range(len(prompts)), key=lambda index: prompts[index] + limits[index]):
        widest, longest = max(widest, prompts[index]), max(longest, limits[index])
        costs[index] = _bytes(model, widest, longest)
    return costs


def _bytes(model: PreTrainedModel, prompt: int, limit: int) -> int:
    """Memory of one row to its end: keys and values, a layer's once more and for all heads, and logits.

    Attention that is not known to read them in place makes copies for all heads.
    """
    config = model.config.get_text_config()
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    cached = 2 * _head_bytes(model) * ((layers + 1) * config.num_key_value_heads + heads)
    return cached * (prompt + limit + ROOM) + 3 * 4 * config.vocab_size


def _prompt_bytes(model: PreTrainedModel, prefix: int, prompt: int) -> int:
    """What a layer holds of one row while its prompt runs, all but the prefix."""
    config = model.config.get_text_config()
    size = model.dtype.itemsize
    # MLP and residuals in the compute dtype, the adapters' float32 copies, attention scores with a float32 softmax.
    a_token = (size + 4) * (4 * config.intermediate_size + 8 * config.hidden_size)
    a_token += config.num_attention_heads * prompt * (2 * size + 4)
    return a_token * (prompt - prefix)


def _head_bytes(model: PreTrainedModel) -> int:
    """One head's key of one token."""
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return head * model.dtype.itemsize


def _free_bytes(model: PreTrainedModel) -> int:
    """Half of the GPU's free memory; on a CPU what keeps a step quick."""
    if model.device.type == "cpu":
        return CPU_BATCH_BYTES
    free, _ = torch.cuda.mem_get_info(model.device)
    return free // 2
