"""Near duplicates by MinHash, and copies of texts that must not leak into a split.

Every text in this module is normalized (`hw3.corpus.normalize.normalize_texts`): simplified characters, no punctuation.

Two texts are near duplicates when the Jaccard similarity of their character bigrams, with marks for the ends of the
text, is at least `NEAR_DUPLICATE_SIMILARITY`. MinHash proposes the pairs (Broder, "On the resemblance and containment
of documents", 1997). The exact similarity then decides.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from functools import lru_cache
from operator import add
from typing import NamedTuple

import numpy as np
from rensa import RMinHash

NEAR_DUPLICATE_SIMILARITY = 0.6  # Jaccard similarity of bigrams, 0 to 1
# A pair of similarity s is proposed with probability 1 - (1 - s^3)^16: 98 % at 0.6, 99.8 % at 0.7, and more above.
NUM_BANDS, ROWS_PER_BAND = 16, 3
MINHASH_SEED = 1
MIN_CONTAINED_CHARACTERS = 8  # a shorter text inside a longer one is no copy
SHARED_RUN_CHARACTERS = 16  # two texts with a common substring of this length are copies
_TEXTS_PER_CHUNK = 50_000  # limits how many MinHash digests exist as Python integers at once
_HASH_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: Knuth's multiplicative hash


class CopyKind(IntEnum):
    """How a text copies another one, the closest kind first."""

    NONE = 0
    SAME = 1
    CONTAINED = 2  # one text inside the other, or a common substring of SHARED_RUN_CHARACTERS
    NEAR = 3


@lru_cache(maxsize=2**16)
def bigrams(text: str) -> frozenset[str]:
    """Return the pairs of adjacent characters, including a mark at both ends of the text."""
    marked = f"\n{text}\n"
    return frozenset(map(add, marked, marked[1:]))


def bigram_similarity(a: str, b: str) -> float:
    """Return the Jaccard similarity of two texts' bigrams, 0 to 1."""
    first, second = bigrams(a), bigrams(b)
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)


def compute_band_keys(texts: Sequence[str]) -> np.ndarray:
    """Return one MinHash key per band: texts that share a key in any band may be near duplicates.

    Returns:
        uint64 of shape (texts, NUM_BANDS).
    """
    chunks = range(0, len(texts), _TEXTS_PER_CHUNK)
    keys = [_compute_band_keys(texts[start : start + _TEXTS_PER_CHUNK]) for start in chunks]
    return np.concatenate(keys) if keys else np.empty((0, NUM_BANDS), np.uint64)


def _compute_band_keys(texts: Sequence[str]) -> np.ndarray:
    codes = _code_points(texts)
    tokens = (codes[:-1] << np.uint64(32) | codes[1:]) * _HASH_MULTIPLIER
    starts = np.flatnonzero(codes == ord("\n")).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        tokens ^ tokens >> np.uint64(29), starts, num_perm=NUM_BANDS * ROWS_PER_BAND, seed=MINHASH_SEED
    )
    digests = np.array(matrix.to_rows(), dtype=np.uint64).reshape(-1, NUM_BANDS, ROWS_PER_BAND)
    keys = np.zeros(digests.shape[:2], dtype=np.uint64)
    for row in range(ROWS_PER_BAND):
        keys = (keys ^ digests[:, :, row]) * _HASH_MULTIPLIER
        keys ^= keys >> np.uint64(32)
    return keys


def _code_points(texts: Sequence[str]) -> np.ndarray:
    """Return the code points of all texts as uint64, with a newline before, between and after the texts."""
    joined = "\n" + "".join(f"{text}\n" for text in texts)
    return np.frombuffer(joined.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)


class UnionFind:
    """Disjoint sets of the numbers 0 to size - 1. The smallest number of a set represents it."""

    def __init__(self, size: int) -> None:
        self._parents = list(range(size))

    def find(self, item: int) -> int:
        """Return the smallest number in the set of `item`."""
        parents = self._parents
        while parents[item] != item:
            parents[item] = parents[parents[item]]
            item = parents[item]
        return item

    def union(self, a: int, b: int) -> None:
        """Merge the sets of `a` and `b`."""
        a, b = self.find(a), self.find(b)
        if a != b:
            self._parents[max(a, b)] = min(a, b)


def union_near_duplicates(sets: UnionFind, texts: Sequence[str], band_keys: np.ndarray) -> None:
    """Merge the sets of texts that are near duplicates.

    Args:
        sets: one number per text.
        texts: distinct texts.
        band_keys: their `compute_band_keys`.
    """
    for band in range(band_keys.shape[1]):
        for bucket in _indices_of_repeated_keys(band_keys[:, band]):
            # Each set is compared through one representative, so a bucket of n copies costs n comparisons.
            representatives: dict[int, int] = {}
            for text in bucket:
                root = sets.find(text)
                if root in representatives:
                    continue
                for other_root, other in list(representatives.items()):
                    if bigram_similarity(texts[text], texts[other]) >= NEAR_DUPLICATE_SIMILARITY:
                        sets.union(root, other_root)
                        del representatives[other_root]
                        root = sets.find(root)
                representatives[root] = text


