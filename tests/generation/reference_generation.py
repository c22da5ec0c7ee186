"""Generation by its definition, and batched generation with its results in order."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from hw3.config.schema import GenerationSection
from hw3.data.tokenization import EncodedRow
from hw3.generation.batch_generate import Generation, build_generation_config, generate

# A random model seldom generates EOS (1). With a few more stop tokens rows finish at different times.
STOP_TOKEN_IDS = [1, 9, 23, 30]


@torch.no_grad()
def generate_one_by_one(model: PreTrainedModel, rows: list[EncodedRow], limits: list[int]) -> list[Generation]:
    """Run greedy search by its definition: one row at a time, the complete text for every token, no cache."""
    return [_generate_row(model, row, limit) for row, limit in zip(rows, limits, strict=True)]


def _generate_row(model: PreTrainedModel, row: EncodedRow, limit: int) -> Generation:
    ids = list(row.prompt_ids)
    while len(ids) < len(row.prompt_ids) + limit:
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in STOP_TOKEN_IDS:
            return Generation(ids[len(row.prompt_ids) : -1], True)
    return Generation(ids[len(row.prompt_ids) :], False)


def generate_batched(
    model: PreTrainedModel, rows: list[EncodedRow], limits: list[int], *, batch_bytes: int = 2**40, **settings: object
) -> list[Generation]:
    """Return the results of `generate` in the order of the rows; `settings` are those of the `generation` section."""
    results: dict[int, Generation] = {}
    generate(
        model,
        rows,
        max_new_tokens=limits,
        generation_config=build_generation_config(GenerationSection(**settings), STOP_TOKEN_IDS),
        on_generation=results.__setitem__,
        batch_bytes=batch_bytes,
    )
    return [results[index] for index in range(len(rows))]


def count_new_tokens(generation: Generation) -> int:
    """Return the tokens that were generated, the stop token included."""
    return len(generation.token_ids) + generation.finished


def without_common_prefix(rows: list[EncodedRow]) -> list[EncodedRow]:
    """Return the rows with prompts that begin at different tokens."""
    return [EncodedRow(row.id, row.prompt_ids[number:], [], 0) for number, row in enumerate(rows)]
