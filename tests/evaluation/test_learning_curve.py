"""The learning curve: labels moved apart, and which lines are drawn."""

from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hw3.evaluation.learning_curve import _draw, own_entries, spread
from hw3.evaluation.results import Results


def entry(step: int, mean: float, *, shots: int = 0, checkpoint: str | None = None, prompt: str = "ours") -> dict:
    return {
        "key": f"{checkpoint}+{shots}",
        "step": step,
        "checkpoint": checkpoint,
        "shots": shots,
        "prompt": {"name": prompt, "sha256": prompt},
        "mean_perplexity": mean,
        "mean_perplexity_ci95": [mean - 1, mean + 1],
    }


def results(path: str, *entries: dict) -> Results:
    return Results(Path("eval"), {"run": "outputs/run", "data": {"path": path}}, "ours", list(entries))


def test_labels_that_clash_are_moved_apart() -> None:
    assert spread([], 10) == []
    assert spread([0, 30, 15], 10) == [0, 30, 15]
    assert spread([5, 5], 10) == [0, 10]
    # Three within a gap share the middle; the far one stays.
    assert spread([12, 10, 11, 50], 10) == pytest.approx([21, 1, 11, 50])


@given(st.lists(st.floats(-1e4, 1e4), max_size=12), st.floats(0.5, 50))
def test_spread_keeps_order_and_distance(positions: list[float], gap: float) -> None:
    placed = spread(positions, gap)
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    for before, after in pairwise(order):
        assert placed[after] - placed[before] >= gap - 1e-6
    assert sum(placed) == pytest.approx(sum(positions), abs=1e-4)


def test_other_prompts_and_foreign_adapters_are_no_part_of_the_curve() -> None:
    mine = [entry(0, 30.0), entry(0, 12.0, shots=2), entry(10, 6.0, checkpoint="checkpoint-10")]
    others = [
        entry(0, 40.0, prompt="theirs"),
        entry(10, 5.0, checkpoint="checkpoint-10", prompt="theirs"),
        entry(10, 7.0, shots=2, checkpoint="checkpoint-10"),
        entry(0, 9.0, checkpoint="some/adapter"),
    ]
    assert own_entries(results("eval.json", *others, *mine)) == (mine[:2], mine[2:])


def test_the_dev_file_is_a_line_of_its_own_and_chooses_the_star() -> None:
    tuned = [entry(10, 6.0, checkpoint="checkpoint-10"), entry(20, 7.0, checkpoint="checkpoint-20")]
    scored = results("eval.json", entry(0, 30.0), *tuned)
    dev = results("dev.json", entry(0, 25.0), *({**one, "mean_perplexity": 20 - one["step"] / 2} for one in tuned))
    scored.choose_on(dev)
    figure, axes = plt.subplots()
    try:
        _draw(axes, scored, tuned, [entry(0, 30.0)], [(5, 1.5), (10, 1.0)])
        lines = {line.get_label(): line for line in axes.get_lines()}
        dev_line = lines["on dev.json, which chooses"]
        assert list(dev_line.get_xdata()) == [0, 10, 20] and list(dev_line.get_ydata()) == [25.0, 15.0, 10.0]
        texts = [text.get_text() for text in axes.texts]
        # Best on the dev file is step 20; the figure is the scored file's.
        assert texts == ["base: 30.00", "best: 7.000 at step 20"]
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == [
            "mean perplexity on eval.json, 95 % interval", "on dev.json, which chooses", "training loss",
        ]  # fmt: skip
    finally:
        plt.close(figure)
