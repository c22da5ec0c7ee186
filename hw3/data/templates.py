"""The homework's instruction templates: write an instruction from one, and recognize that of an instruction.

A template is fixed text with the sentence to translate on its own line. Directions are ``"m2c"``, modern to Classical
Chinese, and ``"c2m"``, Classical to modern.
"""

from __future__ import annotations

import random
from typing import Literal, NamedTuple

Direction = Literal["m2c", "c2m"]


class Template(NamedTuple):
    """One wording of an instruction.

    Attributes:
        text: the instruction, with ``{x}`` in the place of the sentence to translate.
        direction: ``"m2c"`` or ``"c2m"``.
        weight: how often the homework uses the template, relative to the others.
        output_prefix: text that the outputs to this instruction begin with.
    """

    text: str
    direction: Direction
    weight: int = 1
    output_prefix: str = ""

    def render(self, text: str) -> str:
        """Return the instruction that asks for the translation of ``text``."""
        return self.text.replace("{x}", text)


# The homework's 10,000 rows use these 17 templates; two of them have weight 2, so the weights sum to 19. The homework
# writes 下麵 for 下面.
TEMPLATES = (
    Template("{x}\n翻譯成文言文：", "m2c", weight=2),
    Template("{x}\n幫我把這句話翻譯成文言文", "m2c"),
    Template("{x}\n把這句話翻譯成文言文：", "m2c"),
    Template("翻譯成文言文：\n{x}", "m2c"),
    Template("翻譯成文言文：\n{x}\n答案：", "m2c"),
    Template("將下面句子翻譯成文言文：\n{x}", "m2c"),
    Template("{x}\n這句話在古代怎麼說：", "m2c"),
    Template("{x}\n這句話在中國古代怎麼說：", "m2c"),
    Template("{x}\n翻譯成古文：", "m2c"),
    Template("{x}\n翻譯成現代文：", "c2m", weight=2),
    Template("{x}\n幫我把這句話翻譯成現代文", "c2m"),
    Template("{x}\n翻譯成白話文：", "c2m"),
    Template("翻譯成現代文：\n{x}\n答案：", "c2m"),
    Template("文言文翻譯：\n{x}", "c2m", output_prefix="答案："),
    Template("翻譯成現代文：\n{x}", "c2m"),
    Template("將下面句子翻譯成現代文：\n{x}", "c2m"),
    Template("{x}\n把這句話翻譯成現代文。", "c2m"),
)

# The fixed text in simplified characters, for rows that keep the script of the corpus.
_TRADITIONAL, _SIMPLIFIED = "譯幫這話將說麼國現", "译帮这话将说么国现"
_TO_SIMPLIFIED = str.maketrans(_TRADITIONAL, _SIMPLIFIED)
_TO_TRADITIONAL = str.maketrans(_SIMPLIFIED, _TRADITIONAL)

# Longest first: an instruction that ends in 答案： also begins like the same template without it.
_LONGEST_FIRST = sorted(TEMPLATES, key=lambda template: -len(template.text))


def list_templates(direction: Direction) -> list[Template]:
    """Return the templates of a direction, each repeated by its weight: 10 for m2c, 9 for c2m."""
    return [template for template in TEMPLATES if template.direction == direction for _ in range(template.weight)]


def to_script(template: Template, conversion: str) -> Template:
    """Return the template in the script of a text that went through `conversion` (`hw3.corpus.script_conversion`)."""
    if conversion == "none":
        return template._replace(text=template.text.translate(_TO_SIMPLIFIED))
    if conversion == "hanziconv":
        return template._replace(text=template.text.replace("下面", "下麵"))
    return template


def sample_templates(count: int, templates: list[Template], rng: random.Random) -> list[Template]:
    """Return ``count`` templates in random order, each of the list equally often.

    If ``count`` is no multiple of the list's length, the remainder is sampled without replacement.
    """
    sampled = templates * (count // len(templates)) + rng.sample(templates, count % len(templates))
    rng.shuffle(sampled)
    return sampled


def match_template(instruction: str) -> tuple[Template, str] | None:
    """Return the template of ``instruction`` and the text that it asks to translate, or None if no template matches.

    In the fixed text, simplified characters and the homework's 下麵 for 下面 are accepted. The text to translate is
    returned unchanged and is never empty.
    """
    for template in _LONGEST_FIRST:
        before, after = template.text.split("{x}")
        length = len(instruction) - len(before) - len(after)
        if length <= 0:
            continue
        start, end = instruction[: len(before)], instruction[len(before) + length :]
        fixed = (start.replace("下麵", "下面").translate(_TO_TRADITIONAL), end.translate(_TO_TRADITIONAL))
        if fixed == (before, after):
            return template, instruction[len(before) : len(before) + length]
    return None


def detect_direction(instruction: str) -> Direction | None:
    """Return ``"m2c"`` or ``"c2m"``, or None if the instruction follows no template."""
    matched = match_template(instruction)
    return matched[0].direction if matched else None
