"""Simplified characters to Traditional ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hw3.common.errors import UserError

CONVERSIONS = ("s2tw", "hanziconv", "none")


def converter(name: str) -> Callable[[Sequence[str]], list[str]]:
    """A function from texts in simplified characters to the same texts converted.

    Args:
        name: `s2tw`, OpenCC's conversion to the characters of Taiwan; `hanziconv`, the one-to-one map that the
            homework went through (出 becomes 齣, 了 becomes 瞭); `none`.

    Raises:
        UserError: the package hanziconv is asked for and is not installed.
    """
    if name == "s2tw":
        from opencc import OpenCC

        convert = OpenCC("s2tw").convert
    elif name == "hanziconv":
        convert = _hanziconv()
    else:
        return list
    # One call for many texts: no word of a conversion's dictionary holds a line end.
    return lambda texts: convert("\n".join(texts)).split("\n") if texts else []


def _hanziconv() -> Callable[[str], str]:
    try:
        from hanziconv.charmap import simplified_charmap, traditional_charmap
    except ImportError:
        raise UserError(
            "--convert hanziconv: the package hanziconv is not installed: pip install -c constraints.txt hanziconv"
        ) from None
    # The first entry counts where the package's map has a character twice, as in its own search from the left.
    table = dict(zip(map(ord, reversed(simplified_charmap)), reversed(traditional_charmap), strict=True))
    return lambda text: text.translate(table)
