"""Encoded rows to negative log-likelihoods under a model, in any batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from hw3.common.errors import UserError
from hw3.data.batching import batches, common_prefix
from hw3.data.tokenization import EncodedRow
from hw3.modeling.logits import HEAD_POSITIONS, adapters_in_tf32, output_logits


@dataclass(frozen=True, slots=True)
class RowScore:
    """One row under one model.

    Attributes:
        id: the row's id.
        nll: negative log-likelihood of the output tokens and EOS, in nats, summed in float64.
        tokens: how many tokens that sum runs over, EOS included.
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
    """Figures of one scoring, as `results.json` names them.

    Attributes:
        mean_perplexity: the course's score, the arithmetic mean over rows of exp(nll / tokens).
        token_perplexity: exp(total nll / total tokens).
        median_perplexity: the middle of the rows' perplexities.
        bits_per_character: total bits, EOS included, over output characters; comparable between tokenizers.
    """

    mean_perplexity: float
    token_perplexity: float
    median_perplexity: float
    bits_per_character: float
    rows: int
    tokens: int


def summarize(scores: Sequence[RowScore]) -> Summary:
    """The figures of a list of row scores."""
    perplexities = sorted(score.perplexity for score in scores)
    nll, tokens = math.fsum(score.nll for score in scores), sum(score.tokens for score in scores)
    middle = len(perplexities) // 2
    median = perplexities[middle] if len(perplexities) % 2 else (perplexities[middle - 1] + perplexities[middle]) / 2
    return Summary(
        mean_perplexity=math.fsum(perplexities) / len(perplexities),
        token_perplexity=math.exp(nll / tokens),
        median_perplexity=median,
        bits_per_character=nll / math.log(2) / sum(score.characters for score in scores),
        rows=len(scores),
        tokens=tokens,
    )


class _PrefixLayer(DynamicLayer):
    """Keys and values of the prefix, computed once in a batch of one and seen by every row of every batch."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            return super().update(key_states, value_states)
        rows = key_states.shape[0]
        return (
            torch.cat([self.keys.expand(rows, -1, -1, -1), key_states], dim=-2),
            torch.cat([self.values.expand(rows, -1, -1, -1), value_states], dim=-2),
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
    """Negative log-likelihood of every row's output and EOS.

    What all prompts begin with (BOS, system text, worked examples) runs through the model once. Rows are padded on the
    right, so positions and causal attention of real tokens do not depend on the batch. Hidden states are gathered at
    the positions that predict an output token before the head runs.

    Args:
        model: the causal language model in evaluation mode; adapters, if any, are injected into it.
        rows: encoded rows with outputs.
        tokens_per_batch: most tokens of a padded batch, the common prefix not counted.
        reuse_prefix: whether the common prefix is computed once; the scores are the same.
        on_batch: called after each batch with the number of rows in it.

    Returns:
        One score a row, in the order of `rows`.

    Raises:
        UserError: a row's log-likelihood is not a number, or below exp(-700) a token: the dtype's range is exceeded.
    """
    with adapters_in_tf32(model):
        return _score_rows(model, rows, tokens_per_batch, common_prefix(rows) if reuse_prefix else 0, on_batch)


def _score_rows(
    model: PreTrainedModel,
    rows: Sequence[EncodedRow],
    tokens_per_batch: int,
    prefix: int,
    on_batch: Callable[[int], None],
) -> list[RowScore]:
    cache = None
    if prefix:
        cache = Cache(layers=[_PrefixLayer() for _ in range(model.config.get_text_config().num_hidden_layers)])
        ids = torch.tensor([rows[0].prompt_ids[:prefix]], device=model.device)
        model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    scores: list[RowScore | None] = [None] * len(rows)
    for batch in batches([len(row) - prefix for row in rows], tokens_per_batch):
        width = len(rows[batch[0]])
        input_ids = torch.zeros((len(batch), width), dtype=torch.long)
        attention_mask = torch.zeros((len(batch), width), dtype=torch.long)
        predicts = torch.zeros((len(batch), width), dtype=torch.bool)
        for line, index in enumerate(batch):
            row = rows[index]
            input_ids[line, : len(row)] = torch.tensor(row.input_ids)
            attention_mask[line, : len(row)] = 1
            predicts[line, len(row.prompt_ids) - 1 : len(row) - 1] = True
        targets = torch.cat([torch.tensor(rows[index].output_ids) for index in batch]).to(model.device)
        hidden = model.base_model(
            input_ids=input_ids[:, prefix:].to(model.device),
            attention_mask=attention_mask.to(model.device),
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state[predicts[:, prefix:].to(model.device)]
        nll = torch.cat(
            [
                torch.nn.functional.cross_entropy(output_logits(model, states), labels, reduction="none")
                for states, labels in zip(hidden.split(HEAD_POSITIONS), targets.split(HEAD_POSITIONS), strict=True)
            ]
        )
        per_row = nll.cpu().double().split([len(rows[index].output_ids) for index in batch])
        for index, values in zip(batch, per_row, strict=True):
            row = rows[index]
            score = RowScore(row.id, values.sum().item(), len(row.output_ids), row.characters)
            if not score.nll / score.tokens < 700:  # NaN as well
                raise UserError(
                    f"row {row.id}: its log-likelihood is {-score.nll}, out of the range of {model.dtype}; score in "
                    "float32 (model.dtype and quantization.bnb_4bit_compute_dtype)"
                )
            scores[index] = score
        on_batch(len(batch))
    return [score for score in scores if score is not None]
