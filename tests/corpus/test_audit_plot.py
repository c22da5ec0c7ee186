"""The plot of `hw3 data check` explains its colors, and its labels can be read."""

from pathlib import Path

import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from hw3.corpus import audit_plot
from hw3.corpus.audit import audit_file
from hw3.data.rows import Row

M2C = Row("a", "今天沒有下雨。\n翻譯成文言文：", "今日無雨。")
C2M = Row("b", "今日無雨。\n翻譯成現代文：", "今天沒有下雨。")


@pytest.fixture
def figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Figure:
    """The plot of nine files with two rows of one direction and one of the other."""
    figures: list[Figure] = []
    monkeypatch.setattr(audit_plot, "save_figure", lambda figure, path, dpi: figures.append(figure))
    rows = [M2C, M2C, C2M]
    (tmp_path / "rows.json").touch()
    audit = audit_file(tmp_path / "rows.json", rows)
    audit_plot.plot_files([(f"file {number}.json", rows, audit) for number in range(9)], tmp_path / "rows.png")
    return figures[0]


def test_legends_name_files_and_directions(figure: Figure) -> None:
    (files,) = figure.legends
    assert [text.get_text() for text in files.get_texts()] == [f"file {number}.json" for number in range(9)]
    directions = figure.axes[2].get_legend()
    assert directions is not None
    assert [text.get_text() for text in directions.get_texts()] == [
        "modern to Classical (m2c)",
        "Classical to modern (c2m)",
        "unknown",
    ]


def test_files_differ_in_color_or_line(figure: Figure) -> None:
    lines = figure.legends[0].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 9


def test_labels_contrast_with_their_bars(figure: Figure) -> None:
    labels = [(text.get_text(), to_rgb(text.get_color())) for text in figure.axes[2].texts]
    assert labels[:2] == [("67%", (1.0, 1.0, 1.0)), ("33%", (0.0, 0.0, 0.0))]
