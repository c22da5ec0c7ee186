"""Encode a corpus of sentence pairs as token ids."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from base_model.settings import UNK
from base_model.vocabulary import build_vocabulary, encode_characters, one_to_one_pairs, required_characters
from hw3.common.errors import UserError
from hw3.corpus.niutrans import read_parts
from hw3.corpus.script_conversion import make_converter

MAX_PAIR_CHARACTERS = 500  # both sides; the few longer pairs are entire chapters
HELD_OUT_ONE_IN = 200


def is_held_out(classical: str) -> bool:
    """Return whether a pair is held out: one in 200, by the SHA-256 of its Classical text as published."""
    return int.from_bytes(hashlib.sha256(classical.encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0


def read_training_pairs(folder: Path) -> tuple[list[tuple[str, str]], list[bool], str]:
    """Read every `*.tsv.xz` of a folder.

    A pair longer than `MAX_PAIR_CHARACTERS` is left out. So is a pair that is not held out, but has the modern text of
    a held-out pair.

    Returns:
        The pairs in the characters of Taiwan, whether each is held out, and the SHA-256 of the files.

    Raises:
        UserError: there is no such file, or a line does not have three fields.
    """
    corpus = read_parts(folder)
    convert = make_converter("s2tw")
    classical, modern = (convert([getattr(pair, side) for pair in corpus.pairs]) for side in ("classical", "modern"))
    held_out = [is_held_out(pair.classical) for pair in corpus.pairs]
    held_out_modern = {pair.modern for pair, held in zip(corpus.pairs, held_out, strict=True) if held}
    is_kept = [
        len(pair.classical) + len(pair.modern) <= MAX_PAIR_CHARACTERS and (held or pair.modern not in held_out_modern)
        for pair, held in zip(corpus.pairs, held_out, strict=True)
    ]
    pairs = [pair for pair, kept in zip(zip(classical, modern, strict=True), is_kept, strict=True) if kept]
    return pairs, [held for held, kept in zip(held_out, is_kept, strict=True) if kept], corpus.sha256


def encode_corpus(corpus: Path, output: Path) -> None:
    """Encode the pairs of `corpus` and write `pairs.npz`, `vocabulary.json` and `encoding.json` (a summary).

    `pairs.npz` has `ids` (the Classical, then the modern text of every pair, concatenated), `lengths` (pairs, 2),
    `held_out` (pairs) and `one_to_one` (vocabulary: the id of each token in the spelling of the one-to-one map).
    """
    pairs, held_out, digest = read_training_pairs(corpus)
    vocabulary = build_vocabulary((text for pair in pairs for text in pair), required_characters())
    ids = encode_characters("".join(text for pair in pairs for text in pair), vocabulary)
    one_to_one = np.arange(len(vocabulary), dtype=np.uint16)
    for proper, mapped in one_to_one_pairs():
        one_to_one[vocabulary.index(proper)] = vocabulary.index(mapped)
    output.mkdir(parents=True, exist_ok=True)
    lengths = np.array([(len(classical), len(modern)) for classical, modern in pairs], dtype=np.uint16)
    np.savez(output / "pairs.npz", ids=ids, lengths=lengths, held_out=np.array(held_out), one_to_one=one_to_one)
    summary = {
        "corpus_sha256": digest,
        "pairs": len(pairs),
        "held_out_pairs": sum(held_out),
        "characters": len(ids),
        "unknown_characters": int((ids == UNK).sum()),
        "vocabulary": len(vocabulary),
        "pairs_sha256": hashlib.sha256(ids.tobytes() + lengths.tobytes()).hexdigest(),
    }
    (output / "vocabulary.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (output / "encoding.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")


@dataclass(frozen=True)
class EncodedCorpus:
    """Encoded pairs on one device.

    Attributes:
        ids: int32 of shape (characters,).
        lengths: int64 of shape (pairs, 2), of the Classical and the modern texts.
        one_to_one: int32 of shape (vocabulary,): the id of each token in the spelling of the one-to-one map.
        vocabulary: the token of each id.
        summary: the content of `encoding.json`.
    """

    ids: Tensor
    lengths: Tensor
    one_to_one: Tensor
    vocabulary: list[str]
    summary: dict[str, Any]

    def encode(self, text: str) -> list[int]:
        """Return one id per character."""
        return [int(token_id) for token_id in encode_characters(text, self.vocabulary)]


def load_encoded_corpus(folder: Path, device: str, held_out: bool) -> EncodedCorpus:
    """Load the training pairs of an encoded folder, or the held-out ones.

    Raises:
        UserError: there are none.
    """
    if not (folder / "pairs.npz").is_file():
        raise UserError(f"{folder}: no pairs.npz in this folder; run the encode command first")
    with np.load(folder / "pairs.npz") as arrays:
        lengths = arrays["lengths"].astype(np.int64)
        is_selected = arrays["held_out"] == held_out
        ids = arrays["ids"][np.repeat(is_selected, lengths.sum(1))]
        one_to_one = arrays["one_to_one"].astype(np.int32)
    if not is_selected.any():
        raise UserError(f"{folder}: no {'held-out' if held_out else 'training'} pair")
    return EncodedCorpus(
        torch.from_numpy(ids.astype(np.int32)).to(device),
        torch.from_numpy(lengths[is_selected]).to(device),
        torch.from_numpy(one_to_one).to(device),
        json.loads((folder / "vocabulary.json").read_text(encoding="utf-8")),
        json.loads((folder / "encoding.json").read_text(encoding="utf-8")),
    )
