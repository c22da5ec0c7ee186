"""Special tokens, sizes and training settings of the base model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from hw3.common.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>"]
PAD, EOS, BOS, UNK = range(4)
QUOTES = ["「」", "『』", "“”"]  # the published corpus has none; the title marks 《》 are most similar in use
MAX_POSITIONS = 2048
HEAD_DIM = 64  # also the block size of NF4, so no block spans two rows of a weight matrix


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """Everything that decides the weights, apart from the corpus.

    Attributes:
        rows: rows per step.
        length: tokens per row. Documents are packed, and attention stays inside a document.
        optimizer: "muon" or "adamw" for the matrices of the layers; all other parameters always use AdamW.
        warmup: steps.
        decay: share of the steps, at the end, during which the learning rate falls to 0.
        average: decay of the exponential moving average of the weights; 0 keeps the last weights.
        input_weight: weight of the tokens of the text to translate in the loss; its translation has weight 1.
        single: share of documents with one pair; the others have two to eight.
        mixed: share of documents whose pairs have mixed directions.
        styles: shares of documents with no labels, and with directed, plain and random labels.
        one_to_one: share of documents spelled with the one-to-one map.
        nf4: share of the steps, at the end, that round the matrices to NF4.
        quote_steps: additional steps at the very end that train only the embeddings of quotation marks.
    """

    seed: int = 0
    steps: int = 16000
    rows: int = 64
    length: int = 1024
    width: int = 256
    layers: int = 7
    heads: int = 4
    kv_heads: int = 1
    mlp: int = 576
    optimizer: str = "muon"
    learning_rate: float = 5e-3
    weight_decay: float = 0.1
    warmup: int = 200
    decay: float = 0.6
    average: float = 0.998
    input_weight: float = 0.3
    single: float = 0.35
    mixed: float = 0.2
    styles: tuple[float, ...] = (0.15, 0.35, 0.25, 0.25)
    one_to_one: float = 0.1
    nf4: float = 0.15
    quote_steps: int = 300


def parse_settings(changes: list[str]) -> TrainingSettings:
    """Return the default settings with `name=value` changes.

    Raises:
        UserError: a name is unknown, or a value has the wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(TrainingSettings)}
    values = {}
    for change in changes:
        name, _, text = change.partition("=")
        if name not in fields:
            raise UserError(f"--set {change}: no such setting; expected one of {', '.join(fields)}")
        kind = type(fields[name].default)
        try:
            values[name] = tuple(map(float, text.split(","))) if kind is tuple else kind(text)
        except ValueError:
            raise UserError(f"--set {change}: not a value of type {kind.__name__}") from None
    return TrainingSettings(**values)
