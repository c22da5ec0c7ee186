"""Rules that reject sentence pairs which a translation model should not learn from. `data.json` counts each rule."""

from __future__ import annotations

import re

from hw3.corpus.dedup import SHARED_RUN_CHARACTERS

MIN_SIDE_CHARACTERS = 4  # per side, without punctuation
MAX_PAIR_CHARACTERS = 400  # both sides together; with a prompt of the recipes' length they fit into 512 tokens
MIN_LENGTH_RATIO, MAX_LENGTH_RATIO = 0.75, 4.0  # characters of the translation per character of the Classical text
# Share of the distinct Classical characters that the translation also has, for texts with at least so many of them.
MIN_CHARACTER_OVERLAP, OVERLAP_MIN_CHARACTERS = 0.15, 8

# In the order of application: a pair is counted under the first rule that rejects it.
FILTER_RULES = {
    "empty": "a side is empty",
    "odd characters": "Latin letters, gap marks (□ ◆), bare radicals (氵), private-use and control characters",
    "identical": "both sides are the same text",
    "length": f"a side has under {MIN_SIDE_CHARACTERS} characters, or both together over {MAX_PAIR_CHARACTERS}",
    "length ratio": f"the translation is under {MIN_LENGTH_RATIO:g} or over {MAX_LENGTH_RATIO:g} times as long",
    "character overlap": (
        f"the translation has under {MIN_CHARACTER_OVERLAP:.0%} of the {OVERLAP_MIN_CHARACTERS} or more distinct "
        "Classical characters"
    ),
    "excluded: same": "a side is a sentence of an excluded file",
    "excluded: contained": (
        f"a side contains an excluded sentence or {SHARED_RUN_CHARACTERS} characters of one, or is contained in one"
    ),
    "excluded: near": "a side is a near duplicate of an excluded sentence",
    "duplicate": "an earlier pair has the same sides",
}
# A bare radical stands for a part of a character that an edition could not print (氵垒).
_ODD_CHARACTER = re.compile(
    "[亻冫冖讠刂卩阝艹彡犭饣忄氵宀纟辶疒礻衤钅罒攵灬爫丬糹釒飠]|"
    "[^\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U000323af〇々0-9 "
    "，。、：；？！《》〈〉「」『』“”‘’（）〔〕【】…—─－·,.:;?!()\"'-]"
)


def rejection_reason(classical: str, modern: str, normalized: tuple[str, str]) -> str | None:
    """Return the first of `FILTER_RULES`, up to "character overlap", that rejects a pair, or None.

    Args:
        classical: as published.
        modern: its translation, as published.
        normalized: both, normalized (`hw3.corpus.normalize.normalize_texts`).
    """
    if not classical.strip() or not modern.strip():
        return "empty"
    if _ODD_CHARACTER.search(classical) or _ODD_CHARACTER.search(modern):
        return "odd characters"
    source, target = normalized
    if source == target:
        return "identical"
    if min(len(source), len(target)) < MIN_SIDE_CHARACTERS or len(classical) + len(modern) > MAX_PAIR_CHARACTERS:
        return "length"
    if not MIN_LENGTH_RATIO <= len(target) / len(source) <= MAX_LENGTH_RATIO:
        return "length ratio"
    characters = set(source)
    shared = len(characters & set(target))
    if len(characters) >= OVERLAP_MIN_CHARACTERS and shared < MIN_CHARACTER_OVERLAP * len(characters):
        return "character overlap"
    return None


def find_odd_characters(text: str) -> list[str]:
    """Return the characters of a text that the rule "odd characters" rejects."""
    return _ODD_CHARACTER.findall(text)