def union_equal_texts(sets: UnionFind, texts: Sequence[str], min_characters: int) -> None:
    """Merge the sets of equal texts that have at least `min_characters`."""
    first_index: dict[str, int] = {}
    for index, text in enumerate(texts):
        if len(text) >= min_characters:
            sets.union(first_index.setdefault(text, index), index)


def _indices_of_repeated_keys(keys: np.ndarray) -> Iterator[list[int]]:
    """Yield the ascending indices of each key that occurs more than once."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    edges = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1], [True]]))
    repeated = np.flatnonzero(np.diff(edges) > 1)
    for start, end in zip(edges[repeated].tolist(), edges[repeated + 1].tolist(), strict=True):
        yield order[start:end].tolist()


class LeakageIndex:
    """An index of texts that must not leak, to find copies of them among other texts.

    Args:
        texts: the texts to protect. Empty and repeated ones are ignored.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = sorted({text for text in texts if text})
        self._text_set = set(self.texts)
        long_texts = _indices_of_long_texts(self.texts)
        codes = _code_points([self.texts[index] for index in long_texts])
        hashes = _hash_runs(codes, MIN_CONTAINED_CHARACTERS)
        starts = np.flatnonzero(codes == ord("\n"))[:-1] + 1
        # The hash of its first characters finds a protected text inside a queried one.
        # The hashes at all its positions find a queried text inside a protected one.
        self._text_starts = _HashIndex(hashes[starts[: len(long_texts)]], long_texts)
        positions = np.flatnonzero(codes != ord("\n"))
        positions = positions[positions < len(hashes)]
        owners = long_texts[np.searchsorted(starts, positions, side="right") - 1] if len(long_texts) else positions
        self._all_positions = _HashIndex(hashes[positions], owners)
        run_hashes = _hash_runs(codes, SHARED_RUN_CHARACTERS)
        has_run = positions < len(run_hashes)
        self._shared_runs = _HashIndex(run_hashes[positions[has_run]], owners[has_run])
        text_indices = np.arange(len(self.texts))
        self._bands = [_HashIndex(column, text_indices) for column in compute_band_keys(self.texts).T]

    def find_copies(self, texts: Sequence[str], band_keys: np.ndarray) -> np.ndarray:
        """Return how each text copies a protected one.

        Args:
            texts: the texts to test.
            band_keys: their `compute_band_keys`.

        Returns:
            `CopyKind` values, int8 of shape (texts,).
        """
        kinds = np.full(len(texts), CopyKind.NONE, dtype=np.int8)
        if not self.texts or not len(texts):
            return kinds
        for text, other in self._near_candidates(band_keys):
            if not kinds[text] and bigram_similarity(texts[text], self.texts[other]) >= NEAR_DUPLICATE_SIMILARITY:
                kinds[text] = CopyKind.NEAR
        for text, other in self._contained_candidates(texts):
            a, b = texts[text], self.texts[other]
            is_long = min(len(a), len(b)) >= MIN_CONTAINED_CHARACTERS
            if kinds[text] != CopyKind.CONTAINED and is_long and (a in b or b in a):
                kinds[text] = CopyKind.CONTAINED
        for text, start, other in self._shared_run_candidates(texts):
            run = texts[text][start : start + SHARED_RUN_CHARACTERS]
            is_complete = len(run) == SHARED_RUN_CHARACTERS
            if kinds[text] != CopyKind.CONTAINED and is_complete and run in self.texts[other]:
                kinds[text] = CopyKind.CONTAINED
        kinds[[index for index, text in enumerate(texts) if text in self._text_set]] = CopyKind.SAME
        return kinds

    def _near_candidates(self, band_keys: np.ndarray) -> Iterator[tuple[int, int]]:
        for index, column in zip(self._bands, band_keys.T, strict=True):
            yield from index.find_matches(column)

    def _contained_candidates(self, texts: Sequence[str]) -> Iterator[tuple[int, int]]:
        codes = _code_points(texts)
        ends = np.flatnonzero(codes == ord("\n"))
        hashes = _hash_runs(codes, MIN_CONTAINED_CHARACTERS)
        for position, other in self._text_starts.find_matches(hashes):
            yield int(np.searchsorted(ends, position, side="right")) - 1, other
        long_texts = _indices_of_long_texts(texts)
        for position, other in self._all_positions.find_matches(hashes[ends[long_texts] + 1]):
            yield int(long_texts[position]), other

    def _shared_run_candidates(self, texts: Sequence[str]) -> Iterator[tuple[int, int, int]]:
        """Yield (text, start of the run in it, protected text)."""
        codes = _code_points(texts)
        ends = np.flatnonzero(codes == ord("\n"))
        for position, other in self._shared_runs.find_matches(_hash_runs(codes, SHARED_RUN_CHARACTERS)):
            text = int(np.searchsorted(ends, position, side="right")) - 1
            yield text, position - int(ends[text]) - 1, other


