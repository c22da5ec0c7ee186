"""Text to ids. The only place that tokenizes, so that training, scoring and generation cannot disagree."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from hw3.common.errors import UserError, shorten
from hw3.data.prompt import Example, Prompt, messages, render
from hw3.data.rows import Row

IGNORE_INDEX = -100
TooLong = Literal["error", "drop", "truncate_prompt"]


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One row as ids.

    Attributes:
        id: the row's id.
        prompt_ids: BOS (where the tokenizer has one) and the prompt; length P >= 1.
        output_ids: the output and EOS; length T >= 1, empty for a row to predict.
        characters: characters of the output text.
    """

    id: str
    prompt_ids: list[int]
    output_ids: list[int]
    characters: int

    @property
    def input_ids(self) -> list[int]:
        """Prompt and output in a row; length P + T."""
        return self.prompt_ids + self.output_ids

    @property
    def labels(self) -> list[int]:
        """`IGNORE_INDEX` on the prompt, ids on the output and its EOS; length P + T."""
        return [IGNORE_INDEX] * len(self.prompt_ids) + self.output_ids

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)


def lengths_of(rows: Sequence[EncodedRow]) -> list[tuple[int, int]]:
    """(tokens, output tokens) of every row."""
    return [(len(row), len(row.output_ids)) for row in rows]


class Encoder:
    """A tokenizer and a prompt: rows in, ids out.

    Prompt and output are tokenized separately, as the course's metric does, because a vocabulary may merge across
    the boundary (`：《` is one token for Gemma). BOS is put first by id where the tokenizer has one, EOS last by id.

    Raises:
        UserError: the tokenizer has no EOS, or `chat_template` is asked of one that has no template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no EOS token, so an output could never end")
        if prompt.chat_template and not tokenizer.chat_template:
            raise UserError(f"prompt.chat_template: the tokenizer of {tokenizer.name_or_path} has no chat template")
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int = tokenizer.eos_token_id
        self._special_ids = {str(token): id for id, token in tokenizer.added_tokens_decoder.items() if token.special}

    def text_ids(self, text: str) -> list[int]:
        """Ids of plain text, nothing added. Text that spells a special token (`<eos>`) stays text."""
        if not text:
            return []
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def prompt_ids(self, instruction: str, examples: Sequence[Example] = ()) -> list[int]:
        """BOS and the prompt of one instruction, with worked examples if any."""
        if self.prompt.chat_template:
            ids = self._chat_ids(instruction, list(examples))
        else:
            ids = self.text_ids(render(self.prompt, instruction, list(examples)))
        if self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        return ids

    def output_ids(self, output: str) -> list[int]:
        """Ids of the output, then EOS."""
        return [*self.text_ids(output), self.eos_id]

    def encode(self, row: Row, examples: Sequence[Example] = ()) -> EncodedRow:
        """One row; a row without `output` gets no output ids."""
        output_ids = [] if row.output is None else self.output_ids(row.output)
        return EncodedRow(row.id, self.prompt_ids(row.instruction, examples), output_ids, len(row.output or ""))

    def text_around_turn(self) -> tuple[str, str]:
        """What stands before and after the turn in a zero-shot prompt, BOS left out.

        For programs that take a prompt as text and put BOS first themselves, as the homework's grader does. Under a
        chat template the turn between the two is stripped at both ends.
        """
        system = self.prompt.system
        if not self.prompt.chat_template:
            return ("" if system is None else f"{system}\n"), ""
        mark = chr(0xF0000)
        before, after = self._rendered_around(messages(self.prompt, "", []), [mark]).split(mark)
        before = before.removeprefix(self.tokenizer.bos_token or "")
        return (before if system is None else f"{before}{system.strip()}\n"), after

    def decode(self, ids: Iterable[int]) -> str:
        """Text of generated ids, special tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _chat_ids(self, instruction: str, examples: list[Example]) -> list[int]:
        """The chat template's ids, with the template's special tokens as ids and everybody's text as text.

        The template is rendered around private-use marks, so that `<end_of_turn>` typed by a user is never taken for
        the template's own. Text on both sides of a mark is tokenized in one piece, as the template's author meant it.
        """
        turns = messages(self.prompt, instruction, examples)
        marks = [chr(0xF0000 + number) for number in range(len(turns))]
        rendered = self._rendered_around(turns, marks)
        contents = dict(zip(marks, (turn["content"] for turn in turns), strict=True))
        pieces = re.split("(" + "|".join(map(re.escape, [*marks, *self._special_ids])) + ")", rendered)
        ids: list[int] = []
        text = ""
        for piece in pieces:
            if piece in self._special_ids:
                ids += self.text_ids(text)
                ids.append(self._special_ids[piece])
                text = ""
            else:
                text += contents.get(piece, piece)
        return ids + self.text_ids(text)

    def _rendered_around(self, turns: list[dict[str, str]], marks: list[str]) -> str:
        """The chat template's text, with a mark in the place of each turn's content."""
        return self.tokenizer.apply_chat_template(
            [{**turn, "content": mark} for turn, mark in zip(turns, marks, strict=True)],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,  # Qwen3's template; others ignore it
        )


@dataclass(frozen=True, slots=True)
class Lengths:
    """What the length policy did to a file.

    Attributes:
        dropped: ids of rows left out.
        truncated: ids of rows whose prompt was cut.
    """

    dropped: list[str]
    truncated: list[str]


def apply_max_length(
    rows: list[EncodedRow], max_length: int, too_long: TooLong, *, source: str, has_bos: bool
) -> tuple[list[EncodedRow], Lengths]:
    """Hold rows to `max_length` ids. An output is never cut.

    Args:
        rows: encoded rows.
        max_length: most ids a row may have, BOS and EOS included.
        too_long: `error` names every long row; `drop` leaves them out; `truncate_prompt` keeps BOS and the end of
            the prompt.
        source: the file's name, for messages.
        has_bos: whether the first id of a prompt is BOS, which is kept.

    Raises:
        UserError: rows are too long under `error`, an output alone does not fit under `truncate_prompt`, or no row
            is left.
    """
    kept: list[EncodedRow] = []
    dropped: list[str] = []
    truncated: list[str] = []
    problems: list[str] = []
    for number, row in enumerate(rows, 1):
        excess = len(row) - max_length
        if excess <= 0:
            kept.append(row)
        elif too_long == "drop":
            dropped.append(row.id)
        elif too_long == "truncate_prompt" and excess < len(row.prompt_ids) - has_bos:
            prompt_ids = row.prompt_ids[:has_bos] + row.prompt_ids[has_bos + excess :]
            kept.append(EncodedRow(row.id, prompt_ids, row.output_ids, row.characters))
            truncated.append(row.id)
        else:
            why = "its output alone does not fit" if too_long == "truncate_prompt" else "over-long"
            problems.append(
                f"{source}: row {number} (id {row.id}): {why}: {len(row)} tokens, at most {max_length} allowed"
            )
    if problems:
        longest = max(len(row) for row in rows)
        ways = f"set data.max_length={longest}, or data.too_long=drop"
        if too_long == "error":
            ways += " or data.too_long=truncate_prompt"
        raise UserError(*shorten(problems), ways)
    if not kept:
        raise UserError(f"{source}: no row fits data.max_length={max_length}")
    return kept, Lengths(dropped, truncated)


def count_unknown(rows: Iterable[EncodedRow], unknown_id: int | None) -> int:
    """How many output ids are the tokenizer's unknown token; 0 where it has none."""
    if unknown_id is None:
        return 0
    return sum(row.output_ids.count(unknown_id) for row in rows)
