"""Normalize the spellings of a sentence (one script, no punctuation), and detect which script a character is in."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from opencc import OpenCC

# Characters that converting one by one keeps apart although they spell the same word: those that the homework's
# one-to-one map or OpenCC's phrases exchange (着 and 著, 咨 and 谘), and variants on which editions disagree.
_MERGED_VARIANTS = str.maketrans(
    "瞭著藉寜榖幺遝馀覆揹暱沉彊甦衞崐玨毘妳䦆丬佘侭勐哌哢唕唚唿嗬噼垧垵堿屙屭崃崳嵴嶴憷扡摣撚桊槁檾氹渖湣滤潀濔煆煳熘瑉痺睪矽硷碹穞簷糸緪肷腭臒"
    "艸苧襆讬谘迳郄钖钜锺镟阪鞀鞴鯵鲶鴬鶤麅麹齇𠯠𦰏𫄶𫏋𬸯",
    "了着借宁谷么沓余复背昵沈强苏卫昆珏毗你镢爿畲尽猛呱咔唣吣呼呵劈坰埯碱疴屃峡嵛脊岙怵扦揸捻棬藁苘凼沈愍泸潨沵煅糊溜珉痹睾硅碱旋稆檐纟縆膁颚癯"
    "艹苎幞托咨径郤锡巨钟旋坂鼗鞲鲹鲇鸴鹍狍曲齄咴莜襁硚䴙",
)
_NEWLINE = ord("\n")


def to_simplified(text: str) -> str:
    """Return the text in simplified characters, converted one by one, so that context has no influence.

    A conversion by phrases keeps 乾 in 乾坤, and a one-to-one conversion to Traditional, like the homework's, writes 齣
    for every 出. Here all spellings of a text give the same result. The length does not change.
    """
    return "".join(map(_simplify_character, text))


def remove_punctuation(text: str) -> str:
    """Return the text without punctuation, symbols and white space. Newlines stay, because they separate texts."""
    return text.translate({ord(c): None for c in set(text) if not c.isalnum() and c != "\n"})


def normalize_texts(texts: Sequence[str]) -> list[str]:
    """Return each text in simplified characters, letters and digits only: equal for all spellings of a sentence.

    This equals `remove_punctuation(to_simplified(text))` without newlines, and is fast enough for millions of texts.
    """
    if not texts:
        return []
    codes = np.frombuffer("\n".join(text.replace("\n", "") for text in texts).encode("utf-32-le"), dtype=np.uint32)
    table = np.zeros(0x110000, dtype=np.uint32)  # 0 marks characters to remove
    table[_NEWLINE] = _NEWLINE
    for code in np.flatnonzero(np.bincount(codes, minlength=0x110000)):
        character = chr(code)
        if character.isalnum():
            table[code] = ord(_simplify_character(character))
    normalized = table[codes]
    return normalized[normalized != 0].tobytes().decode("utf-32-le").split("\n")


@cache
def detect_script(character: str) -> str | None:
    """Return "simplified" or "traditional" for a character that only one of the two scripts has, else None.

    The character must be in only one of the national character sets, GB 2312 (simplified) and Big5 (Traditional), and
    OpenCC must convert it to another character in the other script. None for characters of both scripts, as 天 and 后.
    """
    is_simplified, is_traditional = (_is_encodable(character, codec) for codec in ("gb2312", "big5"))
    if is_simplified == is_traditional or _convert("s2t" if is_simplified else "t2s", character) == character:
        return None
    return "simplified" if is_simplified else "traditional"


def _is_encodable(character: str, codec: str) -> bool:
    try:
        character.encode(codec)
    except UnicodeEncodeError:
        return False
    return True


@cache
def _simplify_character(character: str) -> str:
    return _convert("t2s", character).translate(_MERGED_VARIANTS)


def _convert(conversion: str, text: str) -> str:
    return _load_opencc(conversion).convert(text)


@cache
def _load_opencc(conversion: str) -> OpenCC:
    return OpenCC(conversion)
