"""The language of a report. Each text is written in English where it is used, and that is its key in a translation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.resources import files

# The translation of each language: `page.zh-TW.json` has the texts by their English originals.
LANGUAGES = {"en": "en", "zh-TW": "zh-Hant-TW"}  # the name of each, as HTML has it
_language: ContextVar[str] = ContextVar("language", default="en")


@contextmanager
def report_language(language: str) -> Iterator[None]:
    """Let `tr` translate into a language inside the block."""
    token = _language.set(language)
    try:
        yield
    finally:
        _language.reset(token)


def join_sentences(*sentences: str) -> str:
    """Join sentences to a paragraph; in Chinese, without spaces."""
    return tr(" ").join(sentences)


def html_language() -> str:
    """Return the report's language, as HTML has it."""
    return LANGUAGES[_language.get()]


@cache
def read_translation(language: str) -> dict[str, str]:
    """Return the texts of a language by their English originals; none for English."""
    if language == "en":
        return {}
    return json.loads((files("hw3.report") / f"page.{language}.json").read_text(encoding="utf-8"))


def tr(text: str, **values: object) -> str:
    """Return a text in the report's language, with the values of its `{name}` fields.

    Args:
        text: the English text, a literal, so that a test can compare it with the translations.
        values: the value of each field. Fields may have a format, which a translation keeps: `{step:,}`.
    """
    translated = read_translation(_language.get()).get(text, text)
    return translated.format(**values) if values else translated
