"""The prompt formatter: an instruction and worked examples become the text that the model sees before its answer."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

PLACEHOLDER = "{instruction}"


def _one_placeholder(turn: str) -> str:
    if turn.count(PLACEHOLDER) != 1:
        raise ValueError(f"must hold {PLACEHOLDER} exactly once")
    return turn


class Example(BaseModel):
    """A worked example shown in a few-shot prompt."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    instruction: str
    output: Annotated[str, Field(min_length=1)]


class Prompt(BaseModel):
    """The `prompt` section of a recipe, and the whole content of a file under `recipes/prompts/`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    system: str | None = None
    turn: Annotated[str, AfterValidator(_one_placeholder)] = PLACEHOLDER
    example_separator: str = "\n\n"
    examples: list[Example] = []
    chat_template: bool = False

    @property
    def sha256(self) -> str:
        """Hash of everything that shapes a zero-shot prompt, so worked examples do not count."""
        text = json.dumps(self.model_dump(exclude={"examples"}), ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def render_turn(prompt: Prompt, instruction: str) -> str:
    """One question, up to the place where the answer begins."""
    # Not str.format: an instruction may hold braces, and so may the template.
    before, after = prompt.turn.split(PLACEHOLDER)
    return before + instruction + after


def render(prompt: Prompt, instruction: str, examples: list[Example]) -> str:
    """The prompt text: system, a newline, each example as turn + output + separator, then the question's turn.

    Args:
        prompt: the formatter's parts; `chat_template` prompts have no such text, see `messages`.
        instruction: the row's instruction, put in as it is.
        examples: worked examples in order; empty for a zero-shot prompt.
    """
    system = "" if prompt.system is None else prompt.system + "\n"
    shots = "".join(
        render_turn(prompt, example.instruction) + example.output + prompt.example_separator for example in examples
    )
    return system + shots + render_turn(prompt, instruction)


def messages(prompt: Prompt, instruction: str, examples: list[Example]) -> list[dict[str, str]]:
    """The same prompt as chat messages, for a tokenizer's chat template.

    The system text opens the first user message, because some templates (Gemma's) refuse a system role. Texts are
    stripped at both ends, as chat templates do.
    """
    turns: list[dict[str, str]] = []
    for example in examples:
        turns.append({"role": "user", "content": render_turn(prompt, example.instruction).strip()})
        turns.append({"role": "assistant", "content": example.output.strip()})
    turns.append({"role": "user", "content": render_turn(prompt, instruction).strip()})
    if prompt.system is not None:
        turns[0]["content"] = f"{prompt.system.strip()}\n{turns[0]['content']}"
    return turns
