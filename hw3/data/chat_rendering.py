"""Render a tokenizer's chat template so that it depends on nothing but the messages, and check what it renders."""

from __future__ import annotations

import datetime
import json
import re
from typing import Any

from jinja2 import Environment, TemplateError
from transformers import PreTrainedTokenizerBase

from hw3.common.errors import UserError, first_line

# The date of every chat template that asks for today's: the default of Meta's templates for Llama 3.1 and 3.2.
CHAT_TEMPLATE_DATE = datetime.datetime(2024, 7, 26)
FIXED_DATE_NOTE = (
    f"the chat template asks for the date: it gets {CHAT_TEMPLATE_DATE:%d %B %Y} on every day, so that prompts do not "
    "change"
)
_DATE_MACRO = "{%- macro strftime_now(format) %}"
_RANDOM = re.compile(r"\|\s*random\b|\blipsum\b")
_MAX_ERROR_CHARACTERS = 200
# Stands for a message while the template is rendered. A template that changes the case, white space, special
# characters or length of messages changes it.
_SAMPLE_TEXT = "Aa  Zz\n\n<b>&\"'\\ {0} %s ß 字，：" * 100


def fix_chat_template_date(tokenizer: PreTrainedTokenizerBase) -> None:
    """Replace the date in the tokenizer's chat template, or in each of its templates, by `CHAT_TEMPLATE_DATE`."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        tokenizer.chat_template = {name: fix_template_date(text) for name, text in template.items()}
    else:
        tokenizer.chat_template = fix_template_date(template)


def fix_template_date(template: Any) -> Any:
    """Return a chat template for which today is always `CHAT_TEMPLATE_DATE`.

    Templates get the date from transformers' function `strftime_now`. A macro of that name, which knows the template's
    own formats, replaces the function wherever the template is rendered. Other values are returned unchanged.
    """
    if not isinstance(template, str) or "strftime_now" not in template or template.startswith(_DATE_MACRO):
        return template
    try:
        strings = {token.value for token in Environment().lexer.tokenize(template) if token.type == "string"}
    except TemplateError:
        return template  # reported when the template is rendered
    dates = {text: CHAT_TEMPLATE_DATE.strftime(text) for text in sorted(strings) if "%" in text}
    # The newline is not rendered, because chat templates are rendered with `trim_blocks`.
    return (
        f"{_DATE_MACRO}{{%- set dates = {json.dumps(dates, ensure_ascii=False)} %}}"
        "{{- dates[format] if format in dates else raise_exception('unknown format of the date') }}"
        f"{{%- endmacro %}}\n{template}"
    )


def get_chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the tokenizer's chat template, with a fixed date.

    Raises:
        UserError: the tokenizer has no chat template, or several and none of them is its default.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict) and "default" in template:
        template = template["default"]
    if isinstance(template, str) and template:
        return fix_template_date(template)
    if isinstance(template, dict) and template:
        problem = f"has no default among its chat templates: {', '.join(map(str, template))}"
    else:
        problem = f"has a chat template that is not text: {template!r}" if template else "has no chat template"
    raise UserError(f"prompt.chat_template: the tokenizer of {tokenizer.name_or_path} {problem}; set it to false")


def get_chat_template_date(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the date that the tokenizer's chat template gets, as YYYY-MM-DD; None if it asks for no date."""
    has_date = get_chat_template(tokenizer).startswith(_DATE_MACRO)
    return CHAT_TEMPLATE_DATE.date().isoformat() if has_date else None


def render_chat_parts(tokenizer: PreTrainedTokenizerBase, template: str, roles: list[str]) -> list[str]:
    """Return the texts that a chat template writes before, between and after the messages; one more than messages.

    Args:
        tokenizer: the tokenizer, whose special tokens the template writes.
        template: the chat template.
        roles: `user` or `assistant` by message.

    Raises:
        UserError: the template cannot be rendered, or does not write every message once, in order and unchanged.
    """
    where = f"prompt.chat_template: the chat template of {tokenizer.name_or_path}"
    fix = "mend the template, or set prompt.chat_template to false and write the prompt in prompt.turn"
    if match := _RANDOM.search(template):
        raise UserError(f"{where} is random: it uses {match[0].lstrip('| ')}; {fix}")
    # Private-use characters, which no template contains.
    marks = [chr(0xF0000 + number) for number in range(len(roles))]
    texts = [f"{mark}{_SAMPLE_TEXT}{mark}" for mark in marks]
    try:
        rendered = tokenizer.apply_chat_template(
            [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,  # for Qwen3's template; others ignore it
        )
    except Exception as error:  # a template is a program, which can fail in any way
        message = f"{type(error).__name__}: {first_line(error)}".removesuffix(": ")[:_MAX_ERROR_CHARACTERS]
        raise UserError(f"{where} cannot be rendered: {message}; {fix}") from error
    assert isinstance(rendered, str), "`tokenize=False` returns text for one conversation"
    for index, (mark, text) in enumerate(zip(marks, texts, strict=True)):
        if (rendered.count(mark), rendered.count(text)) != (2, 1):
            count = rendered.count(mark)
            problem = "leaves out" if count == 0 else "repeats" if count > 2 else "changes"
            raise UserError(f"{where} {problem} {_describe_message(index, len(roles))}; {fix}")
    positions = [rendered.index(text) for text in texts]
    if positions != sorted(positions):
        raise UserError(f"{where} changes the order of the few-shot examples and the instruction; {fix}")
    return re.split("|".join(map(re.escape, texts)), rendered)


def _describe_message(index: int, count: int) -> str:
    if index == count - 1:
        return "the instruction"
    return f"the {'output' if index % 2 else 'instruction'} of few-shot example {index // 2 + 1}"
