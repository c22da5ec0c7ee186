"""Pieces that differ from a reference, and escapes of invisible characters."""

from hypothesis import given
from hypothesis import strategies as st

from hw3.common.text import escape_invisible, split_differences


@given(st.text(), st.text())
def test_split_differences_keeps_the_text(reference: str, output: str) -> None:
    pieces = split_differences(output, reference)
    assert "".join(text for text, _ in pieces) == output
    assert split_differences(output, output) == ([(output, False)] if output else [])


def test_escape_invisible_spells_out_invisible_characters() -> None:
    text = "a\u202eb\u200bc\x00d\ud800e\u2028f\n\tg齣"
    assert escape_invisible(text) == r"a\u202eb\u200bc\u0000d\ud800e\u2028f" + "\n\tg齣"
