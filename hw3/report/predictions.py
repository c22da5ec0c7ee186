"""The predictions: their metrics, and every row with the outputs of all systems."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hw3.common.text import split_differences
from hw3.data.templates import detect_direction
from hw3.evaluation.perplexity import RowScore
from hw3.evaluation.translation_metrics import METRIC_DESCRIPTIONS, METRICS_OF_COPYING, format_metric
from hw3.report.blocks import (
    Block,
    Facts,
    Heading,
    Missing,
    RowBrowser,
    RowComparison,
    Section,
    SystemOutput,
    Table,
    Text,
)
from hw3.report.command_lines import predict_command
from hw3.report.formatting import GROUP_NAMES, SHORT_GROUP_NAMES
from hw3.report.language import tr
from hw3.report.run_data import RunData, have_same_rows
from hw3.runs.prediction_record import TranslationMetrics
from hw3.runs.results_file import ScoreEntry

_SAMPLE_ROWS = 10  # in Markdown


@dataclass(frozen=True)
class System:
    """A model with a prompt: its scores of the rows, its predictions, or both.

    Attributes:
        label: its name.
        perplexities: perplexity of the reference by row id.
        outputs: predicted text by row id.
        unfinished_ids: ids of predictions that were cut at their length limit.
    """

    label: str
    perplexities: dict[str, float]
    outputs: dict[str, str]
    unfinished_ids: frozenset[str]


def build_predictions_section(runs: list[RunData]) -> Section:
    """Return the metrics of the predictions and a comparison row by row.

    Args:
        runs: the runs. Those that were scored on other rows than the first are left out.
    """
    main = runs[0]
    compared = [run for run in runs if have_same_rows(main, run)]
    blocks: list[Block] = []
    for run in compared or [main]:
        if missing := _missing_predictions(run):
            if run.predictions:
                systems = tr(" and ").join(missing)
                text = tr(
                    "{run} has no predictions from {systems} yet. To generate them:", run=run.name, systems=systems
                )
            else:
                text = tr(
                    "{run} has no predictions yet, only perplexities of the references. To generate them:", run=run.name
                )
            blocks.append(Missing(text, [predict_command(run, name) for name in missing]))
    blocks += [Text(note, is_note=True) for run in compared for note in run.notes]
    blocks += _metrics_blocks(compared)
    blocks += _comparison_blocks(compared)
    return Section(
        "predictions",
        tr("Predictions"),
        tr(
            "Perplexity measures how well a model predicts the references. This section shows what the models generate."
        ),
        blocks,
    )


def _missing_predictions(run: RunData) -> list[str]:
    """Return the systems without predictions, out of the best checkpoint, the base model, and its best few-shot prompt.

    Before scoring, the last checkpoint and the base model are expected.
    """
    expected = [entry.label for entry in (run.best, run.zero_shot, _best_prompt_examples(run)) if entry is not None]
    if not expected:
        expected = [*(checkpoint.name for checkpoint in run.checkpoints[-1:]), "base"]
    predicted = {predictions.name for predictions in run.predictions}
    return [name for name in expected if name not in predicted]


def _best_prompt_examples(run: RunData) -> ScoreEntry | None:
    """Return the base model's best entry with few-shot examples of the prompt; `hw3 predict` does not sample any."""
    few_shot = [entry for entry in run.base_entries if entry.shots and not entry.example_ids]
    return min(few_shot, key=lambda entry: entry.mean_perplexity, default=None)


def _metrics_blocks(runs: list[RunData]) -> list[Block]:
    rows: list[list[str]] = []
    copying: list[list[str]] = []
    for run in runs:
        for predictions in run.predictions:
            record = predictions.record
            copying = copying or _metrics_rows(tr("copying the input"), record.copy_input, METRICS_OF_COPYING)
            rows += _metrics_rows(_label(runs, run, predictions.name), record.groups, tuple(METRIC_DESCRIPTIONS))
    if not rows:
        return []
    rows = [*copying, *rows]
    highlighted = {index for index, row in enumerate(rows) if row[1] == tr(SHORT_GROUP_NAMES["all"])}
    descriptions = [(tr(title), tr(meaning)) for title, meaning in METRIC_DESCRIPTIONS.values()]
    header = [tr("predictions"), tr("group"), tr("rows"), *(title for title, _ in descriptions)]
    return [
        Heading(tr("Metrics")),
        Table(tr("Metrics of the predictions, and of copying the input"), header, rows, highlighted, text_columns=2),
        Facts(descriptions),
        Text(tr("BLEU is character BLEU-4 and chrF is chrF2, both computed with sacrebleu."), is_note=True),
    ]


