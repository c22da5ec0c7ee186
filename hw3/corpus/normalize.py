"""One sentence in its many spellings: folded to one script, stripped of punctuation; and which script a text is in."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from opencc import OpenCC

# What folding one by one would tell apart: characters that the homework's one-to-one map or OpenCC's words write for
# one another (着 and 著, 咨 and 谘), and variants that editions do not agree on.
_SAME = str.maketrans(
    "瞭著藉寜榖幺遝馀覆揹暱沉彊甦衞崐玨毘妳䦆丬佘侭勐哌哢唕唚唿嗬噼垧垵堿屙屭崃崳嵴嶴憷扡摣撚桊槁檾氹渖湣滤潀濔煆煳熘瑉痺睪矽硷碹穞簷糸緪肷腭臒"
    "艸苧襆讬谘迳郄钖钜锺镟阪鞀鞴鯵鲶鴬鶤麅麹齇𠯠𦰏𫄶𫏋𬸯",
    "了着借宁谷么沓余复背昵沈强苏卫昆珏毗你镢爿畲尽猛呱咔唣吣呼呵劈坰埯碱疴屃峡嵛脊岙怵扦揸捻棬藁苘凼沈愍泸潨沵煅糊溜珉痹睾硅碱旋稆檐纟縆膁颚癯"
    "艹苎幞托咨径郤锡巨钟旋坂鼗鞲鲹鲇鸴鹍狍曲齄咴莜襁硚䴙",
)
_NEWLINE = ord("\n")


def fold(text: str) -> str:
    """`text` in simplified characters, converted one by one, so that the words around them play no part.

    A conversion by words keeps 乾 in 乾坤; a one-to-one conversion to Traditional, as the homework's, writes
    齣 for every 出. Folded, all spellings of a text are the same. The length does not change.
    """
    return "".join(map(_fold_character, text))


def without_punctuation(text: str) -> str:
    """`text` without punctuation, symbols and white space; line ends stay, as they part the texts."""
    return text.translate({ord(c): None for c in set(text) if not c.isalnum() and c != "\n"})


def skeletons(texts: Sequence[str]) -> list[str]:
    """Each text folded and without anything but characters and digits: equal for all spellings of a sentence.

    The same as `without_punctuation(fold(text))` of each, for millions of texts. Line ends inside a text are dropped.
    """
    if not texts:
        return []
    codes = np.frombuffer("\n".join(text.replace("\n", "") for text in texts).encode("utf-32-le"), dtype=np.uint32)
    table = np.zeros(0x110000, dtype=np.uint32)  # 0: dropped
    table[_NEWLINE] = _NEWLINE
    for code in np.flatnonzero(np.bincount(codes, minlength=0x110000)):
        character = chr(code)
        if character.isalnum():
            table[code] = ord(_fold_character(character))
    folded = table[codes]
    return folded[folded != 0].tobytes().decode("utf-32-le").split("\n")


@cache
def script_of(character: str) -> str | None:
    """`simplified` or `traditional` for a character that only one of the two scripts has; None for all others.

    By the national character sets, GB 2312 for the simplified and Big5 for the traditional script, and by OpenCC, which
    must have another character for it in the other script. A character of both (天, 后) says nothing.
    """
    simplified, traditional = (_encodes(character, codec) for codec in ("gb2312", "big5"))
    if simplified == traditional or _convert("s2t" if simplified else "t2s", character) == character:
        return None
    return "simplified" if simplified else "traditional"


def _encodes(character: str, codec: str) -> bool:
    try:
        character.encode(codec)
    except UnicodeEncodeError:
        return False
    return True


@cache
def _fold_character(character: str) -> str:
    return _convert("t2s", character).translate(_SAME)


def _convert(conversion: str, text: str) -> str:
    return _opencc(conversion).convert(text)


@cache
def _opencc(conversion: str) -> OpenCC:
    return OpenCC(conversion)
