"""Question 3: a second base model beside the first."""

from __future__ import annotations

import shlex
from pathlib import Path

from hw3.report.blocks import Block, Heading, Missing, Table, Text
from hw3.report.checkpoint_scores import final_score_blocks, learning_curve_blocks
from hw3.report.command_lines import eval_command
from hw3.report.fine_tuning import method_blocks
from hw3.report.formatting import CI, format_difference, format_percent, format_perplexity, format_score
from hw3.report.prompting import entries_to_compare, scores_blocks
from hw3.report.run_data import RunData, compare_entries, have_same_rows

_NO_VALUE = "—"


def model_comparison_blocks(main: RunData, others: list[RunData], output_dir: Path) -> list[Block]:
    """Return the blocks of question 3.

    Args:
        main: the main run.
        others: runs of other base models.
        output_dir: the folder of the report, for links.
    """
    if not others:
        return [
            Missing(
                "This report has only one base model. Train and score a second one, then name both runs:",
                [
                    "make train MODEL=llama && make eval MODEL=llama && make shots MODEL=llama",
                    f"hw3 report {shlex.quote(main.name)} outputs/llama-qlora",
                ],
            )
        ]
    header = ["run", "base model", "parameters", "trained", "zero-shot", "few-shot (examples)", f"fine-tuned {CI}"]
    header += ["step", "bits per character, fine-tuned"]
    table = Table("Models side by side", header, [_model_row(run) for run in (main, *others)], text_columns=2)
    blocks: list[Block] = [table]
    for run in others:
        blocks += [
            Text(_describe_comparison(main, run)),
            Heading(run.name),
            *method_blocks(run),
            *final_score_blocks(run),
            *learning_curve_blocks(run, output_dir),
        ]
        entries = [] if run.results is None else entries_to_compare(run)
        if entries:
            blocks += scores_blocks(run, entries)
        else:
            blocks.append(
                Missing("The base model of this run has not been scored yet.", [eval_command(run, base_only=True)])
            )
    return blocks


def _model_row(run: RunData) -> list[str]:
    few_shot, zero_shot, best = run.best_few_shot, run.zero_shot, run.best
    counts = None if run.manifest is None else run.manifest.parameters
    return [
        run.name,
        run.base_name,
        *([_NO_VALUE] * 2 if counts is None else [f"{counts.total:,}", f"{counts.trained:,}"]),
        _NO_VALUE if zero_shot is None else format_perplexity(zero_shot.mean_perplexity),
        _NO_VALUE if few_shot is None else f"{format_perplexity(few_shot.mean_perplexity)} ({few_shot.shots})",
        *(
            [_NO_VALUE] * 3
            if best is None
            else [format_score(best), f"{best.step:,}", f"{best.bits_per_character:.3f}"]
        ),
    ]


def _describe_comparison(main: RunData, run: RunData) -> str:
    """Return which scores of two runs with different base models can be compared, and how they compare."""
    if main.best is None or run.best is None:
        return f"{run.name} and {main.name} cannot be compared until both have a scored checkpoint."
    if not have_same_rows(main, run):
        return f"{run.name} and {main.name} were scored on different rows, so their scores cannot be compared."
    assert main.results is not None and run.results is not None
    if main.results.settings.tokenizer_sha256 == run.results.settings.tokenizer_sha256:
        pair = compare_entries(main, main.best, run.best, run)
        return (
            f"{run.name} and {main.name} have the same tokenizer, so their perplexities can be compared. The "
            f"difference is {format_difference(pair)}: {run.name} is better on {pair.better} rows and worse on "
            f"{pair.worse}."
        )
    bits, main_bits = run.best.bits_per_character, main.best.bits_per_character
    return (
        f"{run.name} and {main.name} have different tokenizers. Perplexity is a mean over tokens, so it cannot be "
        f"compared; bits per character can. {run.name} needs {bits:.3f} bits per character, {main.name} "
        f"{main_bits:.3f}: {format_percent(abs(bits / main_bits - 1))} {'fewer' if bits < main_bits else 'more'}."
    )
