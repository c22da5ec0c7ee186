"""One normalized form for all spellings of a sentence, and the script of a character."""

from hypothesis import given
from hypothesis import strategies as st

from hw3.corpus.normalize import detect_script, normalize_texts, remove_punctuation, to_simplified
from hw3.corpus.script_conversion import make_converter


def test_normalize_texts_gives_all_spellings_of_a_sentence_the_same_text() -> None:
    simplified = "后面的干部了解里程表，乾坤着于谘议。"
    spellings = [simplified, *(make_converter(name)([simplified])[0] for name in ("s2tw", "hanziconv"))]
    assert spellings[2] == "後麵的乾部瞭解裏程錶，乾坤著於諮議。"
    assert len(set(spellings)) == 3
    assert set(normalize_texts(spellings)) == {"后面的干部了解里程表干坤着于咨议"}


@given(st.lists(st.text(st.characters(min_codepoint=0x20, max_codepoint=0x2FA1F, exclude_categories=["Cs"]))))
def test_normalize_texts_equals_simplifying_and_removing_punctuation(texts: list[str]) -> None:
    texts = [text.replace("\n", "") for text in texts]
    assert normalize_texts(texts) == [remove_punctuation(to_simplified(text)) for text in texts]


def test_detect_script_returns_none_for_characters_of_both_scripts() -> None:
    assert {c: detect_script(c) for c in "后天汉漢馀餘，a"} == {
        "后": None, "天": None, "汉": "simplified", "漢": "traditional", "馀": "simplified", "餘": "traditional",
        "，": None, "a": None,
    }  # fmt: skip