def _indices_of_long_texts(texts: Sequence[str]) -> np.ndarray:
    long_texts = [index for index, text in enumerate(texts) if len(text) >= MIN_CONTAINED_CHARACTERS]
    return np.array(long_texts, dtype=np.int64)


def _hash_runs(codes: np.ndarray, length: int) -> np.ndarray:
    """Return a uint64 hash of the `length` code points from each position on; shorter runs at the end have none."""
    count = max(0, len(codes) - length + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(length):
        hashes = hashes * np.uint64(0x100000001B3) + codes[offset : offset + count]
    return hashes * _HASH_MULTIPLIER


def closest_copy_kind(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the closer `CopyKind` of two arrays, element by element; `NONE` only where both have it."""
    return np.where((a == CopyKind.NONE) | (b == CopyKind.NONE), np.maximum(a, b), np.minimum(a, b))


class ExhaustiveSearchResult(NamedTuple):
    """The result of `find_copies_exhaustively`.

    Attributes:
        copies: ascending indices of the texts that are copies.
        max_similarity: the highest similarity of any other text, rounded to 3 decimals.
    """

    copies: list[int]
    max_similarity: float


def find_copies_exhaustively(texts: Sequence[str], others: Sequence[str]) -> ExhaustiveSearchResult:
    """Compare every text with every other one, to verify what `LeakageIndex` has left.

    This search uses no hashing. It shares with `LeakageIndex` only the definition of a copy: equal, contained (or with
    a long common substring), or near duplicate.
    """
    all_others = "\n".join(others)
    other_set = set(others)
    runs = {
        other[start : start + SHARED_RUN_CHARACTERS]
        for other in others
        for start in range(len(other) - SHARED_RUN_CHARACTERS + 1)
    }
    bigram_index = _BigramIndex(others)
    copies = _find_texts_containing(texts, other_set)
    max_similarity = 0.0
    for index, text in enumerate(texts):
        starts = range(len(text) - SHARED_RUN_CHARACTERS + 1)
        shares_run = any(text[start : start + SHARED_RUN_CHARACTERS] in runs for start in starts)
        is_inside = len(text) >= MIN_CONTAINED_CHARACTERS and text in all_others
        if shares_run or is_inside or text in other_set:
            copies.add(index)
        if index in copies:
            continue
        similarity = bigram_index.max_similarity(text)
        if similarity >= NEAR_DUPLICATE_SIMILARITY:
            copies.add(index)
        else:
            max_similarity = max(max_similarity, similarity)
    return ExhaustiveSearchResult(sorted(copies), round(max_similarity, 3))


def _find_texts_containing(texts: Sequence[str], others: Iterable[str]) -> set[int]:
    """Return the indices of the texts that contain one of `others` (of `MIN_CONTAINED_CHARACTERS` or more)."""
    joined = "\n".join(texts)
    starts, start = [], 0
    for text in texts:
        starts.append(start)
        start += len(text) + 1
    containing: set[int] = set()
    for other in others:
        position = joined.find(other) if len(other) >= MIN_CONTAINED_CHARACTERS else -1
        while position >= 0:
            containing.add(bisect_right(starts, position) - 1)
            position = joined.find(other, position + 1)
    return containing


class _BigramIndex:
    """The texts that have each bigram."""

    def __init__(self, texts: Sequence[str]) -> None:
        postings: dict[str, list[int]] = {}
        for index, text in enumerate(texts):
            for bigram in bigrams(text):
                postings.setdefault(bigram, []).append(index)
        self._postings = {bigram: np.array(indices) for bigram, indices in postings.items()}
        self._sizes = np.array([len(bigrams(text)) for text in texts])

    def max_similarity(self, text: str) -> float:
        """Return the highest `bigram_similarity` of `text` with an indexed text."""
        own = bigrams(text)
        hits = [self._postings[bigram] for bigram in own if bigram in self._postings]
        if not hits:
            return 0.0
        shared = np.bincount(np.concatenate(hits), minlength=len(self._sizes))
        return float((shared / (len(own) + self._sizes - shared)).max())


class _HashIndex:
    """A multimap from 64-bit keys to numbers, for looking up many keys at once."""

    def __init__(self, keys: np.ndarray, numbers: np.ndarray) -> None:
        order = np.argsort(keys, kind="stable")
        self._keys, self._numbers = keys[order], numbers[order]
        # Most queried keys are absent. This table of the upper 20 bits spares them the binary search.
        self._may_contain = np.zeros(2**20, dtype=bool)
        self._may_contain[self._keys >> np.uint64(44)] = True

    def find_matches(self, keys: np.ndarray) -> Iterator[tuple[int, int]]:
        """Yield (index in `keys`, number) for every number stored under that key."""
        indices = np.flatnonzero(self._may_contain[keys >> np.uint64(44)])
        first = np.searchsorted(self._keys, keys[indices], side="left")
        last = np.searchsorted(self._keys, keys[indices], side="right")
        present = last > first
        for index, start, end in zip(
            indices[present].tolist(), first[present].tolist(), last[present].tolist(), strict=True
        ):
            for number in self._numbers[start:end].tolist():
                yield index, number
