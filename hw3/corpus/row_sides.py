"""The two sides of a row: the text to translate and its translation."""

from __future__ import annotations

from hw3.data.rows import Row
from hw3.data.templates import match_template


def row_sides(row: Row) -> list[str]:
    """Return the text that a row asks to translate and, if the row has an output, its translation.

    The words of the homework's template are removed from both. An instruction that follows no template is returned
    complete.
    """
    matched = match_template(row.instruction)
    text, prefix = (matched[1], matched[0].output_prefix) if matched else (row.instruction, "")
    return [text] if row.output is None else [text, row.output.removeprefix(prefix)]
