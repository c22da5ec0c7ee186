"""Few-shot examples for a prompt: the prompt's own list, or a sample of the training file."""

from __future__ import annotations

import random
from collections.abc import Sequence

from hw3.common.errors import UserError
from hw3.data.prompt import Example, Prompt
from hw3.data.rows import Row
from hw3.data.templates import detect_direction


def check_shots(prompt: Prompt, shots: int) -> None:
    """Check that a prompt has this many few-shot examples.

    Raises:
        UserError: it has fewer.
    """
    if not 0 <= shots <= len(prompt.examples):
        raise UserError(
            f"--shots {shots}: the prompt has {len(prompt.examples)} few-shot examples; give a number from 0 to "
            f"{len(prompt.examples)}"
        )


def prompt_examples(prompt: Prompt, fallback: Prompt, shots: int) -> tuple[list[Example], list[str] | None]:
    """Return the first `shots` few-shot examples of a prompt, or of `fallback` if the prompt has none.

    Returns:
        The examples, and None in place of row ids, because these examples come from no row.

    Raises:
        UserError: the prompt has fewer examples.
    """
    examples = prompt.examples or fallback.examples
    if not 0 <= shots <= len(examples):
        raise UserError(
            f"--shots {shots}: the prompt has {len(examples)} few-shot examples; choose 0 to {len(examples)}, or "
            "sample them from the training file with --examples train"
        )
    return examples[:shots], None


def sample_examples(
    training: Sequence[Row], scored: Sequence[Row], shots: int, seed: int
) -> tuple[list[Example], list[str]]:
    """Sample few-shot examples from the training rows; all scored rows get the same examples.

    Samples of one seed are nested: the sample of 1 is a prefix of the sample of 2, and so on. Where templates reveal
    the direction, modern to Classical and Classical to modern alternate, starting with modern to Classical. A training
    row whose instruction or output occurs in the scored file is never sampled.

    Args:
        training: rows to sample from.
        scored: rows that will be scored.
        shots: number of examples.
        seed: seed of the shuffle.

    Returns:
        The examples, and the ids of their rows.

    Raises:
        UserError: too few training rows are left.
    """
    instructions, outputs = {row.instruction for row in scored}, {row.output for row in scored}
    shuffled = sorted(training, key=lambda row: row.id)
    random.Random(seed).shuffle(shuffled)
    candidates = [row for row in shuffled if row.instruction not in instructions and row.output not in outputs]
    if not 0 <= shots <= len(candidates):
        raise UserError(
            f"--shots {shots}: {len(candidates)} training rows do not occur in the scored file; choose 0 to "
            f"{len(candidates)}"
        )
    to_classical, to_modern = (
        [row for row in candidates if detect_direction(row.instruction) == direction] for direction in ("m2c", "c2m")
    )
    alternating = [row for pair in zip(to_classical, to_modern, strict=False) for row in pair]
    # One order for every number of examples, so that samples are nested.
    chosen = [*alternating, *(row for row in candidates if row not in alternating)][:shots]
    return [Example(instruction=row.instruction, output=row.output or "") for row in chosen], [row.id for row in chosen]
