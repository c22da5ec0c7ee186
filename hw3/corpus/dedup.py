"""Near duplicates, by MinHash, and the copies of texts that must stay unseen.

Everything here is about skeletons (see `hw3.corpus.normalize`): one script, no punctuation. Two are near duplicates
when the Jaccard similarity of their character bigrams, the ends of the text included, is at least `NEAR`. MinHash
proposes the pairs (Broder, "On the resemblance and containment of documents", 1997), the bigrams themselves decide.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from operator import add
from typing import Any

import numpy as np
from rensa import RMinHash

NEAR = 0.6
# Proposed with probability 1 - (1 - s^3)^16 at similarity s: 98 % at 0.6, 99.8 % at 0.7, all but sure above.
BANDS, ROWS = 16, 3
SEED = 1
SAME, INSIDE, NEARLY = 1, 2, 3  # how a text is a copy
RUN = 8  # characters: of two texts, one inside the other, the shorter has at least so many
LONG_RUN = 16  # characters in a row that two texts have in common: one has a part of the other inside
_CHUNK = 50_000  # texts whose digests are Python numbers at one time
_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, odd: Knuth's multiplicative hash


@lru_cache(maxsize=2**16)
def bigrams(skeleton: str) -> frozenset[str]:
    """Pairs of neighbouring characters; the first and the last one with an end mark."""
    marked = f"\n{skeleton}\n"
    return frozenset(map(add, marked, marked[1:]))


def similarity(a: str, b: str) -> float:
    """Jaccard similarity of two skeletons' bigrams, 0 to 1."""
    first, second = bigrams(a), bigrams(b)
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)


def band_keys(skeletons: Sequence[str]) -> np.ndarray:
    """One key a band, uint64 of shape (texts, BANDS): texts that share one may be near duplicates."""
    keys = [_band_keys(skeletons[at : at + _CHUNK]) for at in range(0, len(skeletons), _CHUNK)]
    return np.concatenate(keys) if keys else np.empty((0, BANDS), np.uint64)


def _band_keys(skeletons: Sequence[str]) -> np.ndarray:
    codes = _codes(skeletons)
    tokens = (codes[:-1] << np.uint64(32) | codes[1:]) * _MIX
    starts = np.flatnonzero(codes == ord("\n")).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        tokens ^ tokens >> np.uint64(29), starts, num_perm=BANDS * ROWS, seed=SEED
    )
    digests = np.array(matrix.to_rows(), dtype=np.uint64).reshape(-1, BANDS, ROWS)
    keys = np.zeros(digests.shape[:2], dtype=np.uint64)
    for row in range(ROWS):
        keys = (keys ^ digests[:, :, row]) * _MIX
        keys ^= keys >> np.uint64(32)
    return keys


def _codes(skeletons: Sequence[str]) -> np.ndarray:
    """Code points of all texts, uint64, a line end before, between and after them."""
    text = "\n" + "".join(f"{skeleton}\n" for skeleton in skeletons)
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)


class Groups:
    """Union-find over the numbers 0 to size - 1; a group is known by its smallest number."""

    def __init__(self, size: int) -> None:
        self._parent = list(range(size))

    def find(self, item: int) -> int:
        """The smallest number of the group of `item`."""
        parent = self._parent
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    def union(self, a: int, b: int) -> None:
        """Make one group of two."""
        a, b = self.find(a), self.find(b)
        if a != b:
            self._parent[max(a, b)] = min(a, b)


def join_near_duplicates(groups: Groups, skeletons: Sequence[str], keys: np.ndarray) -> None:
    """Join the groups of texts that are near duplicates.

    Args:
        groups: one number a text.
        skeletons: the texts, none twice.
        keys: their `band_keys`.
    """
    for band in range(keys.shape[1]):
        for bucket in _equal(keys[:, band]):
            # One of each group stands for it, so a bucket of n copies costs n comparisons.
            standing: dict[int, int] = {}
            for text in bucket:
                own = groups.find(text)
                if own in standing:
                    continue
                for root, other in list(standing.items()):
                    if similarity(skeletons[text], skeletons[other]) >= NEAR:
                        groups.union(own, root)
                        del standing[root]
                        own = groups.find(own)
                standing[own] = text


