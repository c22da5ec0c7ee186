"""Question 1, second half: the final score, the learning curve, and scores by direction, length and row."""

from __future__ import annotations

import os
from pathlib import Path

from hw3.evaluation.bootstrap import PairedDifference
from hw3.evaluation.learning_curve import WIDTH, curve_entries, draw_learning_curve
from hw3.evaluation.metric_choices import MetricChoice, find_metric_choices
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
from hw3.report.language import join_sentences, tr
from hw3.report.run_data import RunData, compare_entries
from hw3.report.svg import interval_drawer, render_figure
from hw3.runs.results_file import ScoreEntry
from hw3.runs.run import CURVE_FILE

_NARROW_PIXELS = 350
_MAX_OPEN_TABLE_ROWS = 12


def final_score_blocks(run: RunData) -> list[Block]:
    """Return the scores of the best checkpoint, how it was selected, and its scores on other files."""
    if run.results is None:
        return [Missing(tr("{file} has not been scored yet.", file=run.recipe.data.eval), [eval_command(run)])]
    best, data = run.best, run.results.data
    if best is None:
        return [Missing(tr("No checkpoint has been scored yet."), [eval_command(run)])]
    last_step = run.checkpoints[-1].step if run.checkpoints else best.step
    blocks: list[Block] = [
        Text(
            tr(
                "The best checkpoint is from step {step:,} of {last:,}. Its scores on the {rows} of {file} are:",
                step=best.step,
                last=last_step,
                rows=format_count(data.rows, "row"),
                file=data.path,
            )
        ),
        Facts(
            [
                (f"{tr('mean perplexity')} {CI}", format_score(best)),
                (tr("median perplexity"), format_perplexity(best.median_perplexity)),
                (tr("token perplexity"), _describe_token_perplexity(best)),
                (tr("bits per character"), f"{best.bits_per_character:.3f}"),
            ]
        ),
        Text(tr("The confidence interval (CI) is a bootstrap interval over rows."), is_note=True),
        Text(_describe_selection(run.results), is_note=True),
    ]
    choices = find_metric_choices(run.results, [predictions.record for predictions in run.predictions])
    if choices:
        blocks.append(Text(join_sentences(*(_describe_choice(choice, best) for choice in choices)), is_note=True))
    if run.other_results:
        blocks.append(_other_files_table(run.other_results, best))
    if best.unknown_tokens:
        percent = format_percent(best.unknown_tokens / best.tokens)
        blocks.append(
            Text(
                tr(
                    "The tokenizer does not know {count:,} of the output tokens ({percent}).",
                    count=best.unknown_tokens,
                    percent=percent,
                ),
                is_note=True,
            )
        )
    return blocks


def _describe_token_perplexity(best: ScoreEntry) -> str:
    perplexity = format_perplexity(best.token_perplexity)
    return tr("{perplexity}, over {tokens:,} output tokens", perplexity=perplexity, tokens=best.tokens)


def _describe_selection(results: EvalResults) -> str:
    selected_on = (results.selector or results).data.path
    if selected_on != results.data.path:
        selection = tr(
            "The checkpoint was selected on {selected_on}, so {file} did not influence the choice.",
            selected_on=selected_on,
            file=results.data.path,
        )
    else:
        selection = tr(
            "The best checkpoint was selected on the file that its score is reported on, as the course does. This "
            "makes the score look slightly better than it is."
        )
    if results.best_by == "mean_perplexity":
        return selection
    return join_sentences(selection, tr("It is the one with the lowest token perplexity."))


def _describe_choice(choice: MetricChoice, best: ScoreEntry) -> str:
    """Return whether a translation metric would have chosen another checkpoint."""
    values = {"metric": choice.metric, "count": choice.checkpoints, "value": f"{choice.value:.1f}"}
    if choice.checkpoint == best.checkpoint:
        return tr(
            "Of the {count} checkpoints with predictions, {metric} would have chosen the same one ({value}).", **values
        )
    text = tr(
        "Of the {count} checkpoints with predictions, {metric} would have chosen {other} ({value}).",
        other=choice.checkpoint,
        **values,
    )
    if choice.best_value is None:
        return text
    own = tr("{checkpoint} has {value}.", checkpoint=best.checkpoint, value=f"{choice.best_value:.1f}")
    return join_sentences(text, own)


