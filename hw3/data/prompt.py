"""The prompt: how an instruction and few-shot examples become the text that the model sees before its output."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

PLACEHOLDER = "{instruction}"


def _check_placeholder(turn: str) -> str:
    if turn.count(PLACEHOLDER) != 1:
        raise ValueError(f"expected {PLACEHOLDER} exactly once")
    return turn


class Example(BaseModel):
    """A few-shot example."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    instruction: str
    output: Annotated[str, Field(min_length=1)]


class Prompt(BaseModel):
    """The `prompt` section of a recipe, which is also the content of a file in `recipes/prompts/`.

    Attributes:
        system: text at the beginning of the prompt, or None.
        turn: text around the instruction; contains `{instruction}` once.
        example_separator: text after the output of each few-shot example.
        examples: few-shot examples; a prompt with n examples uses the first n.
        chat_template: whether to use the tokenizer's chat template.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    system: str | None = None
    turn: Annotated[str, AfterValidator(_check_placeholder)] = PLACEHOLDER
    example_separator: str = "\n\n"
    examples: list[Example] = []
    chat_template: bool = False

    @property
    def sha256(self) -> str:
        """Hash of everything that shapes a zero-shot prompt; few-shot examples are excluded."""
        text = json.dumps(self.model_dump(exclude={"examples"}), ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def render_turn(prompt: Prompt, instruction: str) -> str:
    """Return the text around one instruction, up to the place where the output begins."""
    # Not str.format: the instruction and the turn may contain other braces.
    before, after = prompt.turn.split(PLACEHOLDER)
    return before + instruction + after


def render_prompt(prompt: Prompt, instruction: str, examples: list[Example]) -> str:
    """Return the prompt's text: system, newline, each example as turn + output + separator, then the row's turn.

    Args:
        prompt: a prompt without `chat_template`; see `build_messages` for the others.
        instruction: the row's instruction, inserted unchanged.
        examples: few-shot examples in order; empty for a zero-shot prompt.
    """
    system = "" if prompt.system is None else prompt.system + "\n"
    few_shot = "".join(
        render_turn(prompt, example.instruction) + example.output + prompt.example_separator for example in examples
    )
    return system + few_shot + render_turn(prompt, instruction)


def build_messages(prompt: Prompt, instruction: str, examples: list[Example]) -> list[dict[str, str]]:
    """Return the prompt as chat messages for a tokenizer's chat template.

    The system text is put at the beginning of the first user message, because some chat templates (Gemma's) reject a
    system role. Texts are stripped at both ends, as chat templates do.
    """
    messages: list[dict[str, str]] = []
    for example in examples:
        messages.append({"role": "user", "content": render_turn(prompt, example.instruction).strip()})
        messages.append({"role": "assistant", "content": example.output.strip()})
    messages.append({"role": "user", "content": render_turn(prompt, instruction).strip()})
    if prompt.system is not None:
        messages[0]["content"] = f"{prompt.system.strip()}\n{messages[0]['content']}"
    return messages
