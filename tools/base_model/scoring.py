"""Score the base model on the held-out pairs."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

from base_model.encoding import EncodedCorpus
from base_model.network import layer_matrices, round_to_nf4, soft_cap
from base_model.settings import BOS, EOS, PAD

_DOCUMENTS_PER_BATCH = 32
_MAX_DOCUMENT_TOKENS = 1024


def score_documents(model: torch.nn.Module, documents: list[tuple[list[int], list[int]]]) -> float:
    """Return the mean negative log-likelihood per token of the outputs, EOS included.

    Args:
        model: the model.
        documents: token ids of (context, output).
    """
    device = next(model.parameters()).device
    documents = sorted(documents, key=lambda document: sum(map(len, document)))
    total, count = 0.0, 0
    for first in range(0, len(documents), _DOCUMENTS_PER_BATCH):
        batch = documents[first : first + _DOCUMENTS_PER_BATCH]
        size = max(len(context) + len(output) for context, output in batch)
        tokens = torch.full((len(batch), size), PAD)
        is_scored = torch.zeros(len(batch), size, dtype=torch.bool)
        for row, (context, output) in enumerate(batch):
            end = len(context) + len(output)
            tokens[row, :end] = torch.tensor(context + output)
            is_scored[row, len(context) : end] = True
        tokens, is_scored = tokens.to(device), is_scored.to(device)
        with torch.no_grad():  # no mask: padding is on the right, where causal attention does not reach
            hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
            logits = soft_cap(model.lm_head(hidden[is_scored[:, 1:]]).float(), model)
            loss = F.cross_entropy(logits, tokens[:, 1:][is_scored[:, 1:]], reduction="sum")
        total += loss.item()
        count += int(is_scored[:, 1:].sum())
    return total / count


def held_out_loss(model: torch.nn.Module, corpus: EncodedCorpus) -> dict[str, float]:
    r"""Return the loss per direction on the held-out pairs, with 0 and 4 other pairs in front.

    Documents have the form `文言文：…\n白話文：…`, or the reverse.
    """
    pairs = []
    for ids, (classical, modern) in zip(
        corpus.ids.cpu().split(corpus.lengths.sum(1).tolist()), corpus.lengths.tolist(), strict=True
    ):
        pairs.append((ids[:classical].tolist(), ids[classical : classical + modern].tolist()))
    labels = corpus.encode("文言文："), corpus.encode("白話文：")
    newline = corpus.encode("\n")
    losses = {}
    for name, (a, b) in {"classical_to_modern": (0, 1), "modern_to_classical": (1, 0)}.items():
        for shots in (0, 4):
            documents = []
            for number, pair in enumerate(pairs):
                context = [BOS]
                for offset in range(1, shots + 1):
                    example = pairs[(number + offset) % len(pairs)]
                    context += labels[a] + example[a] + newline + labels[b] + example[b] + newline
                context += labels[a] + pair[a] + newline + labels[b]
                documents.append((context[: _MAX_DOCUMENT_TOKENS - len(pair[b]) - 1], pair[b] + [EOS]))
            losses[f"{name}_{shots}"] = score_documents(model, documents)
    return losses


def score_model(model: torch.nn.Module, held_out: EncodedCorpus) -> dict[str, dict[str, float]]:
    """Return held-out losses of the float32 weights, and of weights whose layer matrices are rounded to NF4."""
    losses = {"held_out_loss": held_out_loss(model, held_out)}
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for matrix in layer_matrices(rounded):
            matrix.copy_(round_to_nf4(matrix))
    return losses | {"held_out_loss_nf4": held_out_loss(rounded, held_out)}
