"""Apply the filter rules to the pairs of a corpus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from hw3.common.progress import ProgressLine
from hw3.corpus.dedup import CopyKind, LeakageIndex, closest_copy_kind, compute_band_keys
from hw3.corpus.filters import FILTER_RULES, rejection_reason
from hw3.corpus.niutrans import SentencePair
from hw3.corpus.normalize import normalize_texts
from hw3.corpus.parallel import parallel_map, split_into_chunks

_EXCLUSION_RULES = {
    CopyKind.SAME: "excluded: same",
    CopyKind.CONTAINED: "excluded: contained",
    CopyKind.NEAR: "excluded: near",
}


@dataclass(frozen=True)
class CleanPairs:
    """The pairs that passed every rule.

    Attributes:
        pairs: as published.
        sides: both sides of each pair, normalized.
        band_keys: MinHash band keys of the Classical sides, uint64 of shape (pairs, bands).
    """

    pairs: list[SentencePair]
    sides: list[tuple[str, str]]
    band_keys: np.ndarray

    def sides_of(self, indices: Sequence[int]) -> list[str]:
        """Return the normalized sides of some pairs, two texts per pair."""
        return [side for index in indices for side in self.sides[index]]


@dataclass(frozen=True)
class RuleCount:
    """How many pairs a rule removed, and how many remained after it."""

    rule: str
    removed: int
    remaining: int


def clean_pairs(pairs: list[SentencePair], excluded: LeakageIndex) -> tuple[CleanPairs, list[RuleCount]]:
    """Return the pairs that pass all of `FILTER_RULES`, in order, and the counts of each rule."""
    removed: Counter[str] = Counter()
    kept_pairs: list[SentencePair] = []
    kept_sides: list[tuple[str, str]] = []
    kept_keys: list[np.ndarray] = []
    seen: set[tuple[str, str]] = set()
    chunks = split_into_chunks(pairs)
    results = parallel_map(partial(_clean_chunk, excluded), chunks)
    with ProgressLine("cleaning", len(pairs), "pairs", is_logged=True) as progress:
        for chunk, (reasons, chunk_sides, chunk_keys) in zip(chunks, results, strict=True):
            removed.update(reason for reason in reasons if reason)
            passed = [pair for pair, reason in zip(chunk, reasons, strict=True) if reason is None]
            new_indices = []
            for index, (pair, sides) in enumerate(zip(passed, chunk_sides, strict=True)):
                if sides in seen:
                    removed["duplicate"] += 1
                    continue
                seen.add(sides)
                new_indices.append(index)
                kept_pairs.append(pair)
                kept_sides.append(sides)
            kept_keys.append(chunk_keys[new_indices])
            progress.advance(len(chunk))
    counts, remaining = [], len(pairs)
    for rule in FILTER_RULES:
        remaining -= removed[rule]
        counts.append(RuleCount(rule, removed[rule], remaining))
    return CleanPairs(kept_pairs, kept_sides, np.concatenate(kept_keys)), counts


def _clean_chunk(
    excluded: LeakageIndex, pairs: Sequence[SentencePair]
) -> tuple[list[str | None], list[tuple[str, str]], np.ndarray]:
    """Apply every rule but "duplicate" to a chunk of pairs.

    Returns:
        For each pair the rule that rejects it, or None. For the pairs that pass: their normalized sides, and the band
        keys of their Classical sides.
    """
    classical = normalize_texts([pair.classical for pair in pairs])
    modern = normalize_texts([pair.modern for pair in pairs])
    sides = list(zip(classical, modern, strict=True))
    reasons = [
        rejection_reason(pair.classical, pair.modern, normalized) for pair, normalized in zip(pairs, sides, strict=True)
    ]
    passed = [index for index, reason in enumerate(reasons) if reason is None]
    classical, modern = ([side[index] for index in passed] for side in (classical, modern))
    band_keys = compute_band_keys(classical)
    kinds = np.full(len(passed), CopyKind.NONE)
    if excluded.texts:
        modern_kinds = excluded.find_copies(modern, compute_band_keys(modern))
        kinds = closest_copy_kind(excluded.find_copies(classical, band_keys), modern_kinds)
        for index, kind in zip(passed, kinds.tolist(), strict=True):
            reasons[index] = _EXCLUSION_RULES.get(kind)
    is_kept = kinds == CopyKind.NONE
    kept_sides = [sides[index] for index, kept in zip(passed, is_kept, strict=True) if kept]
    return reasons, kept_sides, band_keys[is_kept]
