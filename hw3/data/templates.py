"""The homework's instruction templates: to word a request, and to tell what a worded request asks.

A template is fixed text with the sentence to translate on a line of its own. Directions are ``"m2c"``, modern
to Classical Chinese, and ``"c2m"``, Classical to modern.
"""

from __future__ import annotations

import random
from typing import Literal, NamedTuple

Direction = Literal["m2c", "c2m"]


class Template(NamedTuple):
    """One wording. It is drawn with weight ``slots``; answers to it begin with ``answer_prefix``."""

    text: str
    direction: Direction
    slots: int = 1
    answer_prefix: str = ""

    def render(self, text: str) -> str:
        """The instruction that asks for the translation of ``text``."""
        return self.text.replace("{x}", text)


# The 17 shapes and 19 slots of the homework's 10,000 rows, with 下面 for its 下麵.
TEMPLATES = (
    Template("{x}\n翻譯成文言文：", "m2c", slots=2),
    Template("{x}\n幫我把這句話翻譯成文言文", "m2c"),
    Template("{x}\n把這句話翻譯成文言文：", "m2c"),
    Template("翻譯成文言文：\n{x}", "m2c"),
    Template("翻譯成文言文：\n{x}\n答案：", "m2c"),
    Template("將下面句子翻譯成文言文：\n{x}", "m2c"),
    Template("{x}\n這句話在古代怎麼說：", "m2c"),
    Template("{x}\n這句話在中國古代怎麼說：", "m2c"),
    Template("{x}\n翻譯成古文：", "m2c"),
    Template("{x}\n翻譯成現代文：", "c2m", slots=2),
    Template("{x}\n幫我把這句話翻譯成現代文", "c2m"),
    Template("{x}\n翻譯成白話文：", "c2m"),
    Template("翻譯成現代文：\n{x}\n答案：", "c2m"),
    Template("文言文翻譯：\n{x}", "c2m", answer_prefix="答案："),
    Template("翻譯成現代文：\n{x}", "c2m"),
    Template("將下面句子翻譯成現代文：\n{x}", "c2m"),
    Template("{x}\n把這句話翻譯成現代文。", "c2m"),
)

# The fixed text in simplified characters, for rows that keep the script of the corpus.
_TRADITIONAL, _SIMPLIFIED = "譯幫這話將說麼國現", "译帮这话将说么国现"
_TO_SIMPLIFIED = str.maketrans(_TRADITIONAL, _SIMPLIFIED)
_FROM_SIMPLIFIED = str.maketrans(_SIMPLIFIED, _TRADITIONAL)

# Longest fixed text first: an instruction that ends in 答案： also begins like the same template without it.
_BY_LENGTH = sorted(TEMPLATES, key=lambda template: -len(template.text))


def slots(direction: Direction) -> list[Template]:
    """The templates of ``direction``, each as often as it has slots: 10 for m2c, 9 for c2m."""
    return [template for template in TEMPLATES if template.direction == direction for _ in range(template.slots)]


def spell(template: Template, conversion: str) -> Template:
    """The template in the characters of a text that went through `conversion` (`hw3.corpus.script_conversion`)."""
    if conversion == "none":
        return template._replace(text=template.text.translate(_TO_SIMPLIFIED))
    if conversion == "hanziconv":
        return template._replace(text=template.text.replace("下面", "下麵"))
    return template


def draw(count: int, templates: list[Template], rng: random.Random) -> list[Template]:
    """``count`` templates in random order; each of the list comes equally often, but for a remainder."""
    drawn = templates * (count // len(templates)) + rng.sample(templates, count % len(templates))
    rng.shuffle(drawn)
    return drawn


def match(instruction: str) -> tuple[Template, str] | None:
    """The template that ``instruction`` is worded by and the text it asks to translate, or None.

    下麵, as the homework's character map spells 下面, and simplified characters are accepted in the fixed text; the
    text itself is returned as it stands. A text is never empty.
    """
    for template in _BY_LENGTH:
        before, after = template.text.split("{x}")
        length = len(instruction) - len(before) - len(after)
        if length <= 0:
            continue
        start, end = instruction[: len(before)], instruction[len(before) + length :]
        fixed = (start.replace("下麵", "下面").translate(_FROM_SIMPLIFIED), end.translate(_FROM_SIMPLIFIED))
        if fixed == (before, after):
            return template, instruction[len(before) : len(before) + length]
    return None


def direction_of(instruction: str) -> Direction | None:
    """``"m2c"`` or ``"c2m"`` by the template of ``instruction``; None if it follows no template."""
    found = match(instruction)
    return found[0].direction if found else None


def text_of(instruction: str) -> str | None:
    """The text that ``instruction`` asks to translate; None if it follows no template."""
    found = match(instruction)
    return found[1] if found else None
