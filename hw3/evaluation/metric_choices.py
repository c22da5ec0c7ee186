"""Compare the checkpoint with the lowest perplexity with those that translation metrics would choose."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from hw3.evaluation.results import EvalResults
from hw3.runs.prediction_record import PredictionRecord
from hw3.runs.results_file import finetuned_entries

METRIC_NAMES = {"bleu": "BLEU", "chrf": "chrF"}


@dataclass(frozen=True)
class MetricChoice:
    """What a translation metric chooses among the checkpoints with predictions.

    Attributes:
        metric: `BLEU` or `chrF`.
        checkpoint: the checkpoint with the highest value, the earliest of equals.
        value: its value.
        best_value: the value of the checkpoint with the lowest perplexity; None if it has no predictions.
        checkpoints: number of checkpoints with predictions.
    """

    metric: str
    checkpoint: str
    value: float
    best_value: float | None
    checkpoints: int


def find_metric_choices(results: EvalResults, records: Iterable[PredictionRecord]) -> list[MetricChoice]:
    """Return what BLEU and chrF choose; nothing unless several scored checkpoints have predictions for the same rows.

    Args:
        results: the scores on a data file.
        records: the predictions of the run. Those that were made in another way than most are left out.
    """
    best = results.best_entry()
    steps = {entry.adapter_sha256: entry.step for entry in finetuned_entries(results.entries, results.prompt_sha256)}
    by_generation: dict[str, list[PredictionRecord]] = {}
    for record in records:
        is_scored = record.adapter_sha256 in steps and record.data.sha256 == results.data.sha256 and record.groups
        if is_scored and record.shots == 0 and record.prompt.sha256 == results.prompt_sha256:
            by_generation.setdefault(json.dumps(record.generation, sort_keys=True), []).append(record)
    compared = max(by_generation.values(), key=len, default=[])
    compared.sort(key=lambda record: steps[record.adapter_sha256])
    if best is None or len(compared) < 2:
        return []
    choices = []
    for field, metric in METRIC_NAMES.items():
        values = {record.name: getattr(record.groups["all"], field) for record in compared}
        name = max(values, key=lambda name: values[name])
        choices.append(MetricChoice(metric, name, values[name], values.get(best.checkpoint or ""), len(compared)))
    return choices