def join_equal(groups: Groups, texts: Sequence[str], fewest: int) -> None:
    """Join the groups of equal texts of at least `fewest` characters."""
    first: dict[str, int] = {}
    for number, text in enumerate(texts):
        if len(text) >= fewest:
            groups.union(first.setdefault(text, number), number)


def _equal(keys: np.ndarray) -> Iterator[list[int]]:
    """The places of each key that stands more than once, in order."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    edges = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1], [True]]))
    several = np.flatnonzero(np.diff(edges) > 1)
    for start, end in zip(edges[several].tolist(), edges[several + 1].tolist(), strict=True):
        yield order[start:end].tolist()


class Unseen:
    """Texts that must stay unseen, and a search for their copies: the same, one inside the other (or a
    run of `LONG_RUN` characters of it), or nearly the same.

    Args:
        skeletons: the texts.
    """

    def __init__(self, skeletons: Iterable[str]) -> None:
        self.texts = sorted({skeleton for skeleton in skeletons if skeleton})
        self._same = set(self.texts)
        long = np.array([number for number, text in enumerate(self.texts) if len(text) >= RUN], dtype=np.int64)
        codes = _codes([self.texts[number] for number in long])
        runs = _runs(codes)
        starts = np.flatnonzero(codes == ord("\n"))[:-1] + 1
        # By its first RUN characters each text is found inside another; by any RUN of its own, another inside it.
        self._first = _Index(runs[starts[: len(long)]], long)
        inside = np.flatnonzero(codes != ord("\n"))
        inside = inside[inside < len(runs)]
        owner = long[np.searchsorted(starts, inside, side="right") - 1] if len(long) else inside
        self._any = _Index(runs[inside], owner)
        long_runs = _runs(codes, LONG_RUN)
        self._parts = _Index(long_runs[inside[inside < len(long_runs)]], owner[inside < len(long_runs)])
        self._bands = [_Index(column, np.arange(len(self.texts))) for column in band_keys(self.texts).T]

    def copies(self, skeletons: Sequence[str], keys: np.ndarray) -> np.ndarray:
        """How each text is a copy: 0 not at all, `SAME`, `INSIDE` or `NEARLY`; int8 of shape (texts,).

        Args:
            skeletons: the texts to judge.
            keys: their `band_keys`.
        """
        kinds = np.zeros(len(skeletons), dtype=np.int8)
        if not self.texts or not len(skeletons):
            return kinds
        for text, other in self._nearly(keys):
            if not kinds[text] and similarity(skeletons[text], self.texts[other]) >= NEAR:
                kinds[text] = NEARLY
        for text, other in self._inside(skeletons):
            a, b = skeletons[text], self.texts[other]
            if kinds[text] != INSIDE and min(len(a), len(b)) >= RUN and (a in b or b in a):
                kinds[text] = INSIDE
        for text, start, other in self._share_a_part(skeletons):
            part = skeletons[text][start : start + LONG_RUN]
            if kinds[text] != INSIDE and len(part) == LONG_RUN and part in self.texts[other]:
                kinds[text] = INSIDE
        kinds[[number for number, skeleton in enumerate(skeletons) if skeleton in self._same]] = SAME
        return kinds

    def _nearly(self, keys: np.ndarray) -> Iterator[tuple[int, int]]:
        for index, column in zip(self._bands, keys.T, strict=True):
            yield from index.matches(column)

    def _inside(self, skeletons: Sequence[str]) -> Iterator[tuple[int, int]]:
        codes = _codes(skeletons)
        ends = np.flatnonzero(codes == ord("\n"))
        runs = _runs(codes)
        for place, other in self._first.matches(runs):
            yield int(np.searchsorted(ends, place, side="right")) - 1, other
        long = np.array([number for number, text in enumerate(skeletons) if len(text) >= RUN], dtype=np.int64)
        for at, other in self._any.matches(runs[ends[long] + 1]):
            yield int(long[at]), other

    def _share_a_part(self, skeletons: Sequence[str]) -> Iterator[tuple[int, int, int]]:
        codes = _codes(skeletons)
        ends = np.flatnonzero(codes == ord("\n"))
        for place, other in self._parts.matches(_runs(codes, LONG_RUN)):
            text = int(np.searchsorted(ends, place, side="right")) - 1
            yield text, place - int(ends[text]) - 1, other


def _runs(codes: np.ndarray, length: int = RUN) -> np.ndarray:
    """A hash of the `length` code points from each place on, uint64; the last places, with fewer, are left out."""
    count = max(0, len(codes) - length + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    for at in range(length):
        hashes = hashes * np.uint64(0x100000001B3) + codes[at : at + count]
    return hashes * _MIX


def compare_all(skeletons: Sequence[str], others: Sequence[str]) -> dict[str, Any]:
    """Compare every text with every other one by brute force, to check what `Unseen` has left.

    No hashing and nothing in common with `Unseen` but the definition: equal, one (or a long run of it) inside the
    other, near duplicates.

    Returns:
        `copies`, the numbers of the texts that are copies, and `largest_similarity` of all the others.
    """
    same, numbers = set(others), {}
    for number, other in enumerate(others):
        for bigram in bigrams(other):
            numbers.setdefault(bigram, []).append(number)
    posting = {bigram: np.array(list_) for bigram, list_ in numbers.items()}
    sizes = np.array([len(bigrams(other)) for other in others])
    all_others = "\n".join(others)
    copies: set[int] = set()
    all_texts, places = _joined(skeletons)
    for other in same:
        at = all_texts.find(other) if len(other) >= RUN else -1
        while at >= 0:
            copies.add(bisect_right(places, at) - 1)
            at = all_texts.find(other, at + 1)
    parts = {other[at : at + LONG_RUN] for other in others for at in range(len(other) - LONG_RUN + 1)}
    largest = 0.0
    for number, text in enumerate(skeletons):
        shares = any(text[at : at + LONG_RUN] in parts for at in range(len(text) - LONG_RUN + 1))
        if shares or text in same or (len(text) >= RUN and text in all_others):
            copies.add(number)
        own = bigrams(text)
        hits = [posting[bigram] for bigram in own if bigram in posting]
        if number in copies or not hits:
            continue
        shared = np.bincount(np.concatenate(hits), minlength=len(others))
        most = float((shared / (len(own) + sizes - shared)).max())
        if most >= NEAR:
            copies.add(number)
        else:
            largest = max(largest, most)
    return {"copies": sorted(copies), "largest_similarity": round(largest, 3)}


def _joined(texts: Sequence[str]) -> tuple[str, list[int]]:
    """The texts with line ends between, and where each begins."""
    starts, at = [], 0
    for text in texts:
        starts.append(at)
        at += len(text) + 1
    return "\n".join(texts), starts


class _Index:
    """Numbers by key, looked up many at a time."""

    def __init__(self, keys: np.ndarray, numbers: np.ndarray) -> None:
        order = np.argsort(keys, kind="stable")
        self._keys, self._numbers = keys[order], numbers[order]
        # A table by the upper 20 bits spares most keys, which are not there, the search.
        self._maybe = np.zeros(2**20, dtype=bool)
        self._maybe[self._keys >> np.uint64(44)] = True

    def matches(self, keys: np.ndarray) -> Iterator[tuple[int, int]]:
        """(place in `keys`, number) for every number that has the key of that place."""
        places = np.flatnonzero(self._maybe[keys >> np.uint64(44)])
        start = np.searchsorted(self._keys, keys[places], side="left")
        end = np.searchsorted(self._keys, keys[places], side="right")
        found = end > start
        for place, first, last in zip(places[found].tolist(), start[found].tolist(), end[found].tolist(), strict=True):
            for number in self._numbers[first:last].tolist():
                yield place, number
