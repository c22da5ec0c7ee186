"""Names in pictures: fonts with Chinese characters, long names, and characters that no font has."""

import warnings
from pathlib import Path

import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure

from hw3.common import figures
from hw3.common.figures import figure_settings, font_families, save_figure, shorten_name


def draw_title(title: str) -> Figure:
    """Return a figure with a title."""
    with figure_settings():
        figure = Figure(figsize=(4, 1))
        figure.suptitle(title)
    return figure


def test_font_families_contains_installed_fonts_only_and_a_chinese_one_if_there_is_one() -> None:
    installed = {font.name for font in font_manager.FontManager().ttflist}
    assert set(font_families()) <= installed
    if any("CJK" in name for name in installed):
        font = font_manager.get_font(font_manager.findfont(font_families()[1]))
        assert all(font.get_char_index(ord(character)) for character in "測試資料翻譯成現代文")


def test_save_figure_escapes_what_no_font_has_with_one_notice_and_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    figures._report_missing_font.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(2):
            figure = draw_title("$x_1$ \U00013000\U00013001.json")  # Egyptian hieroglyphs
            save_figure(figure, tmp_path / f"new/{number}.png", dpi=72)
            assert figure.get_suptitle() == "$x_1$ \\u13000\\u13001.json"
    assert [record.getMessage()[:26] for record in caplog.records] == ["no installed font has some"]


def test_save_figure_writes_the_same_bytes_again(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save_figure(draw_title("測試"), tmp_path / name, dpi=72)
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_shorten_name_keeps_the_end_that_fits_and_counts_chinese_characters_twice() -> None:
    assert shorten_name("data/eval.json", 14) == "data/eval.json"
    assert shorten_name("data/eval.json", 13) == "…ta/eval.json"
    assert shorten_name("資料/測試.json", 14) == "資料/測試.json"
    assert shorten_name("資料/測試.json", 10) == "…測試.json"
    assert shorten_name("a\u202eb\n", 20) == "a\\u202eb\\u000a"
