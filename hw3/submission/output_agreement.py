"""Our own answers beside a packed folder's: equal, or in 16 bits parted where two tokens were a near tie."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hw3.common.errors import RunFailed
from hw3.config.recipe import Recipe
from hw3.data.rows import Row
from hw3.data.tokenization import EncodedRow
from hw3.evaluation.selection import Scored
from hw3.generation.batch_generate import Answer, generate
from hw3.generation.generator import Answerer
from hw3.modeling.loading import attention_of
from hw3.modeling.logits import output_logits
from hw3.runs.open_run import encode_rows

# Greedy search takes the likeliest token. Where another is nearly as likely, sums that are rounded in another order, in
# other batches or from packed weights, may turn the choice, and the rest of the answer with it. In nats: eight steps of
# bfloat16 between logits of 16 and 32.
NEAR_TIE = 1.0


@dataclass(frozen=True)
class OwnAnswers:
    """Answers of `hw3 predict`, as text and as the ids that it came from.

    Attributes:
        texts: one a row.
        ids: the new ids, EOS included where the model ended the answer.
        prompts: the rows as ids.
    """

    texts: list[str]
    ids: list[list[int]]
    prompts: list[EncodedRow]


def own_answers(scored: Scored, rows: list[Row], source: Path) -> tuple[OwnAnswers, dict[str, Any]]:
    """Our own answers, and the constants of `predict.py` that make it give the same.

    Args:
        scored: the checkpoint.
        rows: rows to answer.
        source: the file they came from, for messages.

    Raises:
        UserError: rows do not fit the model, or the training rows are not there to take lengths from.
    """
    answerer = _answerer(scored)
    prompts = encode_rows(answerer.encoder, rows, [], answerer.config, str(source))
    limits = [answerer.limit(row, ids) for row, ids in zip(rows, prompts, strict=True)]
    model, config = answerer.model, answerer.generation
    own = OwnAnswers([""] * len(rows), [[] for _ in rows], prompts)
    with tqdm(total=len(rows), desc=scored.checkpoint.name, unit="row", disable=None, leave=False) as bar:

        def keep(index: int, answer: Answer) -> None:
            own.texts[index] = answerer.encoder.decode(answer.ids)
            own.ids[index] = [*answer.ids, *([answerer.encoder.eos_id] if answer.finished else [])]
            bar.update()

        generate(model, prompts, limits=limits, config=config, on_answer=keep)
    generation = scored.recipe.generation
    constants = {
        "DTYPE": scored.recipe.model.dtype,
        "ATTENTION": attention_of(scored.recipe.model),
        "GENERATION": generation.model_dump(exclude_none=True, exclude={"max_new_tokens"}),
        "STOPS": config.eos_token_id,
        "MAX_NEW_TOKENS": generation.max_new_tokens,
    }
    if generation.max_new_tokens is None:
        constants["LONGEST"] = answerer.lengths.steps
    return own, constants


def compare_answers(scored: Scored, rows: list[Row], own: OwnAnswers, theirs: list[str]) -> str:
    """One line on how the folder's answers agree with ours.

    In float32 they are equal. In 16 bits a greedy answer may part from ours, but only where our model finds the two
    tokens nearly as likely; beams and penalties have no such place and are counted only.

    Args:
        scored: the checkpoint.
        rows: the rows.
        own: our answers to them.
        theirs: the folder's, in the same order.

    Raises:
        RunFailed: they are not the same model's answers.
    """
    if scored.recipe.generation.do_sample:
        return "answers: sampled, so not compared"
    dtype = scored.recipe.model.dtype
    differing = [number for number, text in enumerate(theirs) if text != own.texts[number]]
    line = f"answers: {len(rows) - len(differing)} of {len(rows)} equal to hw3 predict's"
    if not differing:
        return line
    if dtype == "float32":
        raise RunFailed(f"{line}; not packed. The first that differs: {rows[differing[0]].id}")
    if not _is_greedy(scored.recipe):
        return f"{line}; rounding in {dtype} turns the others"
    gaps = _gaps(scored, own, {number: theirs[number] for number in differing})
    number, widest = max(gaps.items(), key=lambda item: item[1])
    line += f", {len(gaps)} part from them where two tokens were at most {widest:.2f} nats apart in {dtype}"
    if widest > NEAR_TIE:
        raise RunFailed(f"{line}, more than {NEAR_TIE}: row {rows[number].id}; not packed")
    return line


@torch.inference_mode()
def _gaps(scored: Scored, own: OwnAnswers, theirs: dict[int, str]) -> dict[int, float]:
    """How much likelier our model finds its own token than the folder's, at the first that differs; in nats."""
    answerer = _answerer(scored)
    model = answerer.model
    gaps = {}
    for number, text in tqdm(theirs.items(), desc="near ties", unit="row", disable=None, leave=False):
        ours, other = own.ids[number], answerer.encoder.output_ids(text)
        place = next((at for at, (a, b) in enumerate(zip(ours, other, strict=False)) if a != b), None)
        if place is None:  # one of them goes on where the other was cut
            gaps[number] = math.inf
            continue
        ids = torch.tensor([own.prompts[number].prompt_ids + ours[:place]], device=model.device)
        logits = output_logits(model, model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, -1:])[0]
        gaps[number] = float(logits[ours[place]] - logits[other[place]])
    return gaps


def _answerer(scored: Scored) -> Answerer:
    return Answerer.of(scored.run, None, scored.checkpoint.name, 0, False)


def _is_greedy(recipe: Recipe) -> bool:
    return not recipe.generation.model_dump(exclude_defaults=True, exclude={"max_new_tokens"})
