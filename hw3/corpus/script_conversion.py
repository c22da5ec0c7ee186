"""Convert simplified characters to Traditional ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hw3.common.errors import UserError


def make_converter(conversion: str) -> Callable[[Sequence[str]], list[str]]:
    """Return a function that converts texts in simplified characters.

    Args:
        conversion: "s2tw", OpenCC's conversion to the characters used in Taiwan; "hanziconv", the one-to-one map that
            the homework's rows went through (出 becomes 齣, 了 becomes 瞭); or "none".

    Raises:
        UserError: "hanziconv" is requested and the package hanziconv is not installed.
    """
    if conversion == "s2tw":
        from opencc import OpenCC

        convert: Callable[[str], str] = OpenCC("s2tw").convert
    elif conversion == "hanziconv":
        convert = _load_hanziconv()
    else:
        return list
    # One call converts many texts: no phrase in a conversion's dictionary contains a newline.
    return lambda texts: convert("\n".join(texts)).split("\n") if texts else []


def _load_hanziconv() -> Callable[[str], str]:
    try:
        from hanziconv.charmap import simplified_charmap, traditional_charmap
    except ImportError:
        raise UserError(
            "--convert hanziconv: the package hanziconv is not installed; install it with: "
            "pip install -c constraints.txt hanziconv"
        ) from None
    # hanziconv 0.3.2 searches its map from the left, so the first entry of a repeated character counts.
    table = dict(zip(map(ord, reversed(simplified_charmap)), reversed(traditional_charmap), strict=True))
    return lambda text: text.translate(table)
