"""Split pairs into training and evaluation sets without leakage: by clusters of near duplicates, and verified."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from hw3.common.errors import UserError
from hw3.corpus.cleaning import CleanPairs
from hw3.corpus.dedup import (
    MIN_CONTAINED_CHARACTERS,
    LeakageIndex,
    UnionFind,
    compute_band_keys,
    find_copies_exhaustively,
    union_equal_texts,
    union_near_duplicates,
)

EVALUATION_SPLITS = ("test", "private", "dev")
_CANDIDATES_PER_BATCH = 20_000
_MAX_VERIFIED_TEXTS = 25_000  # of more texts an even sample is compared exhaustively


@dataclass(frozen=True)
class LeakageCheck:
    """The result of comparing drawn rows exhaustively with sentences that must not leak.

    Attributes:
        rows: rows drawn.
        rows_compared: rows of the even sample that was compared.
        sentences: sentences compared with.
        copies: compared rows that are a copy of a sentence.
        max_similarity: the highest bigram similarity of a row's side that is no copy.
    """

    rows: int
    rows_compared: int
    sentences: int
    copies: int
    max_similarity: float


@dataclass(frozen=True)
class LeakageChecks:
    """The final comparisons.

    Attributes:
        train_vs_evaluation: training rows against the sentences of the evaluation splits.
        rows_vs_excluded: all rows against the excluded sentences; None if nothing is excluded.
        redrawn_pairs: copies that only the exhaustive comparison found. They were replaced.
    """

    train_vs_evaluation: LeakageCheck
    rows_vs_excluded: LeakageCheck | None
    redrawn_pairs: int


@dataclass(frozen=True)
class DrawnSplits:
    """The pairs of each split.

    Attributes:
        indices: split name to indices of pairs, in sampling order.
        skipped_pairs: pairs passed over because they are copies of a pair in an earlier split.
    """

    indices: dict[str, list[int]]
    skipped_pairs: int


def cluster_pairs(clean: CleanPairs) -> list[int]:
    """Return the cluster of each pair.

    Pairs are in one cluster if their Classical texts are near duplicates, in whatever book, or if their translations
    are equal.
    """
    sets = UnionFind(len(clean.pairs))
    first_index: dict[str, int] = {}
    for index, (classical, _) in enumerate(clean.sides):
        sets.union(first_index.setdefault(classical, index), index)
    indices = list(first_index.values())
    distinct_sets = UnionFind(len(indices))
    union_near_duplicates(distinct_sets, list(first_index), clean.band_keys[indices])
    for position, index in enumerate(indices):
        sets.union(indices[distinct_sets.find(position)], index)
    union_equal_texts(sets, [modern for _, modern in clean.sides], MIN_CONTAINED_CHARACTERS)
    return [sets.find(index) for index in range(len(clean.pairs))]


def draw_splits(
    clean: CleanPairs, clusters: Sequence[int], sizes: dict[str, int | None], seed: int, refused: set[int]
) -> DrawnSplits:
    """Draw the splits, at most one pair per cluster, so that no cluster is in two splits.

    A pair that is a copy of a pair in an earlier split is skipped.

    Args:
        clean: the pairs.
        clusters: the cluster of each pair.
        sizes: pairs per split in sampling order; None takes all that remain.
        seed: of the draw.
        refused: indices of pairs that must not be drawn.

    Raises:
        UserError: there are too few clusters.
    """
    rng = random.Random(seed)
    members: dict[int, list[int]] = {}
    for index, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(index)
    order = [rng.choice(indices) for indices in members.values()]
    rng.shuffle(order)
    remaining = [index for index in order if index not in refused]
    drawn: dict[str, list[int]] = {}
    earlier_texts: list[str] = []
    skipped_pairs = 0
    for name, size in sizes.items():
        chosen, examined = _take_without_copies(clean, remaining, size, LeakageIndex(earlier_texts))
        if size is not None and len(chosen) < size:
            requested = sum(size or 0 for size in sizes.values())
            raise UserError(
                f"{len(order):,} distinct sentence pairs remain after cleaning, too few for {requested:,} rows: the "
                f"{name} split would have {len(chosen):,} of {size:,}; lower --train, --dev, --test or --private"
            )
        remaining = remaining[examined:]
        skipped_pairs += examined - len(chosen)
        drawn[name] = chosen
        earlier_texts += clean.sides_of(chosen)
    return DrawnSplits(drawn, skipped_pairs)


def _take_without_copies(
    clean: CleanPairs, candidates: Sequence[int], size: int | None, earlier: LeakageIndex
) -> tuple[list[int], int]:
    """Return the first `size` candidates (None: all) that copy no earlier text, and how many were examined."""
    chosen: list[int] = []
    examined = 0
    while examined < len(candidates) and (size is None or len(chosen) < size):
        batch = candidates[examined : examined + _CANDIDATES_PER_BATCH]
        classical, modern = ([clean.sides[index][side] for index in batch] for side in (0, 1))
        copies = earlier.find_copies(classical, clean.band_keys[batch])
        copies += earlier.find_copies(modern, compute_band_keys(modern))
        for index, copy in zip(batch, copies.tolist(), strict=True):
            if len(chosen) == size:
                break
            examined += 1
            if not copy:
                chosen.append(index)
    return chosen, examined


def draw_verified_splits(
    clean: CleanPairs, clusters: Sequence[int], sizes: dict[str, int | None], seed: int, excluded: list[str]
) -> tuple[DrawnSplits, LeakageChecks]:
    """Draw splits until an exhaustive comparison finds no leakage.

    MinHash sometimes misses a near duplicate (see `hw3.corpus.dedup`), the exhaustive comparison does not. Pairs that
    it finds are refused, and the splits are drawn again.

    Args:
        clean, clusters, sizes, seed: see `draw_splits`.
        excluded: normalized sentences that must not be in any split.
    """
    refused: set[int] = set()
    while True:
        drawn = draw_splits(clean, clusters, sizes, seed, refused)
        evaluation = [index for name in EVALUATION_SPLITS for index in drawn.indices[name]]
        train = drawn.indices["train"]
        train_check, train_copies = _check_leakage(clean, train, clean.sides_of(evaluation))
        excluded_check, excluded_copies = _check_leakage(clean, [*evaluation, *train], excluded)
        copies = train_copies | excluded_copies
        if not copies:
            return drawn, LeakageChecks(train_check, excluded_check if excluded else None, len(refused))
        refused |= copies


def _check_leakage(clean: CleanPairs, indices: list[int], sentences: list[str]) -> tuple[LeakageCheck, set[int]]:
    """Compare both sides of pairs with sentences; return the result and the indices of the pairs that are copies."""
    step = max(1, -(-2 * len(indices) // _MAX_VERIFIED_TEXTS))
    compared = indices[::step]
    result = find_copies_exhaustively(clean.sides_of(compared), sentences)
    check = LeakageCheck(
        rows=len(indices),
        rows_compared=len(compared),
        sentences=len(sentences),
        copies=len(result.copies),
        max_similarity=result.max_similarity,
    )
    return check, {compared[text // 2] for text in result.copies}
