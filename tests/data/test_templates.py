"""Every template by its literal wording, and rendering undone by recognising."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hw3.data.templates import TEMPLATES, direction_of, match, slots, text_of

WORDINGS = [
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


@pytest.mark.parametrize(("instruction", "direction", "text"), WORDINGS)
def test_every_wording_is_recognised(instruction: str, direction: str, text: str) -> None:
    assert direction_of(instruction) == direction
    assert text_of(instruction) == text


def test_the_wordings_are_all_the_templates() -> None:
    rendered = {
        template.render("今日無雨。" if template.direction == "c2m" else "今天沒有下雨。") for template in TEMPLATES
    }
    assert rendered == {instruction for instruction, _, _ in WORDINGS}


@pytest.mark.parametrize(
    ("instruction", "direction", "text"),
    [
        ("將下麵句子翻譯成文言文：\n桌子上擺著一碗麵。", "m2c", "桌子上擺著一碗麵。"),
        ("將下麵句子翻譯成現代文：\n下麵一器。", "c2m", "下麵一器。"),
        ("一行。\n又一行。\n翻譯成古文：", "m2c", "一行。\n又一行。"),
    ],
)
def test_the_homeworks_spelling_and_texts_of_several_lines(instruction: str, direction: str, text: str) -> None:
    assert direction_of(instruction) == direction
    assert text_of(instruction) == text


@pytest.mark.parametrize(
    "instruction", ["", "今日無雨。", "翻譯成英文：\n今日無雨。", "翻譯成文言文：\n", "\n翻譯成現代文："]
)
def test_anything_else_has_no_direction(instruction: str) -> None:
    assert direction_of(instruction) is None
    assert text_of(instruction) is None


def test_slots_and_the_one_answer_prefix() -> None:
    assert len(TEMPLATES) == 17
    assert [len(slots("m2c")), len(slots("c2m"))] == [10, 9]
    assert [(t.text, t.answer_prefix) for t in TEMPLATES if t.answer_prefix] == [("文言文翻譯：\n{x}", "答案：")]


# A text that is itself a template's fixed line is ambiguous by nature; no sentence is one.
SENTENCES = st.text(
    st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF) | st.sampled_from("，。：；？！「」"),
    min_size=1,
)


@given(template=st.sampled_from(TEMPLATES), text=SENTENCES)
def test_recognising_undoes_rendering(template, text: str) -> None:
    assert match(template.render(text)) == (template, text)
