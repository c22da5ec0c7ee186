"""The learning curve: which entries are drawn, and what the figure shows."""

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest
from helpers import make_score_entry

from hw3.evaluation.learning_curve import (
    COLORS,
    CurveEntries,
    curve_entries,
    draw_learning_curve,
    log_ticks,
    save_learning_curve,
)
from hw3.evaluation.results import EvalResults

MakeResults = Callable[..., EvalResults]


def test_curve_entries_leave_out_other_prompts_few_shot_checkpoints_and_external_adapters(
    make_results: MakeResults,
) -> None:
    base, few_shot = make_score_entry(0, 30.0), make_score_entry(0, 12.0, shots=2)
    finetuned = make_score_entry(10, 6.0)
    others = [
        make_score_entry(0, 40.0, prompt="other"),
        make_score_entry(10, 5.0, prompt="other"),
        make_score_entry(10, 7.0, shots=2),
        make_score_entry(0, 9.0, checkpoint="some/adapter"),
    ]
    entries = curve_entries(make_results("eval.json", *others, few_shot, base, finetuned))
    assert entries == CurveEntries([base, few_shot], [finetuned])
    assert entries.line == [base, finetuned]


def test_draw_learning_curve_shows_the_dev_file_and_stars_the_checkpoint_that_it_selects(
    make_results: MakeResults,
) -> None:
    results = make_results("eval.json", make_score_entry(0, 30.0), make_score_entry(10, 6.0), make_score_entry(20, 7.0))
    dev = make_results("dev.json", make_score_entry(0, 25.0), make_score_entry(10, 15.0), make_score_entry(20, 10.0))
    results.select_on(dev)
    figure = draw_learning_curve(results, [(5, 1.5), (10, 1.0)])
    scores, loss = figure.axes
    lines = {line.get_label(): line for line in scores.get_lines()}
    dev_line = lines["dev.json, selects the best"]
    assert list(dev_line.get_xdata()) == [0, 10, 20] and list(dev_line.get_ydata()) == [25.0, 15.0, 10.0]
    # The dev file selects step 20. The value beside the star is its score on the eval file.
    assert [text.get_text() for text in scores.texts] == ["base 30.00", "best 7.00, step 20"]
    assert [tuple(line.get_xdata()) for line in loss.get_lines()] == [(5, 10)]
    assert scores.get_xlim() == loss.get_xlim()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "eval.json, 95 % interval",
        "dev.json, selects the best",
    ]


def test_draw_learning_curve_names_every_score_with_its_interval(make_results: MakeResults) -> None:
    base, finetuned = make_score_entry(0, 30.0), make_score_entry(10, 6.0)
    figure = draw_learning_curve(make_results("eval.json", base, finetuned), [])
    low, high = base.mean_perplexity_ci95
    level = f"base: 30.000 [{low:.2f}, {high:.2f}]"
    tooltips = {artist.get_gid() for artist in figure.findobj()} - {None}
    assert {name.partition(" [")[0] for name in tooltips} == {
        "base: 30.000", "step 0: 30.000", "step 10: 6.000", "best: step 10: 6.000",
    }  # fmt: skip
    assert level in tooltips


@pytest.mark.parametrize("width", [350, 760])
def test_draw_learning_curve_keeps_long_names_inside_the_picture(make_results: MakeResults, width: int) -> None:
    name = f"{'資料' * 90}$_{{\\x}}.json"
    results = make_results(name, make_score_entry(0, 30.0), make_score_entry(10, 6.0))
    results.select_on(make_results(f"dev-{name}", make_score_entry(10, 6.0)))
    figure = draw_learning_curve(results, [(5, 1.5)], width)
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= width
    assert figure.axes[0].get_window_extent().width > 0.6 * width


def test_log_ticks_are_round_and_inside() -> None:
    assert log_ticks(0.9, 6000.0) == [1.0, 10.0, 100.0, 1000.0]
    assert log_ticks(3.5, 33.0) == [4.0, 5.0, 6.0, 8.0, 10.0, 20.0, 30.0]
    assert log_ticks(4.4, 4.9) == pytest.approx([4.4, 4.5, 4.6, 4.7, 4.8, 4.9])


def test_save_learning_curve_writes_a_png(make_results: MakeResults, tmp_path: Path) -> None:
    path = tmp_path / "eval/learning_curve.png"
    save_learning_curve(make_results("eval.json", make_score_entry(0, 30.0)), [], path)
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_colors_are_those_of_the_report_page() -> None:
    style = (files("hw3.report") / "page.css").read_text(encoding="utf-8")
    assert all(f"--{name}: {color};" in style for name, color in COLORS.items())