def _other_files_table(other_results: list[EvalResults], best: ScoreEntry) -> Table:
    rows = []
    for results in other_results:
        entries = curve_entries(results)
        zero_shot = next((entry for entry in entries.base if entry.shots == 0), None)
        same_checkpoint = next((entry for entry in entries.finetuned if entry.checkpoint == best.checkpoint), None)
        scores = [tr("not scored") if entry is None else format_score(entry) for entry in (zero_shot, same_checkpoint)]
        rows.append([results.data.path, f"{results.data.rows:,}", *scores])
    header = [
        tr("file"),
        tr("rows"),
        f"{tr('base model, zero-shot')} {CI}",
        f"{tr('step {step:,}', step=best.step)} {CI}",
    ]
    return Table(tr("The same checkpoint on other files"), header, rows)


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
    description = tr("Learning curve of {run} on {file}", run=results.run_name, file=results.data.path)
    if run.best is not None:
        best = format_perplexity(run.best.mean_perplexity)
        description += tr(": best {perplexity} at step {step}", perplexity=best, step=run.best.step)
    wide, narrow = (
        render_figure(draw_learning_curve(results, run.losses, width, tr), "curve", description)
        for width in (WIDTH, _NARROW_PIXELS)
    )
    how_to_read = tr(
        "How to read it: each point is a checkpoint, and lower is better. The shaded band is the 95% confidence "
        "interval. Horizontal lines are the base model. Where the line rises again, the model overfits."
    )
    blocks: list[Block] = [Curve(wide, narrow, link), Text(how_to_read, is_note=True)]
    if run.best is None:
        return blocks
    blocks.append(_checkpoint_table(run, run.best, tr("best") if results.selector is results else tr("selected")))
    how_to_read = tr(
        "How to read it: each point is a mean perplexity on a log scale, its line the 95% confidence interval."
    )
    blocks.append(Text(how_to_read, is_note=True))
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
                tr("{name} ({detail})", name=f"{best.step:,}", detail=mark) if entry is best else f"{entry.step:,}",
                draw_interval(entry),
                format_score(entry),
                format_perplexity(entry.median_perplexity),
                format_perplexity(entry.token_perplexity),
                f"{entry.bits_per_character:.3f}",
                *comparison,
            ]
        )
    header = [tr("step"), "", f"{tr('mean')} {CI}", tr("median"), tr("token"), tr("bits per character")]
    header += [f"{tr('difference from {name}', name=mark)} {CI}", tr("rows better / worse")]
    return Table(
        tr("Perplexity by checkpoint"),
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
    change = tr(
        "From step {step:,} to step {last:,}, the mean perplexity changes by {difference} (paired difference).",
        step=best.step,
        last=last.step,
        difference=format_difference(pair),
    )
    if not pair.is_significant:
        conclusion = tr("The interval contains 0, so the difference is not significant.")
    elif pair.difference > 0:
        conclusion = tr("The model overfits after step {step:,}.", step=best.step)
    else:
        conclusion = tr("On this file, the last checkpoint is significantly better.")
    return join_sentences(change, conclusion)


def score_breakdown_blocks(run: RunData) -> list[Block]:
    """Return scores by direction and output length, and the rows that contribute most to the mean."""
    shown = [entry for entry in (run.zero_shot, run.best_few_shot, run.best) if entry is not None]
    if not shown:
        return []
    rows = []
    for groups in ([entry.by_direction for entry in shown], [entry.by_length for entry in shown]):
        for key in dict.fromkeys(key for scores in groups for key in scores):
            scores = [by_key[key] for by_key in groups]
            name = tr(GROUP_NAMES[key]) if key in GROUP_NAMES else format_length_group(key)
            rows.append([name, f"{scores[0].rows:,}", *(format_perplexity(score.mean_perplexity) for score in scores)])
    models = [
        tr("fine-tuned") if entry is run.best else tr("base model, {shots}", shots=format_shots(entry))
        for entry in shown
    ]
    blocks: list[Block] = [
        Heading(tr("Scores by direction and output length")),
        Table(
            tr("Mean perplexity by direction and by number of output characters"),
            [tr("group"), tr("rows"), *models],
            rows,
        ),
    ]
    if run.best is not None:
        blocks.append(_top_contributors_table(run.best))
    return blocks


def _top_contributors_table(best: ScoreEntry) -> Table:
    top = best.top_contributors
    percent = format_percent(sum(row.share for row in top))
    return Table(
        tr(
            "The {count} rows with the highest perplexity make up {percent} of the fine-tuned model's mean",
            count=len(top),
            percent=percent,
        ),
        [tr("row"), tr("perplexity"), tr("share of the sum"), tr("tokens")],
        [[row.id, format_perplexity(row.perplexity), format_percent(row.share), f"{row.tokens:,}"] for row in top],
        is_collapsed=True,
    )
