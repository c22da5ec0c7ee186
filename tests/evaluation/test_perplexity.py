"""Row perplexities equal their definition, and summaries equal values computed by hand."""

import math

import pytest
import torch
from helpers import compute_row_perplexity
from transformers import PreTrainedModel

from hw3.common.errors import UserError
from hw3.data.tokenization import EncodedRow
from hw3.evaluation.perplexity import RowScore, score_rows, summarize


@pytest.mark.parametrize("reuse_prefix", [True, False])
@pytest.mark.parametrize("tokens_per_batch", [1, 64, 100, 10_000])
def test_score_rows_equals_the_definition_in_any_batch(
    mini_model: PreTrainedModel, encoded_rows: list[EncodedRow], tokens_per_batch: int, reuse_prefix: bool
) -> None:
    """The model's sliding window of 16 tokens ends inside the prompt, so it also limits the common prefix."""
    scores = score_rows(mini_model, encoded_rows, tokens_per_batch=tokens_per_batch, reuse_prefix=reuse_prefix)
    assert [score.id for score in scores] == [row.id for row in encoded_rows]
    for score, row in zip(scores, encoded_rows, strict=True):
        assert score.perplexity == pytest.approx(compute_row_perplexity(mini_model, row), rel=1e-5)
        assert score.tokens == len(row.output_ids) and score.characters == len(row.output_ids) - 1
    reordered = score_rows(
        mini_model, encoded_rows[::-1], tokens_per_batch=tokens_per_batch, reuse_prefix=reuse_prefix
    )[::-1]
    for score, other in zip(scores, reordered, strict=True):
        assert other.perplexity == pytest.approx(score.perplexity, rel=1e-6)


def test_score_rows_reports_the_rows_of_every_batch(
    mini_model: PreTrainedModel, encoded_rows: list[EncodedRow]
) -> None:
    batch_sizes: list[int] = []
    score_rows(mini_model, encoded_rows, tokens_per_batch=100, on_batch=batch_sizes.append)
    assert sum(batch_sizes) == len(encoded_rows) and len(batch_sizes) > 3


def test_score_rows_refuses_log_likelihoods_out_of_range(
    mini_model: PreTrainedModel, encoded_rows: list[EncodedRow]
) -> None:
    with torch.no_grad():
        mini_model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(UserError, match="out of the range of torch"):
        score_rows(mini_model, encoded_rows, tokens_per_batch=100)


def test_summarize_equals_values_computed_by_hand() -> None:
    """Two rows: one token with nll log 8, and three tokens with nll log 2 each."""
    summary = summarize([RowScore("a", math.log(8), 1, 1), RowScore("b", 3 * math.log(2), 3, 2)])
    assert summary.mean_perplexity == pytest.approx((8 + 2) / 2)
    assert summary.token_perplexity == pytest.approx(2 ** (6 / 4))
    assert summary.median_perplexity == pytest.approx(5)
    assert summary.bits_per_character == pytest.approx(6 / 3)
    assert (summary.rows, summary.tokens) == (2, 4)
