"""Train the base model, then teach it quotation marks, and save it with its record."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

from base_model.documents import build_epoch, iterate_batches
from base_model.encoding import EncodedCorpus, load_encoded_corpus
from base_model.model_card import write_model_card
from base_model.muon import Muon
from base_model.network import build_model, document_mask, layer_matrices, round_to_nf4, training_loss
from base_model.scoring import held_out_loss, score_model
from base_model.settings import QUOTES, TrainingSettings
from base_model.vocabulary import build_tokenizer

LOG_EVERY_STEPS = 500


def learning_rate_factor(step: int, settings: TrainingSettings) -> float:
    """Return the factor of the learning rate: linear warm-up, constant, linear decay to zero over the last steps."""
    remaining = (settings.steps - step) / max(1, round(settings.steps * settings.decay))
    return min(1.0, (step + 1) / settings.warmup, remaining)


def build_optimizers(model: torch.nn.Module, settings: TrainingSettings, fused: bool) -> list[torch.optim.Optimizer]:
    """Return AdamW, and Muon for the matrices of the layers if the settings ask for it."""
    matrices = layer_matrices(model)
    muon_ids = {id(matrix) for matrix in matrices} if settings.optimizer == "muon" else set()
    others = [p for p in model.parameters() if id(p) not in muon_ids]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, settings.learning_rate, (0.9, 0.95), weight_decay=settings.weight_decay, fused=fused)
    ]
    if muon_ids:
        optimizers.append(Muon(matrices, settings.learning_rate, settings.weight_decay))
    return optimizers


@contextlib.contextmanager
def rounded_to_nf4(matrices: list[torch.nn.Parameter]) -> Iterator[None]:
    """Round matrices to NF4 inside the block.

    This is a straight-through estimator: gradients of the rounded weights are applied to the exact ones.
    """
    exact = [matrix.detach().clone() for matrix in matrices]
    with torch.no_grad():
        torch._foreach_copy_(matrices, [round_to_nf4(matrix) for matrix in matrices])
    yield
    with torch.no_grad():
        torch._foreach_copy_(matrices, exact)


def train_weights(corpus: EncodedCorpus, settings: TrainingSettings, log: list[dict[str, float]]) -> torch.nn.Module:
    """Train from scratch on the corpus's device for a fixed number of steps.

    Args:
        corpus: training pairs.
        settings: everything else.
        log: gets the mean loss of every `LOG_EVERY_STEPS` steps.

    Returns:
        The model with the averaged weights.
    """
    device = corpus.ids.device.type
    is_cuda = device == "cuda"
    model = build_model(len(corpus.vocabulary), settings).to(device)
    model.set_attn_implementation("flex_attention" if is_cuda else "eager")
    matrices, parameters = layer_matrices(model), list(model.parameters())
    optimizers = build_optimizers(model, settings, fused=is_cuda)
    average = [p.detach().clone() for p in parameters]
    compute_loss = torch.compile(training_loss, dynamic=False) if is_cuda else training_loss
    kind_weights = torch.tensor([0.0, settings.input_weight, 1.0], device=device)
    first_nf4_step = settings.steps - round(settings.steps * settings.nf4)
    total = torch.zeros((), device=device)
    start_time = time.perf_counter()
    for step, (tokens, kinds) in zip(range(settings.steps), iterate_batches(corpus, settings), strict=False):
        mask = document_mask(tokens, is_cuda)
        with rounded_to_nf4(matrices) if step >= first_nf4_step else contextlib.nullcontext():
            with torch.autocast(device, torch.bfloat16, enabled=is_cuda):
                loss = compute_loss(model, tokens, kinds, mask, kind_weights)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * learning_rate_factor(step, settings)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            decay = min(settings.average, step / (step + 10))
            torch._foreach_lerp_(average, parameters, 1 - decay)
        total += loss.detach()
        if (step + 1) % LOG_EVERY_STEPS == 0 or step + 1 == settings.steps:
            mean_loss = total.item() / (step % LOG_EVERY_STEPS + 1)
            log.append({"step": step + 1, "loss": mean_loss, "seconds": time.perf_counter() - start_time})
            total.zero_()
            print(log[-1], flush=True)
    if settings.average:
        with torch.no_grad():
            torch._foreach_copy_(parameters, average)
    return model


def train_quotes(model: torch.nn.Module, corpus: EncodedCorpus, settings: TrainingSettings) -> None:
    """Train the embeddings of the quotation marks on text with quoted speech, starting from those of the title marks.

    All other weights stay unchanged, so this is fast enough for a CPU. The model must be in float32.
    """
    embedding = model.model.embed_tokens.weight
    random = torch.Generator().manual_seed(settings.seed)
    marks = torch.tensor(corpus.encode("".join(QUOTES)))
    model.requires_grad_(False)
    title_marks = embedding[torch.tensor(corpus.encode("《》" * len(QUOTES)))]
    # Without noise, marks with equal embeddings would get equal gradients and stay equal.
    noise = torch.randn(title_marks.shape, generator=random).to(title_marks.device)
    embedding[marks] = title_marks + 0.1 * title_marks.std() * noise
    small = dataclasses.replace(settings, rows=16, length=min(256, settings.length))
    tokens, kinds = build_epoch(corpus, small, random, quoted=True)
    has_marks = torch.isin(tokens, marks.to(tokens.device)).any(1)
    tokens, kinds = tokens[has_marks], kinds[has_marks]
    kind_weights = torch.tensor([0.0, 1.0, 1.0], device=tokens.device)
    mark_rows = embedding[marks].clone().requires_grad_()
    optimizer = torch.optim.Adam([mark_rows], lr=settings.learning_rate)
    for step in range(settings.quote_steps if len(tokens) else 0):
        chosen = torch.randint(0, len(tokens), (small.rows,), generator=random)
        embedding.requires_grad_()
        mask = document_mask(tokens[chosen], compiled=False)
        loss = training_loss(model, tokens[chosen], kinds[chosen], mask, kind_weights)
        (gradient,) = torch.autograd.grad(loss, embedding)
        embedding.requires_grad_(False)
        mark_rows.grad = gradient[marks]
        optimizer.param_groups[0]["lr"] = settings.learning_rate * (1 - step / settings.quote_steps)
        optimizer.step()
        embedding[marks] = mark_rows.detach()


def train_and_save(encoded: Path, output: Path, settings: TrainingSettings) -> None:
    """Train, then save model, tokenizer, `training.json` and the model card to `output`.

    The scores are those of the bfloat16 weights before the quotation marks are trained, because the held-out pairs
    have none. `held_out_loss_saved` has the scores of the saved weights.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    corpus = load_encoded_corpus(encoded, device, held_out=False)
    log: list[dict[str, float]] = []
    start_time = time.perf_counter()
    model = train_weights(corpus, settings, log)
    seconds = time.perf_counter() - start_time
    model.set_attn_implementation("eager")
    model.bfloat16().float()
    machine = f"one {torch.cuda.get_device_name()}" if device == "cuda" else "a CPU"
    held_out = load_encoded_corpus(encoded, device, held_out=True)
    record = {
        "settings": dataclasses.asdict(settings),
        "corpus": corpus.summary,
        "parameters": sum(p.numel() for p in model.parameters()),
        **score_model(model, held_out),
        "training_loss": log,
        "seconds": seconds,
        "machine": machine,
        "quotes_machine": machine,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    train_quotes(model, corpus, settings)
    model.bfloat16().save_pretrained(output)
    build_tokenizer(corpus.vocabulary).save_pretrained(output)
    record["held_out_loss_saved"] = held_out_loss(model.float(), held_out)
    (output / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    write_model_card(output)
