"""Worked examples for few-shot prompts: the prompt's own list, or drawn from the training file."""

from __future__ import annotations

import random
from collections.abc import Sequence

from hw3.common.errors import UserError
from hw3.data.prompt import Example, Prompt
from hw3.data.rows import Row
from hw3.data.templates import direction_of


def listed_examples(prompt: Prompt, fallback: Prompt, shots: int) -> tuple[list[Example], list[str] | None]:
    """The first `shots` worked examples of the prompt, or of `fallback` where it has none.

    Returns:
        The examples, and None for their ids: they have none.

    Raises:
        UserError: the prompt has fewer.
    """
    examples = prompt.examples or fallback.examples
    if not 0 <= shots <= len(examples):
        raise UserError(
            f"--shots {shots}: the prompt has {len(examples)} worked examples; give 0 to {len(examples)}, or draw them "
            "from the training file: --examples train"
        )
    return examples[:shots], None


def drawn_examples(
    training: Sequence[Row], scored: Sequence[Row], shots: int, seed: int
) -> tuple[list[Example], list[str]]:
    """One draw for a training file and a seed, the same for every scored row.

    The draw is nested (1 is a prefix of 2 is a prefix of 4) and takes directions in turn, modern to Classical first,
    where the templates tell them. A row whose instruction or output is in the scored file is never drawn.

    Args:
        training: rows to draw from.
        scored: rows that will be scored.
        shots: how many to draw.
        seed: of the shuffle.

    Returns:
        The examples and their rows' ids.

    Raises:
        UserError: too few rows are left.
    """
    instructions, outputs = {row.instruction for row in scored}, {row.output for row in scored}
    shuffled = sorted(training, key=lambda row: row.id)
    random.Random(seed).shuffle(shuffled)
    free = [row for row in shuffled if row.instruction not in instructions and row.output not in outputs]
    if not 0 <= shots <= len(free):
        raise UserError(
            f"--shots {shots}: {len(free)} training rows are not in the scored file as well; give 0 to {len(free)}"
        )
    into, out_of = ([row for row in free if direction_of(row.instruction) == way] for way in ("m2c", "c2m"))
    balanced = [row for pair in zip(into, out_of, strict=False) for row in pair]
    # One order for any number of shots, so that fewer are a prefix of more.
    chosen = [*balanced, *(row for row in free if row not in balanced)][:shots]
    return [Example(instruction=row.instruction, output=row.output or "") for row in chosen], [row.id for row in chosen]
