"""Output-only perplexity: how well a model predicts the reference output of each row, given the prompt.

For a row with output tokens y_1 … y_T, the last of which is EOS, and prompt x, the negative log-likelihood is

    nll = -sum_t log p(y_t | x, y_1 … y_{t-1})

and the perplexity of the row is exp(nll / T). Prompt tokens are read by the model but not scored. The course's score is
the arithmetic mean of the rows' perplexities.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from hw3.common.errors import UserError
from hw3.data.batching import batch_by_length, common_prefix_length
from hw3.data.tokenization import EncodedRow
from hw3.modeling.cache_argument import CACHE_ARGUMENT
from hw3.modeling.logits import LOGITS_CHUNK_POSITIONS, allow_tf32_for_adapters, compute_logits

# In nats. exp(x) overflows float64 for x > 709.78; 700 leaves a margin.
MAX_NLL_PER_TOKEN = 700.0


@dataclass(frozen=True, slots=True)
class RowScore:
    """The score of one row under one model.

    Attributes:
        id: the row's id.
        nll: negative log-likelihood of the output tokens and EOS, in nats, summed in float64.
        tokens: number of those tokens, EOS included.
        characters: characters of the output text.
    """

    id: str
    nll: float
    tokens: int
    characters: int

    @property
    def perplexity(self) -> float:
        """exp(nll / tokens)."""
        return math.exp(self.nll / self.tokens)


@dataclass(frozen=True, slots=True)
class Summary:
    """Scores over all rows, with the names that `results.json` uses.

    Attributes:
        mean_perplexity: the course's score: arithmetic mean over rows of exp(nll / tokens).
        token_perplexity: exp(total nll / total tokens).
        median_perplexity: median over rows of exp(nll / tokens).
        bits_per_character: total nll in bits per output character. Comparable between models with different tokenizers.
        rows: number of rows.
        tokens: total output tokens, EOS included.
    """

    mean_perplexity: float
    token_perplexity: float
    median_perplexity: float
    bits_per_character: float
    rows: int
    tokens: int


def summarize(scores: Sequence[RowScore]) -> Summary:
    """Summarize the scores of rows."""
    perplexities = sorted(score.perplexity for score in scores)
    nll, tokens = math.fsum(score.nll for score in scores), sum(score.tokens for score in scores)
    return Summary(
        mean_perplexity=math.fsum(perplexities) / len(perplexities),
        token_perplexity=math.exp(nll / tokens),
        median_perplexity=statistics.median(perplexities),
        bits_per_character=nll / math.log(2) / sum(score.characters for score in scores),
        rows=len(scores),
        tokens=tokens,
    )


@torch.inference_mode()
def score_rows(
    model: PreTrainedModel,
    rows: Sequence[EncodedRow],
    *,
    tokens_per_batch: int,
    reuse_prefix: bool = True,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> list[RowScore]:
    """Score the output and EOS of every row.

    The prefix that all prompts share (BOS, system text, few-shot examples) runs through the model once. Rows are padded
    on the right, so positions and causal attention of real tokens do not depend on the batch. The output head runs only
    on the positions that predict an output token.

    Args:
        model: the causal language model in evaluation mode, with an adapter in it or not.
        rows: encoded rows with outputs.
        tokens_per_batch: most tokens of a padded batch, the common prefix not counted.
        reuse_prefix: whether the common prefix is computed only once. The scores are the same.
        on_batch: called after each batch with the number of its rows.

    Returns:
        One score per row, in the order of `rows`.

    Raises:
        UserError: a row's log-likelihood is NaN or below -700 per token: the dtype's range is exceeded.
    """
    prefix_length = common_prefix_length(rows) if reuse_prefix else 0
    scores: list[RowScore | None] = [None] * len(rows)
    with allow_tf32_for_adapters(model):
        cache = _cache_prefix(model, rows[0].prompt_ids[:prefix_length]) if prefix_length else None
        for indices in batch_by_length([len(row) - prefix_length for row in rows], tokens_per_batch):
            batch = [rows[index] for index in indices]
            for index, row, nll in zip(indices, batch, _batch_nll(model, batch, cache, prefix_length), strict=True):
                scores[index] = _row_score(row, nll, model.dtype)
            on_batch(len(batch))
    return [score for score in scores if score is not None]


class _SharedPrefixLayer(DynamicLayer):
    """A cache layer whose prefix is computed in a batch of one and shared by the rows of every batch."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of the prefix and the batch.

        The first call stores its states as the prefix. A later call does not store the batch's keys and values.
        """
        if not self.is_initialized:
            return super().update(key_states, value_states)
        assert self.keys is not None and self.values is not None, "`is_initialized` says so"
        rows = key_states.shape[0]
        return (
            torch.cat([self.keys.expand(rows, -1, -1, -1), key_states], dim=-2),
            torch.cat([self.values.expand(rows, -1, -1, -1), value_states], dim=-2),
        )


def _cache_prefix(model: PreTrainedModel, prefix_ids: Sequence[int]) -> Cache:
    cache = Cache(layers=[_SharedPrefixLayer() for _ in range(model.config.get_text_config().num_hidden_layers)])
    input_ids = torch.tensor([list(prefix_ids)], device=model.device)
    model.base_model(input_ids=input_ids, use_cache=True, **{CACHE_ARGUMENT: cache})
    return cache


def _batch_nll(
    model: PreTrainedModel, batch: Sequence[EncodedRow], cache: Cache | None, prefix_length: int
) -> tuple[torch.Tensor, ...]:
    """Return the negative log-likelihoods of each row's output tokens, in nats.

    Args:
        model: the model.
        batch: rows, the longest first.
        cache: keys and values of the common prefix.
        prefix_length: tokens of the common prefix.

    Returns:
        For each row a float64 tensor on the CPU, shape (output tokens,).
    """
    shape = (len(batch), len(batch[0]))  # (B, L)
    input_ids = torch.zeros(shape, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    predicts_output = torch.zeros(shape, dtype=torch.bool)
    for row_index, row in enumerate(batch):
        input_ids[row_index, : len(row)] = torch.tensor(row.input_ids)
        attention_mask[row_index, : len(row)] = 1
        # The state at a position predicts the next token.
        predicts_output[row_index, len(row.prompt_ids) - 1 : len(row) - 1] = True
    targets = torch.cat([torch.tensor(row.output_ids) for row in batch]).to(model.device)
    hidden_states = model.base_model(
        input_ids=input_ids[:, prefix_length:].to(model.device),
        attention_mask=attention_mask.to(model.device),
        use_cache=cache is not None,
        **{CACHE_ARGUMENT: cache},
    ).last_hidden_state[predicts_output[:, prefix_length:].to(model.device)]  # (K output tokens, hidden size)
    # In chunks: the logits of all positions at once would take gigabytes.
    chunks = zip(hidden_states.split(LOGITS_CHUNK_POSITIONS), targets.split(LOGITS_CHUNK_POSITIONS), strict=True)
    nll = torch.cat(
        [cross_entropy(compute_logits(model, states), labels, reduction="none") for states, labels in chunks]
    )
    return nll.cpu().double().split([len(row.output_ids) for row in batch])


def _row_score(row: EncodedRow, nll: torch.Tensor, dtype: torch.dtype) -> RowScore:
    score = RowScore(row.id, nll.sum().item(), len(row.output_ids), row.characters)
    if not score.nll / score.tokens < MAX_NLL_PER_TOKEN:  # also true for NaN
        raise UserError(
            f"row {row.id}: its log-likelihood is {-score.nll} for {score.tokens} tokens (NaN, or below "
            f"-{MAX_NLL_PER_TOKEN:.0f} per token), out of the range of {dtype}; score in float32 (model.dtype and "
            "quantization.bnb_4bit_compute_dtype)"
        )
    return score
