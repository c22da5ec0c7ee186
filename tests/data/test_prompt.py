"""The text and the chat messages that a prompt makes of an instruction and few-shot examples."""

from hw3.data.prompt import Example, Prompt, build_messages, render_prompt

PROMPT = Prompt(system="S", turn="Q {instruction} A", example_separator="|")
EXAMPLES = [Example(instruction="1", output="one"), Example(instruction="2", output="two")]


def test_render_prompt_is_system_then_examples_then_turn() -> None:
    assert render_prompt(PROMPT, "3", []) == "S\nQ 3 A"
    assert render_prompt(PROMPT, "3", EXAMPLES) == "S\nQ 1 Aone|Q 2 Atwo|Q 3 A"


def test_render_prompt_keeps_braces_in_an_instruction() -> None:
    assert render_prompt(Prompt(turn="Q {instruction} A"), "{x} {instruction}", []) == "Q {x} {instruction} A"


def test_build_messages_puts_the_system_text_into_the_first_user_message() -> None:
    assert build_messages(PROMPT, "3", EXAMPLES[:1]) == [
        {"role": "user", "content": "S\nQ 1 A"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "Q 3 A"},
    ]


def test_sha256_ignores_few_shot_examples() -> None:
    assert PROMPT.model_copy(update={"examples": EXAMPLES}).sha256 == PROMPT.sha256
    assert PROMPT.model_copy(update={"system": "T"}).sha256 != PROMPT.sha256


def test_turn_defaults_to_the_instruction() -> None:
    assert Prompt().turn == "{instruction}"
