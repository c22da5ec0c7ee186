"""The metric for the `evaluate` library gives the evaluator's own scores."""

import math

import evaluate
import pytest
from helpers import REPOSITORY

from hw3.evaluation.perplexity import RowScore, summarize


def test_output_perplexity_loads_offline_and_equals_the_evaluator() -> None:
    scores = [RowScore("a", math.log(8) + 1e-12, 1, 1), RowScore("b", 3 * math.log(2), 3, 2)]
    metric = evaluate.load(str(REPOSITORY / "hw3/metrics/output_perplexity"))
    for score in scores:
        metric.add_batch(predictions=[score.nll], references=[score.tokens], characters=[score.characters])
    computed = metric.compute()
    expected = summarize(scores)
    # Exactly equal: the values stay in float64.
    assert computed["mean_perplexity"] == expected.mean_perplexity == pytest.approx(5)
    assert computed["token_perplexity"] == expected.token_perplexity
    assert computed["bits_per_character"] == expected.bits_per_character
    assert (computed["rows"], computed["tokens"]) == (2, 4)
    combined = evaluate.combine([evaluate.load(str(REPOSITORY / "hw3/metrics/output_perplexity"))])
    values = {"predictions": [score.nll for score in scores], "references": [1, 3], "characters": [1, 2]}
    assert combined.compute(**values)["mean_perplexity"] == expected.mean_perplexity
