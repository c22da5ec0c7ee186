"""Which pairs of a corpus are no translation that a model should learn from. Every rule is counted."""

from __future__ import annotations

import re

from hw3.corpus.dedup import LONG_RUN

SHORTEST = 4  # characters of a side, punctuation left out
LONGEST = 400  # characters of both sides; with a prompt of the recipes' length they fit into 512 tokens
LEAST_RATIO, MOST_RATIO = 0.75, 4.0  # characters of the translation to those of the Classical text
OVERLAP_FROM, LEAST_OVERLAP = 8, 0.15  # distinct Classical characters; the share of them that the translation has, too

# In the order of their use: a pair is counted under the first rule that it breaks.
RULES = {
    "empty": "a side is empty",
    "odd characters": "Latin letters, gap marks (□ ◆), bare radicals (氵), private-use and control characters",
    "identical": "both sides say the same",
    "length": f"a side has under {SHORTEST} characters, or both together over {LONGEST}",
    "length ratio": f"the translation is under {LEAST_RATIO:g} or over {MOST_RATIO:g} times as long",
    "character overlap": f"under {LEAST_OVERLAP:.0%} of {OVERLAP_FROM} or more Classical characters are in it",
    "excluded: same": "a side is a sentence of an excluded file",
    "excluded: inside": f"a side has an excluded sentence, or {LONG_RUN} characters of one, inside, or is inside one",
    "excluded: near": "a side is a near duplicate of an excluded sentence",
    "duplicate": "an earlier pair has the same sides",
}
# The radicals that no text has by themselves stand for half of a character that an edition could not print (氵垒).
_ODD = re.compile(
    "[亻冫冖讠刂卩阝艹彡犭饣忄氵宀纟辶疒礻衤钅罒攵灬爫丬糹釒飠]|"
    "[^\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U000323af〇々0-9 "
    "，。、：；？！《》〈〉「」『』“”‘’（）〔〕【】…—─－·,.:;?!()\"'-]"
)


def fault(classical: str, modern: str, skeletons: tuple[str, str]) -> str | None:
    """The first of `RULES`, up to the overlap, that a pair breaks; None for a good one.

    Args:
        classical: as published.
        modern: its translation, as published.
        skeletons: of both, see `hw3.corpus.normalize`.
    """
    if not classical.strip() or not modern.strip():
        return "empty"
    if _ODD.search(classical) or _ODD.search(modern):
        return "odd characters"
    source, target = skeletons
    if source == target:
        return "identical"
    if min(len(source), len(target)) < SHORTEST or len(classical) + len(modern) > LONGEST:
        return "length"
    if not LEAST_RATIO <= len(target) / len(source) <= MOST_RATIO:
        return "length ratio"
    characters = set(source)
    if len(characters) >= OVERLAP_FROM and len(characters & set(target)) < LEAST_OVERLAP * len(characters):
        return "character overlap"
    return None


def odd_characters(text: str) -> list[str]:
    """The characters of a text that the rule on odd characters is about."""
    return _ODD.findall(text)
