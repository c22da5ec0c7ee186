"""The learning curve: which entries are drawn, and what the figure shows."""

from collections.abc import Callable
from pathlib import Path

from helpers import make_score_entry

from hw3.evaluation.learning_curve import CurveEntries, curve_entries, draw_learning_curve, save_learning_curve
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
    axes = figure.axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    dev_line = lines["on dev.json, which selects the best"]
    assert list(dev_line.get_xdata()) == [0, 10, 20] and list(dev_line.get_ydata()) == [25.0, 15.0, 10.0]
    # The dev file selects step 20. The value beside the star is its score on the eval file.
    assert [text.get_text() for text in axes.texts] == ["base: 30.00", "best: 7.000 at step 20"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "mean perplexity on eval.json, 95 % interval",
        "on dev.json, which selects the best",
        "training loss",
    ]


def test_save_learning_curve_writes_a_png(make_results: MakeResults, tmp_path: Path) -> None:
    path = tmp_path / "eval/learning_curve.png"
    save_learning_curve(make_results("eval.json", make_score_entry(0, 30.0)), [], path)
    assert path.read_bytes()[:4] == b"\x89PNG"
