"""Every template with its literal text, and the round trip from rendering to matching."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hw3.data.templates import TEMPLATES, Template, detect_direction, list_templates, match_template

INSTRUCTIONS = [
    ("今日無雨。\n翻譯成現代文：", "c2m", "今日無雨。"),
    ("今日無雨。\n幫我把這句話翻譯成現代文", "c2m", "今日無雨。"),
    ("今日無雨。\n翻譯成白話文：", "c2m", "今日無雨。"),
    ("翻譯成現代文：\n今日無雨。\n答案：", "c2m", "今日無雨。"),
    ("文言文翻譯：\n今日無雨。", "c2m", "今日無雨。"),
    ("翻譯成現代文：\n今日無雨。", "c2m", "今日無雨。"),
    ("將下面句子翻譯成現代文：\n今日無雨。", "c2m", "今日無雨。"),
    ("今日無雨。\n把這句話翻譯成現代文。", "c2m", "今日無雨。"),
    ("今天沒有下雨。\n翻譯成文言文：", "m2c", "今天沒有下雨。"),
    ("今天沒有下雨。\n幫我把這句話翻譯成文言文", "m2c", "今天沒有下雨。"),
    ("今天沒有下雨。\n把這句話翻譯成文言文：", "m2c", "今天沒有下雨。"),
    ("翻譯成文言文：\n今天沒有下雨。", "m2c", "今天沒有下雨。"),
    ("翻譯成文言文：\n今天沒有下雨。\n答案：", "m2c", "今天沒有下雨。"),
    ("將下面句子翻譯成文言文：\n今天沒有下雨。", "m2c", "今天沒有下雨。"),
    ("今天沒有下雨。\n這句話在古代怎麼說：", "m2c", "今天沒有下雨。"),
    ("今天沒有下雨。\n這句話在中國古代怎麼說：", "m2c", "今天沒有下雨。"),
    ("今天沒有下雨。\n翻譯成古文：", "m2c", "今天沒有下雨。"),
]


@pytest.mark.parametrize(("instruction", "direction", "text"), INSTRUCTIONS)
def test_every_template_is_recognized(instruction: str, direction: str, text: str) -> None:
    matched = match_template(instruction)
    assert matched is not None and matched[0].direction == detect_direction(instruction) == direction
    assert matched[1] == text


def test_templates_render_to_the_literal_instructions() -> None:
    rendered = {
        template.render("今日無雨。" if template.direction == "c2m" else "今天沒有下雨。") for template in TEMPLATES
    }
    assert rendered == {instruction for instruction, _, _ in INSTRUCTIONS}


@pytest.mark.parametrize(
    ("instruction", "direction", "text"),
    [
        ("將下麵句子翻譯成文言文：\n桌子上擺著一碗麵。", "m2c", "桌子上擺著一碗麵。"),
        ("將下麵句子翻譯成現代文：\n下麵一器。", "c2m", "下麵一器。"),
        ("一行。\n又一行。\n翻譯成古文：", "m2c", "一行。\n又一行。"),
    ],
)
def test_homework_spelling_and_multi_line_texts_are_recognized(instruction: str, direction: str, text: str) -> None:
    matched = match_template(instruction)
    assert matched is not None and matched[0].direction == detect_direction(instruction) == direction
    assert matched[1] == text


@pytest.mark.parametrize(
    "instruction", ["", "今日無雨。", "翻譯成英文：\n今日無雨。", "翻譯成文言文：\n", "\n翻譯成現代文："]
)
def test_other_instructions_have_no_direction(instruction: str) -> None:
    assert match_template(instruction) is None
    assert detect_direction(instruction) is None


def test_weights_and_output_prefix() -> None:
    assert len(TEMPLATES) == 17
    assert [len(list_templates("m2c")), len(list_templates("c2m"))] == [10, 9]
    assert [(t.text, t.output_prefix) for t in TEMPLATES if t.output_prefix] == [("文言文翻譯：\n{x}", "答案：")]


# A text that equals the fixed text of a template would be ambiguous; no sentence does.
SENTENCES = st.text(
    st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF) | st.sampled_from("，。：；？！「」"),
    min_size=1,
)


@given(template=st.sampled_from(TEMPLATES), text=SENTENCES)
def test_match_template_inverts_render(template: Template, text: str) -> None:
    assert match_template(template.render(text)) == (template, text)
