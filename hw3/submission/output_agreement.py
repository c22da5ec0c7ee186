"""Compare the outputs of a submission folder with those of `hw3 predict`.

In float32 they must be equal. In 16-bit precision an output can differ where two tokens were almost equally likely.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from hw3.common.errors import RunError
from hw3.common.progress import ProgressLine, can_show_live_progress
from hw3.config.recipe import Recipe
from hw3.data.rows import Row
from hw3.data.tokenization import EncodedRow
from hw3.evaluation.selection import ScoredCheckpoint
from hw3.generation.batch_generate import Generation, generate
from hw3.generation.generator import RunGenerator
from hw3.modeling.logits import compute_logits
from hw3.runs.open_run import encode_rows

# Greedy search takes the most likely token. If another token is almost as likely, rounding in other batches or with
# 4-bit weights can change the choice, and with it the rest of the output. 1 nat is 8 steps of bfloat16 for logits
# between 16 and 32.
MAX_NEAR_TIE_NATS = 1.0


@dataclass(frozen=True)
class ReferenceOutputs:
    """The outputs of `hw3 predict`, one per row.

    Attributes:
        texts: the outputs.
        token_ids: their ids, EOS included if the model generated it.
        encoded_rows: the prompts.
    """

    texts: list[str]
    token_ids: list[list[int]]
    encoded_rows: list[EncodedRow]


def generate_reference_outputs(generator: RunGenerator, rows: list[Row], source: Path) -> ReferenceOutputs:
    """Generate the outputs of `hw3 predict`.

    Args:
        generator: the run with the submitted checkpoint.
        rows: the rows.
        source: the file of the rows, for messages.

    Raises:
        UserError: rows do not fit the model, or the training rows, which limit the lengths of outputs, are missing.
    """
    encoder = generator.encoder
    encoded_rows = encode_rows(encoder, rows, [], generator.input_limits, str(source))
    limits = [generator.get_max_new_tokens(row, encoded) for row, encoded in zip(rows, encoded_rows, strict=True)]
    generation_config = generator.generation_config
    reference = ReferenceOutputs([""] * len(rows), [[] for _ in rows], encoded_rows)
    with ProgressLine("predicting", len(rows), "rows", is_logged=True) as progress:

        def record(index: int, generation: Generation) -> None:
            reference.texts[index] = encoder.decode(generation.token_ids)
            eos = [encoder.eos_token_id] if generation.finished else []
            reference.token_ids[index] = [*generation.token_ids, *eos]
            progress.advance()

        generate(
            generator.model,
            encoded_rows,
            max_new_tokens=limits,
            generation_config=generation_config,
            on_generation=record,
        )
    return reference


def compare_outputs(
    scored: ScoredCheckpoint, rows: Sequence[Row], reference: ReferenceOutputs, outputs: Sequence[str]
) -> str:
    """Return a line that reports how many outputs equal those of `hw3 predict`.

    In float32 all must be equal. In 16-bit precision a greedy output may differ after a near tie. With beam search or
    penalties there is no such criterion, so differing outputs are only counted.

    Args:
        scored: the submitted checkpoint.
        rows: the rows.
        reference: the outputs of `hw3 predict`.
        outputs: the outputs of the submission folder, in the same order.

    Raises:
        RunError: the outputs are not those of the same model.
    """
    if scored.recipe.generation.do_sample:
        return "predictions: sampled, so not compared"
    dtype = scored.recipe.model.dtype
    differing = [index for index, text in enumerate(outputs) if text != reference.texts[index]]
    line = f"predictions: {len(rows) - len(differing)} of {len(rows)} equal to those of hw3 predict"
    if not differing:
        return line
    if dtype == "float32":
        raise RunError(f"{line}; the first that differs is row {rows[differing[0]].id}")
    if not _is_greedy(scored.recipe):
        return f"{line}; the others differ by rounding in {dtype}"
    gaps = _compute_gaps(scored, reference, {index: outputs[index] for index in differing})
    index, largest = max(gaps.items(), key=lambda item: item[1])
    line += f"; {len(gaps)} differ, first at tokens that are at most {largest:.2f} nats apart in {dtype}"
    if largest > MAX_NEAR_TIE_NATS:
        raise RunError(f"{line}, but at most {MAX_NEAR_TIE_NATS:g} is rounding: row {rows[index].id}")
    return line


@torch.inference_mode()
def _compute_gaps(
    scored: ScoredCheckpoint, reference: ReferenceOutputs, outputs: Mapping[int, str]
) -> dict[int, float]:
    """Return how close the two tokens were at which an output first differs from its reference.

    Args:
        scored: the submitted checkpoint.
        reference: the outputs of `hw3 predict`.
        outputs: outputs that differ, by index of the row.

    Returns:
        By index of the row, log p(token of the reference) - log p(token of the output), in nats. It is infinite where
        one of the outputs is the beginning of the other.
    """
    generator = open_generator(scored)
    model = generator.model
    gaps = {}
    for index, text in tqdm(
        outputs.items(), desc="near ties", unit="row", disable=not can_show_live_progress(), leave=False
    ):
        expected_ids, ids = reference.token_ids[index], generator.encoder.encode_output(text)
        pairs = enumerate(zip(expected_ids, ids, strict=False))
        position = next((position for position, (expected, actual) in pairs if expected != actual), None)
        if position is None:
            gaps[index] = math.inf
            continue
        prompt_ids = reference.encoded_rows[index].prompt_ids
        input_ids = torch.tensor([prompt_ids + expected_ids[:position]], device=model.device)
        hidden_states = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[0, -1:]
        logits = compute_logits(model, hidden_states)[0]
        gaps[index] = float(logits[expected_ids[position]] - logits[ids[position]])
    return gaps


def open_generator(scored: ScoredCheckpoint) -> RunGenerator:
    """Open the run with the scored checkpoint; no weights are loaded."""
    return RunGenerator.open(scored.run, scored.checkpoint.name)


def _is_greedy(recipe: Recipe) -> bool:
    return not recipe.generation.model_dump(exclude_defaults=True, exclude={"max_new_tokens"})
