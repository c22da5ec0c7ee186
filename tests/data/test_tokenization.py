"""Literal ids: prompt, BOS, EOS, labels, special tokens typed by users, length policy."""

import json

import pytest
from helpers import SHARED, character_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hw3.common.errors import UserError
from hw3.config.recipe import load_prompt
from hw3.data.prompt import Example, Prompt, render
from hw3.data.rows import Row
from hw3.data.tokenization import Encoder, apply_max_length, count_unknown

PROMPT = Prompt(system="天地", turn="問：{instruction}\n答：")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE that merges `：《` into one token, as Gemma's vocabulary does."""
    pieces = ["<eos>", "<bos>", "答", "：", "《", "書", "》", "：《"]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("：", "《")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>")


def test_prompt_text_is_system_examples_turn() -> None:
    prompt = Prompt(system="S", turn="Q {instruction} A", example_separator="|")
    examples = [Example(instruction="1", output="one"), Example(instruction="2", output="two")]
    assert render(prompt, "3", []) == "S\nQ 3 A"
    assert render(prompt, "3", examples) == "S\nQ 1 Aone|Q 2 Atwo|Q 3 A"


def test_braces_in_an_instruction_stay() -> None:
    assert render(Prompt(turn="Q {instruction} A"), "{x} {instruction}", []) == "Q {x} {instruction} A"


def test_row_ids_and_labels() -> None:
    row = Encoder(character_tokenizer(), PROMPT).encode(Row("a", "甲", "乙丙"))
    # BOS 天 地 \n 問 ： 甲 \n 答 ： | 乙 丙 EOS
    assert row.prompt_ids == [2, 14, 15, 33, 30, 32, 4, 33, 31, 32]
    assert row.output_ids == [5, 6, 1]
    assert row.input_ids == [2, 14, 15, 33, 30, 32, 4, 33, 31, 32, 5, 6, 1]
    assert row.labels == [-100] * 10 + [5, 6, 1]
    assert row.characters == 2


def test_without_bos() -> None:
    row = Encoder(character_tokenizer(bos=False), PROMPT).encode(Row("a", "甲", "乙"))
    assert row.prompt_ids == [14, 15, 33, 30, 32, 4, 33, 31, 32]
    assert row.output_ids == [5, 1]


def test_prompt_and_output_are_not_merged() -> None:
    tokenizer = merging_tokenizer()
    row = Encoder(tokenizer, Prompt(turn="{instruction}答：")).encode(Row("a", "書", "《書》"))
    assert tokenizer("答：《書》", add_special_tokens=False)["input_ids"] == [2, 7, 5, 6]
    assert row.prompt_ids == [1, 5, 2, 3]
    assert row.output_ids == [4, 5, 6, 0]


def test_special_tokens_typed_by_a_user_stay_text() -> None:
    encoder = Encoder(character_tokenizer(), PROMPT)
    # "<eos>" is five characters that the vocabulary lacks, not EOS.
    assert encoder.text_ids("甲<eos>") == [4, 3, 3, 3, 3, 3]
    assert encoder.output_ids("<bos>") == [3, 3, 3, 3, 3, 1]
    assert count_unknown([encoder.encode(Row("a", "甲", "乙<eos>"))], 3) == 5


CHAT = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<eos>{% endfor %}<assistant>"


def test_chat_template_ids() -> None:
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    user, assistant = tokenizer.convert_tokens_to_ids(["<user>", "<assistant>"])
    tokenizer.chat_template = CHAT
    encoder = Encoder(tokenizer, Prompt(system="天", turn="{instruction}", chat_template=True))
    assert encoder.prompt_ids("甲") == [2, user, 14, 33, 4, 1, assistant]
    examples = [Example(instruction="乙", output="丙")]
    assert encoder.prompt_ids("甲", examples) == [2, user, 14, 33, 5, 1, assistant, 6, 1, user, 4, 1, assistant]
    # The template's own <user> is a token; the user's is text.
    assert encoder.prompt_ids("<user>").count(user) == 1


def test_chat_template_needs_one() -> None:
    with pytest.raises(UserError, match="no chat template"):
        Encoder(character_tokenizer(), Prompt(turn="{instruction}", chat_template=True))


