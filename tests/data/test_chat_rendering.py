"""Chat templates: a fixed date, and templates that lose, repeat or change a message."""

import datetime
from typing import Any

import pytest
import transformers.utils.chat_template_utils
from helpers import SHARED, character_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hw3.common.errors import UserError
from hw3.data.chat_rendering import (
    fix_chat_template_date,
    fix_template_date,
    get_chat_template,
    get_chat_template_date,
    render_chat_parts,
)
from hw3.data.prompt import Example, Prompt
from hw3.data.tokenization import Encoder

CHAT_PROMPT = Prompt(turn="{instruction}", chat_template=True)
# The part of Llama-3.2's template that asks for the date.
LLAMA_3_2 = """{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- "Today Date: " + date_string + "\\n" }}
{%- for message in messages %}
{{- message.role + ":" + message.content | trim + "\\n" }}
{%- endfor %}"""
# GPT-OSS's asks for it in a macro.
GPT_OSS = """{%- macro build_system_message() -%}
    {{- "Current date: " + strftime_now("%Y-%m-%d") + "\\n" }}
{%- endmacro -%}
{{- build_system_message() }}{% for message in messages %}{{ message.content }}{% endfor %}"""
TURNS = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"


def tokenizer_with(template: Any) -> PreTrainedTokenizerFast:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = template
    tokenizer.name_or_path = "models/chat"
    return tokenizer


def render(template: str, content: str = "x") -> str:
    tokenizer = tokenizer_with(template)
    text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    assert isinstance(text, str)
    return text


