"""Near duplicates and leaked copies: the fast search against brute force."""

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hw3.corpus.dedup import (
    NEAR_DUPLICATE_SIMILARITY,
    CopyKind,
    LeakageIndex,
    UnionFind,
    bigram_similarity,
    closest_copy_kind,
    compute_band_keys,
    find_copies_exhaustively,
    union_near_duplicates,
)

CHARACTERS = st.sampled_from("天地玄黄宇宙洪荒")
TEXTS = st.lists(st.text(CHARACTERS, max_size=20) | st.text(st.sampled_from("天地"), max_size=24), max_size=12)


def test_bigram_similarity_is_jaccard_of_bigrams_with_end_marks() -> None:
    assert bigram_similarity("天地玄黄", "天地玄黄") == 1.0
    assert bigram_similarity("天地玄黄", "天地玄宇") == 3 / 7  # ^天 天地 地玄 of 7
    assert bigram_similarity("", "天") == 0.0


@given(TEXTS, TEXTS)
def test_leakage_index_finds_no_copy_that_brute_force_does_not(protected: list[str], texts: list[str]) -> None:
    """MinHash may miss a near duplicate, so the reverse need hold for the other kinds only."""
    kinds = LeakageIndex(protected).find_copies(texts, compute_band_keys(texts)).tolist() if texts else []
    for text, kind in zip(texts, kinds, strict=True):
        is_same = bool(text) and text in protected
        is_contained = any(min(len(text), len(o)) >= 8 and (text in o or o in text) for o in protected)
        is_contained |= any(text[start : start + 16] in o for o in protected for start in range(len(text) - 15))
        is_near = any(o and bigram_similarity(text, o) >= NEAR_DUPLICATE_SIMILARITY for o in protected)
        assert (kind == CopyKind.SAME) == is_same
        assert (kind == CopyKind.CONTAINED) == (is_contained and not is_same)
        assert kind != CopyKind.NEAR or is_near
    non_empty = [o for o in protected if o]
    copies = find_copies_exhaustively(texts, non_empty).copies
    assert {index for index, kind in enumerate(kinds) if kind} <= set(copies)


def test_leakage_index_misses_few_near_duplicates() -> None:
    rng = random.Random(0)
    texts = ["".join(chr(0x4E00 + rng.randrange(2000)) for _ in range(30)) for _ in range(400)]
    changed = [text[:14] + "的" + text[15:] for text in texts]  # 29 of 33 bigrams in common: 0.88
    kinds = LeakageIndex(texts).find_copies(changed, compute_band_keys(changed))
    assert np.bincount(kinds).tolist() == [0, 0, 0, 400]
    unrelated = [text[::-1] for text in texts]
    assert not LeakageIndex(texts).find_copies(unrelated, compute_band_keys(unrelated)).any()


def test_leakage_index_finds_a_long_run_in_common() -> None:
    run = "天地玄黄宇宙洪荒日月盈昃辰宿列张"
    texts = [f"甲乙丙丁戊己庚辛壬癸{run}子丑寅卯辰巳午未", f"甲乙丙丁戊己庚辛壬癸{run[1:]}子丑寅卯辰巳午未"]
    other = f"东西南北中发白春夏秋冬梅兰竹菊{run}金木水火土"
    kinds = LeakageIndex([other]).find_copies(texts, compute_band_keys(texts))
    assert kinds.tolist() == [CopyKind.CONTAINED, CopyKind.NONE]
    assert find_copies_exhaustively(texts, [other]).copies == [0]


def test_find_copies_exhaustively_finds_nothing_without_texts_or_others() -> None:
    assert find_copies_exhaustively([], ["天地玄黄"]) == ([], 0.0)
    assert find_copies_exhaustively(["天地玄黄"], []) == ([], 0.0)


def test_closest_copy_kind_prefers_same_over_contained_over_near() -> None:
    kinds = np.array([[0, 0, 0, 1, 3, 2], [0, 3, 1, 0, 2, 3]], dtype=np.int8)
    assert closest_copy_kind(*kinds).tolist() == [0, 3, 1, 1, 2, 2]


def test_union_near_duplicates_is_transitive() -> None:
    texts = ["天地玄黄宇宙洪荒日月盈昃", "天地玄黄宇宙洪荒日月盈", "地玄黄宇宙洪荒日月盈", "辰宿列张寒来暑往"]
    assert bigram_similarity(texts[0], texts[2]) < 0.7 < bigram_similarity(texts[0], texts[1])
    sets = UnionFind(4)
    union_near_duplicates(sets, texts, compute_band_keys(texts))
    assert [sets.find(index) for index in range(4)] == [0, 0, 0, 3]
