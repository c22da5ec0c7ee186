"""Show texts: what differs from a reference, and characters that are invisible."""

from __future__ import annotations

import re
import unicodedata
from difflib import SequenceMatcher

# Unicode categories: control, format (bidirectional marks included), surrogate, line and paragraph separators.
_INVISIBLE_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")


def split_differences(text: str, reference: str | None) -> list[tuple[str, bool]]:
    """Split a text into pieces that are equal to a reference or differ from it.

    Args:
        text: the text.
        reference: the reference; if None, nothing differs.

    Returns:
        Pairs (piece, differs from the reference).
    """
    if reference is None:
        return [(text, False)]
    matcher = SequenceMatcher(None, reference, text, autojunk=False)
    return [
        (text[start:end], operation != "equal") for operation, _, _, start, end in matcher.get_opcodes() if end > start
    ]


def escape_invisible(text: str, *, keep: str = "\n\t") -> str:
    r"""Replace invisible characters, except those in `keep`, by escapes such as `\u202e`.

    They could move a terminal's cursor; bidirectional marks could reverse the text around them.
    """
    if text.isprintable():
        return text
    return "".join(
        f"\\u{ord(character):04x}"
        if unicodedata.category(character) in _INVISIBLE_CATEGORIES and character not in keep
        else character
        for character in text
    )


def count_columns(text: str) -> int:
    """Return the width of a text on a terminal; a Chinese character takes two columns."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def has_surrogates(text: str) -> bool:
    """Return whether a text contains half of a surrogate pair, which is no valid text and cannot be written."""
    return re.search("[\ud800-\udfff]", text) is not None
