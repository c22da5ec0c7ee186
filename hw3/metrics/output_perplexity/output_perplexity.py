"""Output-only perplexity for the `evaluate` library, computed from log-likelihoods.

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
Perplexity of only the output tokens and EOS, given the prompt. `mean_perplexity` is the arithmetic mean over rows of
exp(negative log-likelihood / tokens). `token_perplexity` gives each token the same weight. `bits_per_character` can be
compared between models with different tokenizers.
"""
_INPUTS_DESCRIPTION = """\
Args:
    predictions: negative log-likelihood of each row's output tokens and EOS, in nats, summed.
    references: number of tokens in that sum.
    characters: number of characters of each row's output text.
Returns:
    mean_perplexity, token_perplexity, median_perplexity, bits_per_character, rows, tokens.
"""


class OutputPerplexity(evaluate.Metric):
    """The scores of `hw3 eval`, computed by the same function, `summarize`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS_DESCRIPTION,
            # float64, because Arrow would round values of type "float" to float32.
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
        return asdict(summarize([RowScore(str(index), *row) for index, row in enumerate(rows)]))
