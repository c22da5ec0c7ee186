"""Turn text into token ids. Training, scoring and generation all tokenize here, so they cannot disagree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Literal

from transformers import PreTrainedTokenizerBase

from hw3.common.errors import UserError, truncate_problems
from hw3.data.chat_rendering import get_chat_template, render_chat_parts
from hw3.data.control_tokens import ControlTokens
from hw3.data.prompt import Example, Prompt, build_messages, render_prompt
from hw3.data.rows import Row

IGNORE_INDEX = -100
TooLongPolicy = Literal["error", "drop", "truncate_prompt"]


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One row as token ids.

    Attributes:
        id: the row's id.
        prompt_ids: BOS, if the tokenizer has one, and the prompt; length P >= 1.
        output_ids: the output and EOS, length T >= 1; empty for a row to predict.
        characters: number of characters of the output's text.
    """

    id: str
    prompt_ids: list[int]
    output_ids: list[int]
    characters: int

    @property
    def input_ids(self) -> list[int]:
        """Ids of the prompt, then of the output; length P + T."""
        return self.prompt_ids + self.output_ids

    @property
    def labels(self) -> list[int]:
        """`IGNORE_INDEX` on the prompt, the ids on the output and its EOS; length P + T."""
        return [IGNORE_INDEX] * len(self.prompt_ids) + self.output_ids

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)


def count_tokens(rows: Sequence[EncodedRow]) -> list[tuple[int, int]]:
    """Return (tokens, output tokens) of every row."""
    return [(len(row), len(row.output_ids)) for row in rows]


class Encoder:
    """Encode rows with a tokenizer and a prompt.

    Prompt and output are tokenized separately, as the course's metric does, because the tokenizer could merge the last
    character of the prompt with the first of the output: for Gemma, `：《` is one token. BOS, if the tokenizer has one,
    and EOS are added by their ids. Text that spells a control token, such as `<eos>` or `<think>`, is encoded as text.

    Attributes:
        control_tokens: the special and other added tokens of the tokenizer.

    Raises:
        UserError: the tokenizer has no EOS token, or the prompt needs a chat template and the tokenizer has none that
            renders the instruction unchanged.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no EOS token, which outputs must end with")
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.bos_token_id: int | None = tokenizer.bos_token_id
        self.eos_token_id: int = tokenizer.eos_token_id
        self.control_tokens = ControlTokens(tokenizer)
        self._chat_template = get_chat_template(tokenizer) if prompt.chat_template else None
        self._chat_parts: dict[int, list[str]] = {}  # by number of few-shot examples
        if prompt.chat_template:
            self._render_chat_template(0)

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a text, without BOS and EOS; text that spells a control token is encoded as text."""
        if not text:
            return []
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return self.control_tokens.encode(text) if self.control_tokens.select(ids) else ids

    def encode_prompt(self, instruction: str, examples: Sequence[Example] = ()) -> list[int]:
        """Return BOS and the ids of the prompt for one instruction, with few-shot examples if given."""
        if self.prompt.chat_template:
            ids = self._encode_chat(instruction, list(examples))
        else:
            ids = self.encode_text(render_prompt(self.prompt, instruction, list(examples)))
        if self.bos_token_id is not None and ids[:1] != [self.bos_token_id]:
            ids = [self.bos_token_id, *ids]
        return ids

    def encode_output(self, output: str) -> list[int]:
        """Return the ids of an output, then EOS."""
        return [*self.encode_text(output), self.eos_token_id]

    def encode(self, row: Row, examples: Sequence[Example] = ()) -> EncodedRow:
        """Encode one row; a row whose `output` is None gets no output ids."""
        output_ids = [] if row.output is None else self.encode_output(row.output)
        return EncodedRow(row.id, self.encode_prompt(row.instruction, examples), output_ids, len(row.output or ""))

    def turn_prefix_and_suffix(self) -> tuple[str, str]:
        """Return the text before and after the turn in a zero-shot prompt, without BOS.

        This is for programs that take the prompt as text and add BOS themselves, as the homework's grader does. With a
        chat template, the turn between the two texts must be stripped at both ends.
        """
        system = self.prompt.system
        if not self.prompt.chat_template:
            return ("" if system is None else f"{system}\n"), ""
        before, after = self._render_chat_template(0)
        before = before.removeprefix(self.tokenizer.bos_token or "")
        return (before if system is None else f"{before}{system.strip()}\n"), after

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of generated ids, without special tokens."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str), "only a batch of id lists is decoded to a list"
        return text

    def _encode_chat(self, instruction: str, examples: list[Example]) -> list[int]:
        """Return the ids of the rendered chat template: its control tokens as ids, all contents as text.

        These are the ids that `apply_chat_template` returns, except for contents that spell a control token.
        """
        contents = [message["content"] for message in build_messages(self.prompt, instruction, examples)]
        parts = self._render_chat_template(len(examples))
        text = _interleave(parts, contents)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]
        if self.control_tokens.are_all_in(parts, text, ids):
            return ids
        return self.control_tokens.encode(_interleave(map(self.control_tokens.rename, parts), contents))

    def _render_chat_template(self, num_examples: int) -> list[str]:
        """Return the text before the first message, between messages, and after the last."""
        if num_examples not in self._chat_parts:
            assert self._chat_template is not None, "only prompts with `chat_template` are rendered with one"
            roles = ["user", "assistant"] * num_examples + ["user"]
            self._chat_parts[num_examples] = render_chat_parts(self.tokenizer, self._chat_template, roles)
        return self._chat_parts[num_examples]


