"""Encode text that spells a control token, such as `<eos>` or `<think>`, as text."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase


class ControlTokens:
    """The tokens that a tokenizer recognizes in a text before it splits the text: its special and other added tokens.

    Added tokens of white space, such as Gemma's for two newlines, are ordinary text.

    Attributes:
        ids: id by token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.ids = {
            token.content: id
            for id, token in tokenizer.added_tokens_decoder.items()
            if token.content.replace("▁", " ").strip()  # ▁ is SentencePiece's space
        }
        self._tokenizer = tokenizer
        # The unknown token also stands for characters that the vocabulary lacks.
        self._id_set = set(self.ids.values()) - {tokenizer.unk_token_id}
        alternatives = "|".join(map(re.escape, sorted(self.ids, key=len, reverse=True))) or "(?!)"  # (?!): no match
        self._spelled = re.compile(alternatives)
        # In the renamed tokenizer, each token has a name that nobody can have typed.
        prefix, suffix = f"\U000f0000{secrets.token_hex(8)}:", "\U000f0001"
        self._new_names = {token: f"{prefix}{id}{suffix}" for token, id in self.ids.items()}
        self._renamed = re.compile(rf"{prefix}(\d+){suffix}")
        self._renamed_or_spelled = re.compile(f"{self._renamed.pattern}|{alternatives}")

    def select(self, ids: Iterable[int]) -> list[int]:
        """Return those of the ids that belong to control tokens, in order. The unknown token is left out."""
        return [id for id in ids if id in self._id_set]

    def are_all_in(self, parts: Sequence[str], text: str, ids: Sequence[int]) -> bool:
        """Return whether all control tokens of an encoded text come from certain parts of it.

        Args:
            parts: parts of the text, in order.
            text: the text.
            ids: what the tokenizer made of the text.
        """
        expected = [self.ids[token] for part in parts for token in self._spelled.findall(part)]
        unknown = self._tokenizer.unk_token
        if unknown is not None and text.count(unknown) != sum(part.count(unknown) for part in parts):
            return False
        return self.select(ids) == self.select(expected)

    def rename(self, text: str) -> str:
        """Return a text in which the control tokens have the names that `encode` recognizes."""
        return self._spelled.sub(lambda match: self._new_names[match[0]], text)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text. Only what `rename` returned becomes a control token; other text stays text."""
        ids = self._renamed_tokenizer.encode(text, add_special_tokens=False).ids
        ids = [self._original_ids.get(id, id) for id in ids]
        if self.select(ids) == self.select(map(int, self._renamed.findall(text))):
            return ids
        # The vocabulary also has a control token as an ordinary piece, as Unigram vocabularies do. Cut its text in two.
        matches = self._renamed_or_spelled.finditer(text)
        cuts = [match.start() + 1 for match in matches if match[1] is None and len(match[0]) > 1]
        if not cuts:
            return ids
        return [id for start, end in pairwise([0, *cuts, len(text)]) for id in self.encode(text[start:end])]

    @cached_property
    def _renamed_tokenizer(self) -> Tokenizer:
        """A copy of the tokenizer that recognizes control tokens by their new names only."""
        state = json.loads(self._tokenizer.backend_tokenizer.to_str())
        for token in state["added_tokens"]:
            if token["content"] in self._new_names:
                # Not `normalized`: the name is found before the normalizer could change it.
                token |= {"content": self._new_names[token["content"]], "normalized": False, "single_word": False}
        state |= {"post_processor": None, "truncation": None, "padding": None}
        return Tokenizer.from_str(json.dumps(state))

    @cached_property
    def _original_ids(self) -> dict[int, int]:
        """The id of each added token by its id in the copy, which numbers renamed tokens anew."""
        added = self._tokenizer.added_tokens_decoder.items()
        originals = {self._new_names.get(token.content, token.content): id for id, token in added}
        renamed = self._renamed_tokenizer.get_added_tokens_decoder().items()
        return {id: originals[token.content] for id, token in renamed}
