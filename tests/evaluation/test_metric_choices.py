"""Which checkpoints BLEU and chrF would choose."""

from collections.abc import Callable
from typing import Any

import pytest
from helpers import make_score_entry

from hw3.data.fingerprint import DatasetFingerprint
from hw3.evaluation.metric_choices import MetricChoice, find_metric_choices
from hw3.evaluation.results import EvalResults
from hw3.evaluation.results_table import print_metric_choices
from hw3.runs.prediction_record import PredictionRecord, TranslationMetrics
from hw3.runs.results_file import PromptReference

MakeResults = Callable[..., EvalResults]


def make_record(step: int, bleu: float, chrf: float, **changes: Any) -> PredictionRecord:
    metrics = TranslationMetrics(2, bleu, chrf, exact_match=0, copy_rate=0, length_ratio=1, unfinished=0)
    record = PredictionRecord(
        key=str(step),
        run="run",
        data=DatasetFingerprint(path="eval.json", sha256="sha256 of eval.json", rows=2),
        name=f"checkpoint-{step}",
        checkpoint=f"checkpoint-{step}",
        adapter_sha256=f"adapter {step}",
        shots=0,
        prompt=PromptReference(name="own", sha256="own"),
        generation={"num_beams": 1},
        seconds=1.0,
        rows_per_second=2.0,
        unfinished_ids=[],
        predictions_sha256="p",
        groups={"all": metrics},
        copy_input={},
    )
    return record.model_copy(update=changes)


@pytest.fixture
def results(make_results: MakeResults) -> EvalResults:
    """Scores of three checkpoints; that of step 20 is the best."""
    entries = [
        make_score_entry(step, perplexity, adapter_sha256=f"adapter {step}")
        for step, perplexity in ((10, 8.0), (20, 6.0), (30, 7.0))
    ]
    return make_results("eval.json", *entries)


def test_metrics_choose_the_highest_value_and_the_earliest_of_equals(
    results: EvalResults, capsys: pytest.CaptureFixture[str]
) -> None:
    choices = find_metric_choices(results, [make_record(30, 31.0, 40.0), make_record(20, 30.0, 40.0)])
    assert choices == [
        MetricChoice("BLEU", "checkpoint-30", 31.0, 30.0, 2),
        MetricChoice("chrF", "checkpoint-20", 40.0, 40.0, 2),
    ]
    print_metric_choices(results, choices)
    assert capsys.readouterr().out == (
        "BLEU would have chosen checkpoint-30 of 2 checkpoints with predictions: 31.00, checkpoint-20 has 30.00\n"
    )


def test_metrics_choose_among_checkpoints_with_predictions_only(results: EvalResults) -> None:
    bleu, _ = find_metric_choices(results, [make_record(10, 20.0, 0.0), make_record(30, 21.0, 0.0)])
    assert bleu == MetricChoice("BLEU", "checkpoint-30", 21.0, None, 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"shots": 4},
        {"prompt": PromptReference(name="other", sha256="other")},
        {"adapter_sha256": "trained again"},
        {"data": DatasetFingerprint(path="eval.json", sha256="other", rows=2)},
        {"groups": {}},
        {"generation": {"num_beams": 4}},
        {"adapter_sha256": None},
    ],
)
def test_one_comparable_set_of_predictions_is_not_enough(results: EvalResults, changes: dict[str, Any]) -> None:
    assert find_metric_choices(results, [make_record(20, 30.0, 40.0), make_record(30, 31.0, 41.0, **changes)]) == []
