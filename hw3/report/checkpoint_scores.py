"""Question 1, second half: the final score, the learning curve, and scores by direction, length and row."""

from __future__ import annotations

import os
from pathlib import Path

from hw3.evaluation.bootstrap import PairedDifference
from hw3.evaluation.learning_curve import curve_entries
from hw3.evaluation.results import EvalResults
from hw3.report.blocks import Block, Curve, Facts, Heading, Missing, Table, Text
from hw3.report.command_lines import eval_command
from hw3.report.formatting import (
    CI,
    GROUP_NAMES,
    format_comparison,
    format_count,
    format_difference,
    format_length_group,
    format_percent,
    format_perplexity,
    format_score,
    format_shots,
)
from hw3.report.run_data import RunData, compare_entries
from hw3.report.svg import interval_drawer
from hw3.report.svg_learning_curve import LearningCurve
from hw3.runs.results_file import ScoreEntry
from hw3.runs.run import CURVE_FILE

_WIDE_PIXELS, _NARROW_PIXELS = 760, 350
_MAX_OPEN_TABLE_ROWS = 12


def final_score_blocks(run: RunData) -> list[Block]:
    """Return the scores of the best checkpoint, how it was selected, and its scores on other files."""
    if run.results is None:
        return [Missing(f"{run.recipe.data.eval} has not been scored yet.", [eval_command(run)])]
    best, data = run.best, run.results.data
    if best is None:
        return [Missing("No checkpoint has been scored yet.", [eval_command(run)])]
    last_step = run.checkpoints[-1].step if run.checkpoints else best.step
    blocks: list[Block] = [
        Text(
            f"The best checkpoint is from step {best.step:,} of {last_step:,}. Its scores on the "
            f"{format_count(data.rows, 'row')} of {data.path} are:"
        ),
        Facts(
            [
                (f"mean perplexity {CI}", format_score(best)),
                ("median perplexity", format_perplexity(best.median_perplexity)),
                ("token perplexity", f"{format_perplexity(best.token_perplexity)}, over {best.tokens:,} output tokens"),
                ("bits per character", f"{best.bits_per_character:.3f}"),
            ]
        ),
        Text("The confidence interval (CI) is a bootstrap interval over rows.", is_note=True),
        Text(_describe_selection(run.results), is_note=True),
    ]
    if run.other_results:
        blocks.append(_other_files_table(run.other_results, best))
    if best.unknown_tokens:
        percent = format_percent(best.unknown_tokens / best.tokens)
        blocks.append(
            Text(f"The tokenizer does not know {best.unknown_tokens:,} of the output tokens ({percent}).", is_note=True)
        )
    return blocks


def _describe_selection(results: EvalResults) -> str:
    selected_on = (results.selector or results).data.path
    if selected_on != results.data.path:
        return f"The checkpoint was selected on {selected_on}, so {results.data.path} did not influence the choice."
    return (
        "The best checkpoint was selected on the file that its score is reported on, as the course does. This makes "
        "the score look slightly better than it is."
    )


def _other_files_table(other_results: list[EvalResults], best: ScoreEntry) -> Table:
    rows = []
    for results in other_results:
        entries = curve_entries(results)
        zero_shot = next((entry for entry in entries.base if entry.shots == 0), None)
        same_checkpoint = next((entry for entry in entries.finetuned if entry.checkpoint == best.checkpoint), None)
        scores = ["not scored" if entry is None else format_score(entry) for entry in (zero_shot, same_checkpoint)]
        rows.append([results.data.path, f"{results.data.rows:,}", *scores])
    header = ["file", "rows", f"base model, zero-shot {CI}", f"step {best.step:,} {CI}"]
    return Table("The same checkpoint on other files", header, rows)