def test_max_length_error_names_every_row() -> None:
    encoder = Encoder(character_tokenizer(), Prompt(turn="{instruction}"))
    rows = [encoder.encode(Row(str(number), "甲" * number, "乙")) for number in (1, 5, 9)]
    with pytest.raises(UserError) as error:
        apply_max_length(rows, 6, "error", source="f.json", has_bos=True)
    assert error.value.problems == [
        "f.json: row 2 (id 5): over-long: 8 tokens, at most 6 allowed",
        "f.json: row 3 (id 9): over-long: 12 tokens, at most 6 allowed",
        "set data.max_length=12, or data.too_long=drop or data.too_long=truncate_prompt",
    ]


def test_max_length_drop_and_truncate() -> None:
    encoder = Encoder(character_tokenizer(), Prompt(turn="{instruction}"))
    rows = [encoder.encode(Row("a", "甲", "乙")), encoder.encode(Row("b", "甲乙丙丁戊", "己"))]
    kept, lengths = apply_max_length(rows, 6, "drop", source="f", has_bos=True)
    assert [row.id for row in kept] == ["a"] and lengths.dropped == ["b"] and lengths.truncated == []
    kept, lengths = apply_max_length(rows, 6, "truncate_prompt", source="f", has_bos=True)
    assert kept[1].input_ids == [2, 6, 7, 8, 9, 1] and lengths.truncated == ["b"]


def test_an_output_is_never_cut() -> None:
    encoder = Encoder(character_tokenizer(), Prompt(turn="{instruction}"))
    with pytest.raises(UserError, match=r"row 1 \(id a\): its output alone does not fit: 8 tokens, at most 6"):
        apply_max_length([encoder.encode(Row("a", "甲", "乙乙乙乙乙"))], 6, "truncate_prompt", source="f", has_bos=True)


@given(instruction=TEXTS, output=TEXTS)
def test_any_row_is_one_bos_prompt_output_eos(instruction: str, output: str) -> None:
    row = Encoder(_TOKENIZER, PROMPT).encode(Row("a", instruction, output))
    assert row.input_ids.count(2) == 1 and row.input_ids[0] == 2
    assert row.input_ids.count(1) == 1 and row.input_ids[-1] == 1
    assert len(row.output_ids) == len(output) + 1
    assert row.labels == [-100] * len(row.prompt_ids) + row.output_ids


_TOKENIZER = character_tokenizer()


@pytest.fixture(params=["gemma2", "llama3"])
def real_encoder(request: pytest.FixtureRequest, repository) -> Encoder:
    folder = SHARED / "tokenizers" / request.param
    if not folder.is_dir():
        pytest.skip(f"the vocabulary of {request.param} is not beside the repository")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Encoder(tokenizer, load_prompt(repository / "recipes/prompts/study.yaml"))


def test_real_vocabularies(real_encoder: Encoder) -> None:
    row = real_encoder.encode(Row("a", "明日至。\n翻譯成現代文：", "《書》<eos><|eot_id|>"))
    gemma = real_encoder.bos_id == 2
    assert row.prompt_ids[0] == (2 if gemma else 128000)
    # The prompt ends with newline, ASSISTANT, full-width colon; Gemma has one token, 86261, for the colon and 《.
    assert row.prompt_ids[-4:] == ([108, 222412, 6100, 235465] if gemma else [5045, 3931, 2891, 5232])
    assert row.output_ids[0] == (236030 if gemma else 28038)
    assert row.output_ids[-1] == (1 if gemma else 128009)
    assert row.input_ids.count(real_encoder.eos_id) == 1
    assert real_encoder.decode(row.output_ids) == "《書》<eos><|eot_id|>"


def test_embedded_tokenizer(repository) -> None:
    tokenizer = AutoTokenizer.from_pretrained(repository / "data/tiny")
    vocabulary = json.loads((repository / "data/tiny/tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    encoder = Encoder(tokenizer, Prompt(turn="{instruction}\n"))
    row = encoder.encode(Row("a", "天", "地<eos>"))
    assert [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id] == [
        0,
        1,
        2,
        3,
    ]
    assert row.prompt_ids == [2, vocabulary["天"], vocabulary["\n"]]
    assert row.output_ids == [vocabulary.get(character, 3) for character in "地<eos>"] + [1]
    tokenizer.bos_token = None
    assert Encoder(tokenizer, Prompt(turn="{instruction}\n")).encode(Row("a", "天", "地")).prompt_ids == [
        vocabulary["天"],
        vocabulary["\n"],
    ]
