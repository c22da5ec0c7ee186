"""Matplotlib figures whose texts contain file names: fonts with Chinese characters, and files without dates."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from matplotlib import font_manager, rc_context
from matplotlib.figure import Figure
from matplotlib.text import Text

from hw3.common.atomic_io import write_atomically
from hw3.common.text import count_columns, escape_invisible

logger = logging.getLogger(__name__)

# Fonts of Linux, macOS and Windows. Matplotlib finds only the first font of a `.ttc` file before its version 3.11.
_CJK_FAMILIES = (
    "Noto Sans CJK TC", "Noto Sans TC", "Source Han Sans TC", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans SC",
    "Noto Sans HK", "Noto Sans JP", "Source Han Sans", "Source Han Sans SC", "PingFang TC", "PingFang HK",
    "PingFang SC", "Heiti TC", "STHeiti", "Hiragino Sans GB", "Hiragino Sans", "Songti SC", "Microsoft JhengHei",
    "Microsoft YaHei", "MingLiU", "PMingLiU", "SimHei", "SimSun", "Yu Gothic", "MS Gothic", "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei", "AR PL UMing TW", "AR PL UMing CN", "Noto Serif CJK TC", "Noto Serif CJK JP", "Noto Serif TC",
    "Droid Sans Fallback", "Arial Unicode MS", "Unifont",
)  # fmt: skip


@cache
def font_families() -> list[str]:
    """Return Matplotlib's own font, followed by an installed font with Chinese characters if there is one."""
    manager = font_manager.fontManager
    known = {font.fname for font in manager.ttflist}
    # Matplotlib caches the list of fonts, and does not notice fonts that are installed later.
    for path in font_manager.findSystemFonts():
        if path not in known:
            try:
                manager.addfont(path)
            except Exception:  # FreeType raises errors of several classes for a font that it cannot read
                logger.debug(f"{path}: not a font that Matplotlib reads")
    installed = set(manager.get_font_names())
    return ["DejaVu Sans", *[family for family in _CJK_FAMILIES if family in installed][:1]]


@contextmanager
def figure_settings(settings: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Draw with fonts for Chinese, `$` as a character like any other, and further settings of Matplotlib.

    Missing characters are not reported here: `save_figure` escapes them, and a browser has other fonts.
    """
    style: Any = {"font.family": font_families(), "text.parse_math": False, **(settings or {})}
    with rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        yield


def shorten_name(name: str, columns: int) -> str:
    """Return the end of a name that is wider than a number of columns; a Chinese character takes two columns."""
    name = escape_invisible(name, keep="")
    start, width = len(name), 0
    while start and width < columns:
        start -= 1
        width += count_columns(name[start])
    return f"…{name[start + 1 :]}" if start else name


def save_figure(figure: Figure, path: Path, dpi: float) -> None:
    """Write a figure as a PNG file, and create its folder.

    Characters that no installed font has are written as escapes, and a notice says so.
    """
    fonts = [font_manager.get_font(font_manager.findfont(family)) for family in font_families()]
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        content = text.get_text()
        missing = {character for character in content if not any(font.get_char_index(ord(character)) for font in fonts)}
        if missing := missing - {"\n"}:
            _report_missing_font()
            text.set_text("".join(f"\\u{ord(char):04x}" if char in missing else char for char in content))
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=dpi, metadata={"Software": None})
    write_atomically(path, picture.getvalue())


@cache
def _report_missing_font() -> None:
    logger.warning(
        "no installed font has some characters of the names in a picture, so they are written as escapes; install a "
        "font that has them, such as Debian's package fonts-noto-cjk"
    )
