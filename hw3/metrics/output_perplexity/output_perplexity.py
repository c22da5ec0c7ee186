"""Output-only perplexity as a module of the `evaluate` library, from log-likelihoods that a model has given.

metric = evaluate.load("hw3/metrics/output_perplexity")
metric.add_batch(predictions=[12.5], references=[7], characters=[6])
metric.compute()
"""

from __future__ import annotations

from dataclasses import asdict

import datasets
import evaluate

from hw3.evaluation.perplexity import RowScore, summarize

_DESCRIPTION = """\
Perplexity of the output tokens alone, their EOS included, given the prompt. `mean_perplexity` is the arithmetic mean
over rows of exp(negative log-likelihood / tokens); `token_perplexity` weighs tokens alike; `bits_per_character`
compares models with different tokenizers.
"""
_INPUTS = """\
Args:
    predictions: negative log-likelihood of each row's output tokens and EOS, in nats, summed.
    references: how many tokens that sum runs over.
    characters: characters of each row's output text.
Returns:
    mean_perplexity, token_perplexity, median_perplexity, bits_per_character, rows, tokens.
"""


class OutputPerplexity(evaluate.Metric):
    """The evaluator's own figures, by the evaluator's own `summarize`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            # float64: as "float" the sums would be rounded to float32 on their way through Arrow.
            features=datasets.Features(
                {
                    "predictions": datasets.Value("float64"),
                    "references": datasets.Value("int64"),
                    "characters": datasets.Value("int64"),
                }
            ),
        )

    def _compute(
        self, predictions: list[float], references: list[int], characters: list[int]
    ) -> dict[str, float | int]:
        rows = zip(predictions, references, characters, strict=True)
        return asdict(summarize([RowScore(str(number), *row) for number, row in enumerate(rows)]))