def _metrics_rows(label: str, groups: dict[str, TranslationMetrics], shown: Sequence[str]) -> list[list[str]]:
    return [
        [
            label,
            tr(SHORT_GROUP_NAMES[name]),
            f"{groups[name].rows:,}",
            *(
                format_metric(metric, getattr(groups[name], metric)) if metric in shown else ""
                for metric in METRIC_DESCRIPTIONS
            ),
        ]
        for name in GROUP_NAMES
        if name in groups
    ]


def _label(runs: list[RunData], run: RunData, name: str) -> str:
    """Return the name of a system, with its run if there are several."""
    return name if len(runs) == 1 else f"{run.name}: {name}"


def _systems(runs: list[RunData]) -> list[System]:
    """Return the base model without and with few-shot examples, all systems with predictions, the best checkpoint."""
    systems = []
    for run in runs:
        assert run.results is not None
        # `hw3 predict` uses the prompt's own examples, so scores with sampled examples belong to no predictions.
        entries = {
            entry.label: entry
            for entry in run.results.entries
            if entry.prompt.sha256 == run.results.prompt_sha256 and not entry.example_ids
        }
        predictions = {predictions.name: predictions for predictions in run.predictions}
        best = [] if run.best is None else [run.best.label]
        base = [entry.label for entry in (run.zero_shot, _best_prompt_examples(run)) if entry is not None]
        for name in dict.fromkeys([*base, *(name for name in predictions if name not in best), *best]):
            scores = run.results.row_scores[entries[name].key] if name in entries else []
            found = predictions.get(name)
            systems.append(
                System(
                    label=_label(runs, run, name),
                    perplexities={score.id: score.perplexity for score in scores},
                    outputs={} if found is None else found.outputs,
                    unfinished_ids=frozenset() if found is None else frozenset(found.record.unfinished_ids),
                )
            )
    return systems


def _comparison_blocks(runs: list[RunData]) -> list[Block]:
    systems = _systems(runs) if runs else []
    if not systems:
        return []
    main = runs[0]
    assert main.results is not None
    scored = [system for system in systems if system.perplexities]
    gains = _log_gains(main)
    orders = [tr("file order"), tr("largest ratio of perplexities first"), tr("longest reference first")]
    orders += [tr("highest perplexity first: {system}", system=system.label) for system in scored]
    orders += [tr("largest gain from fine-tuning first")] if gains else []
    rows = []
    for index, score in enumerate(next(iter(main.results.row_scores.values()))):
        perplexities = [system.perplexities[score.id] for system in scored]
        sort_keys = [float(index), -_log_ratio(perplexities), -float(score.characters)]
        sort_keys += [-perplexity for perplexity in perplexities]
        sort_keys += [-gains[score.id]] if gains else []
        rows.append(_compare_outputs(main, score, systems, sort_keys))
    sample = [rows[index] for index in spaced_indices(len(rows), _SAMPLE_ROWS)]
    return [Heading(tr("Row by row"), "rows"), RowBrowser(rows, orders, sample)]


def _log_gains(run: RunData) -> dict[str, float]:
    """Return by row id the log of the base model's perplexity divided by the best checkpoint's."""
    if run.results is None or run.zero_shot is None or run.best is None:
        return {}
    before, after = run.results.row_scores[run.zero_shot.key], run.results.row_scores[run.best.key]
    return {a.id: math.log(b.perplexity / a.perplexity) for a, b in zip(after, before, strict=True)}


def _log_ratio(perplexities: list[float]) -> float:
    """Return the log of the highest perplexity of a row divided by the lowest."""
    return math.log(max(perplexities) / min(perplexities)) if perplexities else 0.0


def _compare_outputs(run: RunData, score: RowScore, systems: list[System], sort_keys: list[float]) -> RowComparison:
    row = run.rows.get(score.id)
    reference = None if row is None else row.output
    return RowComparison(
        id=score.id,
        direction="other" if row is None else detect_direction(row.instruction) or "other",
        instruction=None if row is None else row.instruction,
        reference=reference,
        outputs=[
            SystemOutput(
                system.label,
                system.perplexities.get(score.id),
                split_differences(system.outputs[score.id], reference) if score.id in system.outputs else None,
                score.id in system.unfinished_ids,
            )
            for system in systems
        ],
        sort_keys=sort_keys,
    )


def spaced_indices(count: int, limit: int) -> list[int]:
    """Return at most `limit` indices below `count`, evenly spaced, the first and the last included.

    The step is not a fixed number: rows often alternate between directions, and a step of 2 would show one direction.
    """
    if count <= limit:
        return list(range(count))
    return [round(number * (count - 1) / (limit - 1)) for number in range(limit)]