class NewYear(datetime.datetime):
    """A clock that always shows the first second of 2031."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> "NewYear":
        return cls(2031, 1, 1, tzinfo=tz)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LLAMA_3_2, "Today Date: 26 Jul 2024\nuser:x\n"),
        (GPT_OSS, "Current date: 2024-07-26\nx"),
        ("{{ strftime_now('%d') }}{{ strftime_now(format='%H:%M') }} {{ messages[0].content }}", "2600:00 x"),
        ("{% set f = '%A, \\'%y' %}{{ strftime_now(f) | upper }} {{ messages[0].content }}", "FRIDAY, '24 x"),
        ("\n  {% if true %}\n{{ strftime_now('%Y') }}{% endif %}{{ messages[0].content }}", "\n2024x"),
    ],
)
def test_fix_template_date_gives_one_date_on_every_day(
    template: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", NewYear)
    if template is LLAMA_3_2:
        assert render(template) == "Today Date: 01 Jan 2031\nuser:x\n"
    fixed = fix_template_date(template)
    assert render(fixed) == expected
    assert fix_template_date(fixed) == fixed
    parts = render_chat_parts(tokenizer_with(template), fixed, ["user"])
    assert "x".join(parts) == expected


def test_fix_template_date_leaves_other_templates_unchanged() -> None:
    assert fix_template_date(TURNS) == TURNS
    assert fix_template_date("{{ strftime_now('%d }}") == "{{ strftime_now('%d }}"


def test_an_unknown_format_of_the_date_is_refused() -> None:
    template = "{{ strftime_now('%' + 'd') }}{{ messages[0].content }}"
    with pytest.raises(UserError, match="cannot be rendered: TemplateError: unknown format of the date"):
        Encoder(tokenizer_with(template), CHAT_PROMPT)


def test_get_chat_template_date_is_none_for_a_template_without_date() -> None:
    assert get_chat_template_date(tokenizer_with(LLAMA_3_2)) == "2024-07-26"
    assert get_chat_template_date(tokenizer_with(TURNS)) is None


def test_get_chat_template_takes_the_default_of_several() -> None:
    assert get_chat_template(tokenizer_with({"default": "a", "tool_use": "b"})) == "a"
    with pytest.raises(UserError, match="models/chat has no default among its chat templates: one, two; set it"):
        get_chat_template(tokenizer_with({"one": "a", "two": "b"}))
    with pytest.raises(UserError, match="the tokenizer of models/chat has no chat template; set it to false"):
        get_chat_template(tokenizer_with(None))


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (5, "has a chat template that is not text: 5"),
        (True, "has a chat template that is not text: True"),
        ({}, "has no chat template"),
        ("", "has no chat template"),
        ({"default": 5}, "has a chat template that is not text: 5"),
        ({"default": ""}, "has no chat template"),
        ({5: "a"}, "has no default among its chat templates: 5"),
    ],
)
def test_get_chat_template_refuses_what_is_no_template(template: Any, problem: str) -> None:
    tokenizer = tokenizer_with(template)
    fix_chat_template_date(tokenizer)
    with pytest.raises(UserError) as error:
        get_chat_template(tokenizer)
    assert str(error.value) == f"prompt.chat_template: the tokenizer of models/chat {problem}; set it to false"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("x", "leaves out the instruction"),
        ("{{ bos_token }}{% for m in messages %}{{ m.role }}\n{% endfor %}", "leaves out the instruction"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "repeats the instruction"),
        ("{{ messages[0].content }}{{ messages[0].content | upper }}", "repeats the instruction"),
        ("{{ messages[0].content[:9] }}: {{ messages[0].content }}", "repeats the instruction"),
        ("{{ messages[0].content | upper }}", "changes the instruction"),
        ("{{ messages[0].content | lower }}", "changes the instruction"),
        ("{{ messages[0].content | title }}", "changes the instruction"),
        ("{{ messages[0].content | e }}", "changes the instruction"),
        ("{{ messages[0].content | striptags }}", "changes the instruction"),
        ("{{ messages[0].content | truncate(500) }}", "changes the instruction"),
        ("{{ messages[0].content[:-1] }}", "changes the instruction"),
        ("{{ messages[0].content.split() | join(' ') }}", "changes the instruction"),
        ("{{ messages[0].content | replace('\n', ' ') }}", "changes the instruction"),
        ("{{ messages[0].content | tojson }}", "changes the instruction"),
        ("{{ messages[0].content | urlencode }}", "leaves out the instruction"),
        ("{{ messages[0].content | reverse }}", "changes the instruction"),
        ("{{ raise_exception('no\nusers') }}", "cannot be rendered: TemplateError: no;"),
        ("{{ messages[0].content", "cannot be rendered: TemplateSyntaxError: unexpected end of template"),
        (
            "{% for m in messages %}{{ m.content }}",
            "cannot be rendered: TemplateSyntaxError: Unexpected end",
        ),
        (
            "{{ messages[0].content | unknown_filter }}",
            "cannot be rendered: TemplateAssertionError: No filter",
        ),
        ("{{ messages[0].content + 1 }}", "cannot be rendered: TypeError: can only concatenate str"),
        ("{{ messages[7].content }}", "cannot be rendered: UndefinedError: list object has no element 7;"),
        ("{{ nothing.at.all }}", "cannot be rendered: UndefinedError: 'nothing' is undefined;"),
        ("{{ 1 / 0 }}", "cannot be rendered: ZeroDivisionError: division by zero;"),
        ("{{ messages.__class__.__mro__ }}", "cannot be rendered: SecurityError: access to attribute '__class__'"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "cannot be rendered: OverflowError: Range too big."),
        (
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "cannot be rendered: RecursionError: maximum",
        ),
        ("{{ 'x' * 10 ** 13 }}", "cannot be rendered: MemoryError;"),
        ("{{ raise_exception('x' * 10 ** 6) }}", f"cannot be rendered: TemplateError: {'x' * 185};"),
        ("{{ [1, 2] | random }}{{ messages[0].content }}", "is random: it uses random"),
        ("{{ lipsum() }}{{ messages[0].content }}", "is random: it uses lipsum"),
    ],
)
def test_encoder_refuses_a_chat_template_that_does_not_keep_the_instruction(template: str, problem: str) -> None:
    with pytest.raises(UserError) as error:
        Encoder(tokenizer_with(template), CHAT_PROMPT)
    (message,) = error.value.problems
    assert message.startswith(f"prompt.chat_template: the chat template of models/chat {problem}"), message
    assert message.endswith(
        "; mend the template, or set prompt.chat_template to false and write the prompt in prompt.turn"
    )
    # A prompt without chat template does not need it.
    Encoder(tokenizer_with(template), Prompt(turn="{instruction}"))


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ messages[-1].content }}", "leaves out the instruction of few-shot example 1"),
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
            "leaves out the output of few-shot example 1",
        ),
        (
            "{{ messages[0].content if messages | length > 1 }}{% for m in messages %}{{ m.content }}{% endfor %}",
            "repeats the instruction of few-shot example 1",
        ),
        (
            "{% for m in messages %}{{ m.content | upper if m.role == 'assistant' else m.content }}{% endfor %}",
            "changes the output of few-shot example 1",
        ),
        (
            "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
            "changes the order of the few-shot examples and the instruction",
        ),
        (
            "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}{{ messages[0].content }}",
            "cannot be rendered: TemplateError: one turn only",
        ),
    ],
)
def test_encoder_refuses_few_shot_examples_that_a_chat_template_does_not_keep(template: str, problem: str) -> None:
    encoder = Encoder(tokenizer_with(template), CHAT_PROMPT)
    assert encoder.encode_prompt("甲") == [2, 4]
    with pytest.raises(UserError) as error:
        encoder.encode_prompt("甲", [Example(instruction="乙", output="丙")])
    assert str(error.value).startswith(f"prompt.chat_template: the chat template of models/chat {problem}")


def test_a_chat_template_may_strip_messages() -> None:
    parts = render_chat_parts(
        tokenizer_with(None), "[{{ messages[0].content | trim }}]{{ messages[1:] | length }}", ["user"]
    )
    assert parts == ["[", "]0"]


@pytest.mark.parametrize("name", ["gemma2", "llama3"])
def test_render_chat_parts_of_real_templates(name: str) -> None:
    folder = SHARED / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip(f"the vocabulary of {name} is not installed beside the repository")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    parts = render_chat_parts(tokenizer, get_chat_template(tokenizer), ["user", "assistant", "user"])
    expected = {
        "gemma2": [
            "<bos><start_of_turn>user\n",
            "<end_of_turn>\n<start_of_turn>model\n",
            "<end_of_turn>\n<start_of_turn>user\n",
            "<end_of_turn>\n<start_of_turn>model\n",
        ],
        "llama3": [
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ],
    }
    assert parts == expected[name]