def _interleave(parts: Iterable[str], contents: Iterable[str]) -> str:
    """Return the chat: the parts of the template with the contents between them."""
    return "".join(chain.from_iterable(zip_longest(parts, contents, fillvalue="")))


@dataclass(frozen=True, slots=True)
class LengthReport:
    """Rows that `apply_max_length` changed.

    Attributes:
        dropped: ids of the rows that were left out.
        truncated: ids of the rows whose prompt was truncated.
    """

    dropped: list[str]
    truncated: list[str]


def apply_max_length(
    rows: list[EncodedRow],
    max_length: int,
    too_long: TooLongPolicy,
    *,
    source: str,
    has_bos: bool,
    numbers: Mapping[str, int] | None = None,
) -> tuple[list[EncodedRow], LengthReport]:
    """Apply a length limit to encoded rows. Outputs are never truncated.

    Args:
        rows: encoded rows.
        max_length: largest number of tokens per row, BOS and EOS included.
        too_long: `error` reports every row that is too long; `drop` leaves these rows out; `truncate_prompt` keeps BOS
            and the end of the prompt.
        source: the file's name, for messages.
        has_bos: whether prompts begin with BOS.
        numbers: the number of each row in the file, by its id; None if these are all rows of the file.

    Returns:
        The rows that fit, and which rows were dropped or truncated.

    Raises:
        UserError: rows are too long with `error`; with `truncate_prompt` no prompt token of a row would be left; or no
            row is left.
    """
    fitting: list[EncodedRow] = []
    dropped: list[str] = []
    truncated: list[str] = []
    problems: list[str] = []
    for index, row in enumerate(rows, 1):
        excess = len(row) - max_length
        if excess <= 0:
            fitting.append(row)
        elif too_long == "drop":
            dropped.append(row.id)
        elif too_long == "truncate_prompt" and excess < len(row.prompt_ids) - has_bos:
            prompt_ids = row.prompt_ids[:has_bos] + row.prompt_ids[has_bos + excess :]
            fitting.append(EncodedRow(row.id, prompt_ids, row.output_ids, row.characters))
            truncated.append(row.id)
        else:
            reason = "no prompt token would be left" if too_long == "truncate_prompt" else "too long"
            number = index if numbers is None else numbers[row.id]
            problems.append(f"{source}: row {number} (id {row.id}): {reason}: {len(row)} tokens, limit {max_length}")
    if problems:
        longest = max(len(row) for row in rows)
        fixes = [f"data.max_length={longest}", "data.too_long=drop"]
        if too_long == "error":
            fixes.append("data.too_long=truncate_prompt")
        raise UserError(*truncate_problems(problems), f"set {', '.join(fixes[:-1])} or {fixes[-1]}")
    if not fitting:
        raise UserError(f"{source}: no row has at most {max_length} tokens; raise data.max_length")
    return fitting, LengthReport(dropped, truncated)


def find_changed_rows(rows: Sequence[Row], encoder: Encoder) -> list[str]:
    """Return the ids of the rows whose instruction or output is another text after encoding and decoding.

    Some tokenizers write all letters in lower case, or full-width characters as ASCII. Texts with characters that the
    vocabulary lacks are not compared: `count_unknown` counts these.
    """
    changed = []
    for row in rows:
        texts = [row.instruction, row.output or ""]
        encoded = [(text, encoder.encode_text(text)) for text in texts]
        known = [(text, ids) for text, ids in encoded if encoder.tokenizer.unk_token_id not in ids]
        if any(encoder.decode(ids) != text for text, ids in known):
            changed.append(row.id)
    return changed


def count_unknown(rows: Iterable[EncodedRow], unknown_id: int | None) -> int:
    """Return how many output ids are the tokenizer's unknown token; 0 if it has none."""
    if unknown_id is None:
        return 0
    return sum(row.output_ids.count(unknown_id) for row in rows)