def learning_curve_blocks(run: RunData, output_dir: Path) -> list[Block]:
    """Return the learning curve, the scores by checkpoint, and whether the run overfits.

    Args:
        run: the run.
        output_dir: the folder of the report, for links.
    """
    results = run.results
    if results is None or not (run.base_entries or run.finetuned_entries):
        return []
    picture = results.folder / CURVE_FILE
    link = Path(os.path.relpath(picture, output_dir)).as_posix() if picture.is_file() else None
    wide, narrow = (LearningCurve(results, run.losses, width).draw() for width in (_WIDE_PIXELS, _NARROW_PIXELS))
    blocks: list[Block] = [Curve(wide, narrow, link, results.selector is not results)]
    if run.best is None:
        return blocks
    blocks.append(_checkpoint_table(run, run.best, "best" if results.selector is results else "selected"))
    last = run.finetuned_entries[-1]
    if last is not run.best:
        blocks.append(Text(_describe_end_of_run(run.best, last, compare_entries(run, run.best, last))))
    return blocks


def _checkpoint_table(run: RunData, best: ScoreEntry, mark: str) -> Table:
    entries = run.finetuned_entries
    draw_interval = interval_drawer(entries)
    rows = []
    for entry in entries:
        comparison = format_comparison(None if entry is best else compare_entries(run, best, entry))
        rows.append(
            [
                f"{entry.step:,}" + (f" ({mark})" if entry is best else ""),
                draw_interval(entry),
                format_score(entry),
                format_perplexity(entry.median_perplexity),
                format_perplexity(entry.token_perplexity),
                f"{entry.bits_per_character:.3f}",
                *comparison,
            ]
        )
    header = ["step", "", f"mean {CI}", "median", "token", "bits per character"]
    header += [f"difference from {mark} {CI}", "rows better / worse"]
    return Table(
        "Perplexity by checkpoint",
        header,
        rows,
        highlighted={index for index, entry in enumerate(entries) if entry is best},
        text_columns=2,
        is_collapsed=len(rows) > _MAX_OPEN_TABLE_ROWS,
    )


def _describe_end_of_run(best: ScoreEntry, last: ScoreEntry, pair: PairedDifference) -> str:
    """Return a sentence on the last checkpoint.

    Args:
        best: the selected checkpoint.
        last: the last checkpoint.
        pair: the last checkpoint's perplexities minus those of the selected one.
    """
    change = (
        f"From step {best.step:,} to step {last.step:,}, the mean perplexity changes by {format_difference(pair)} "
        "(paired difference)."
    )
    if not pair.is_significant:
        return f"{change} The interval contains 0, so the difference is not significant."
    if pair.difference > 0:
        return f"{change} The model overfits after step {best.step:,}."
    return f"{change} On this file, the last checkpoint is significantly better."


def score_breakdown_blocks(run: RunData) -> list[Block]:
    """Return scores by direction and output length, and the rows that contribute most to the mean."""
    shown = [entry for entry in (run.zero_shot, run.best_few_shot, run.best) if entry is not None]
    if not shown:
        return []
    rows = []
    for groups in ([entry.by_direction for entry in shown], [entry.by_length for entry in shown]):
        for key in dict.fromkeys(key for scores in groups for key in scores):
            scores = [by_key[key] for by_key in groups]
            name = GROUP_NAMES.get(key) or format_length_group(key)
            rows.append([name, f"{scores[0].rows:,}", *(format_perplexity(score.mean_perplexity) for score in scores)])
    models = ["fine-tuned" if entry is run.best else f"base model, {format_shots(entry)}" for entry in shown]
    blocks: list[Block] = [
        Heading("Scores by direction and output length"),
        Table("Mean perplexity by direction and by number of output characters", ["group", "rows", *models], rows),
    ]
    if run.best is not None:
        blocks.append(_top_contributors_table(run.best))
    return blocks


def _top_contributors_table(best: ScoreEntry) -> Table:
    top = best.top_contributors
    percent = format_percent(sum(row.share for row in top))
    return Table(
        f"The {len(top)} rows with the highest perplexity make up {percent} of the fine-tuned model's mean",
        ["row", "perplexity", "share of the sum", "tokens"],
        [[row.id, format_perplexity(row.perplexity), format_percent(row.share), f"{row.tokens:,}"] for row in top],
        is_collapsed=True,
    )
