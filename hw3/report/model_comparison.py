"""Question 3: a second base model beside the first."""

from __future__ import annotations

from pathlib import Path

from hw3.common.shell_commands import hw3_command
from hw3.report.blocks import Block, Heading, Missing, Table, Text
from hw3.report.checkpoint_scores import final_score_blocks, learning_curve_blocks
from hw3.report.command_lines import eval_command
from hw3.report.fine_tuning import method_blocks
from hw3.report.formatting import CI, format_difference, format_percent, format_perplexity, format_score
from hw3.report.language import tr
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
                tr("This report has only one base model. Train and score a second one, then name both runs:"),
                [
                    "make train MODEL=llama && make eval MODEL=llama && make shots MODEL=llama",
                    hw3_command("report", main.name, "outputs/llama-qlora"),
                ],
            )
        ]
    header = [tr("run"), tr("base model"), tr("parameters"), tr("trained"), tr("zero-shot"), tr("few-shot (examples)")]
    header += [f"{tr('fine-tuned')} {CI}", tr("step"), tr("bits per character, fine-tuned")]
    table = Table(tr("Models side by side"), header, [_model_row(run) for run in (main, *others)], text_columns=2)
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
                Missing(tr("The base model of this run has not been scored yet."), [eval_command(run, base_only=True)])
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
    names = {"run": run.name, "main": main.name}
    if main.best is None or run.best is None:
        return tr("{run} and {main} cannot be compared until both have a scored checkpoint.", **names)
    if not have_same_rows(main, run):
        return tr("{run} and {main} were scored on different rows, so their scores cannot be compared.", **names)
    assert main.results is not None and run.results is not None
    if main.results.settings.tokenizer_sha256 == run.results.settings.tokenizer_sha256:
        pair = compare_entries(main, main.best, run.best, run)
        return tr(
            "{run} and {main} have the same tokenizer, so their perplexities can be compared. The difference is "
            "{difference}: {run} is better on {better} rows and worse on {worse}.",
            difference=format_difference(pair),
            better=pair.better,
            worse=pair.worse,
            **names,
        )
    bits, main_bits = run.best.bits_per_character, main.best.bits_per_character
    return tr(
        "{run} and {main} have different tokenizers. Perplexity is a mean over tokens, so it cannot be compared; bits "
        "per character can. {run} needs {bits:.3f} bits per character, {main} {main_bits:.3f}: {percent} {direction}.",
        bits=bits,
        main_bits=main_bits,
        percent=format_percent(abs(bits / main_bits - 1)),
        direction=tr("fewer") if bits < main_bits else tr("more"),
        **names,
    )
