"""Put the report together: a summary, the homework's three questions, the predictions, and how to reproduce it all."""

from __future__ import annotations

from pathlib import Path

from hw3.report.blocks import Block, Section, Text, Tiles
from hw3.report.fine_tuning import fine_tuning_blocks, settings_comparison_blocks
from hw3.report.formatting import format_count, format_interval, format_perplexity, format_shots
from hw3.report.language import tr
from hw3.report.model_comparison import model_comparison_blocks
from hw3.report.predictions import build_predictions_section
from hw3.report.prompting import prompting_blocks
from hw3.report.reproducibility import build_reproducibility_section
from hw3.report.run_data import RunData
from hw3.runs.results_file import ScoreEntry


def build_sections(runs: list[RunData], output_dir: Path, options: list[str]) -> list[Section]:
    """Return all sections.

    Args:
        runs: the runs, the main one first. It answers the homework's questions; the others are compared with it.
        output_dir: the folder of the report, for links.
        options: the other options of the report's command.
    """
    main, others = runs[0], runs[1:]
    same_base = [run for run in others if run.base_name == main.base_name]
    other_base = [run for run in others if run.base_name != main.base_name]
    return [
        Section(
            "fine-tuning",
            tr("1. Data, fine-tuning and final score"),
            tr(
                "How much data was used, how the model was fine-tuned, the hyperparameters, the score on the public "
                "set, and the learning curve."
            ),
            [*fine_tuning_blocks(main, output_dir), *settings_comparison_blocks(main, same_base)],
        ),
        Section(
            "prompting",
            tr("2. Zero-shot and few-shot prompting, compared with fine-tuning"),
            tr(
                "Scores of the base model with no and with a few examples in its prompt, how the examples were chosen, "
                "and a comparison with the fine-tuned model."
            ),
            prompting_blocks(main),
        ),
        Section(
            "models",
            tr("3. A second, larger model"),
            tr("The same measurements for another base model, and a comparison of the two."),
            model_comparison_blocks(main, other_base, output_dir),
        ),
        build_predictions_section(runs),
        build_reproducibility_section(runs, output_dir, options),
    ]


def build_summary(run: RunData) -> list[Block]:
    """Return the blocks above all sections: what was scored, and the most important scores."""
    if run.results is None:
        return [Text(tr("{run} has not been scored on {file} yet.", run=run.name, file=run.recipe.data.eval))]
    tiles = []
    if run.best is not None:
        tiles.append(_score_tile(run.best, tr("fine-tuned, step {step:,}", step=run.best.step)))
    for entry in (run.best_few_shot, run.zero_shot):
        if entry is not None:
            tiles.append(_score_tile(entry, tr("base model, {shots}", shots=format_shots(entry))))
    if run.best is not None:
        bits = f"{run.best.bits_per_character:.3f}"
        tiles.append((bits, tr("bits per character, fine-tuned"), tr("comparable across tokenizers")))
    data = run.results.data
    return [
        Text(
            tr(
                "Base model: {base}. Scored on {file}, {rows}. The score is the mean perplexity over rows. A row's "
                "perplexity is that of its output and end-of-sequence token, given the prompt. Lower is better.",
                base=run.base_name,
                file=data.path,
                rows=format_count(data.rows, "row"),
            )
        ),
        Tiles(tiles),
    ]


def _score_tile(entry: ScoreEntry, name: str) -> tuple[str, str, str]:
    return (
        format_perplexity(entry.mean_perplexity),
        name,
        tr("95% CI {interval}", interval=format_interval(entry.mean_perplexity_ci95)),
    )
