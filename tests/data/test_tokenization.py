"""Literal ids of prompt, BOS, EOS and labels; special tokens typed by users; the length policy."""

import json
from pathlib import Path

import pytest
from helpers import SHARED, character_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hw3.common.errors import UserError
from hw3.config.recipe import load_prompt
from hw3.data.prompt import Example, Prompt
from hw3.data.rows import Row
from hw3.data.tokenization import Encoder, apply_max_length, count_unknown, find_changed_rows

PROMPT = Prompt(system="天地", turn="問：{instruction}\n答：")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Return a BPE tokenizer that merges `：《` into one token, as Gemma's does."""
    pieces = ["<eos>", "<bos>", "答", "：", "《", "書", "》", "：《"]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("：", "《")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>")


def test_encode_returns_literal_ids_and_labels() -> None:
    row = Encoder(character_tokenizer(), PROMPT).encode(Row("a", "甲", "乙丙"))
    # BOS 天 地 \n 問 ： 甲 \n 答 ： | 乙 丙 EOS
    assert row.prompt_ids == [2, 14, 15, 33, 30, 32, 4, 33, 31, 32]
    assert row.output_ids == [5, 6, 1]
    assert row.input_ids == [2, 14, 15, 33, 30, 32, 4, 33, 31, 32, 5, 6, 1]
    assert row.labels == [-100] * 10 + [5, 6, 1]
    assert row.characters == 2


def test_encode_adds_no_bos_if_the_tokenizer_has_none() -> None:
    row = Encoder(character_tokenizer(bos=False), PROMPT).encode(Row("a", "甲", "乙"))
    assert row.prompt_ids == [14, 15, 33, 30, 32, 4, 33, 31, 32]
    assert row.output_ids == [5, 1]


def test_prompt_and_output_are_tokenized_separately() -> None:
    tokenizer = merging_tokenizer()
    row = Encoder(tokenizer, Prompt(turn="{instruction}答：")).encode(Row("a", "書", "《書》"))
    assert tokenizer("答：《書》", add_special_tokens=False)["input_ids"] == [2, 7, 5, 6]
    assert row.prompt_ids == [1, 5, 2, 3]
    assert row.output_ids == [4, 5, 6, 0]


def test_special_tokens_typed_by_a_user_are_encoded_as_text() -> None:
    encoder = Encoder(character_tokenizer(), PROMPT)
    # "<eos>" is encoded as five unknown characters, not as EOS.
    assert encoder.encode_text("甲<eos>") == [4, 3, 3, 3, 3, 3]
    assert encoder.encode_output("<bos>") == [3, 3, 3, 3, 3, 1]
    assert count_unknown([encoder.encode(Row("a", "甲", "乙<eos>"))], 3) == 5


CHAT = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<eos>{% endfor %}<assistant>"


def test_chat_template_is_encoded_to_literal_ids() -> None:
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    user, assistant = tokenizer.convert_tokens_to_ids(["<user>", "<assistant>"])
    tokenizer.chat_template = CHAT
    encoder = Encoder(tokenizer, Prompt(system="天", turn="{instruction}", chat_template=True))
    assert encoder.encode_prompt("甲") == [2, user, 14, 33, 4, 1, assistant]
    examples = [Example(instruction="乙", output="丙")]
    assert encoder.encode_prompt("甲", examples) == [2, user, 14, 33, 5, 1, assistant, 6, 1, user, 4, 1, assistant]
    # The template's own <user> is a special token; the one that a user typed is text.
    assert encoder.encode_prompt("<user>").count(user) == 1


def test_encoder_refuses_a_chat_template_that_the_tokenizer_lacks() -> None:
    with pytest.raises(UserError, match="no chat template"):
        Encoder(character_tokenizer(), Prompt(turn="{instruction}", chat_template=True))


def test_apply_max_length_reports_every_row_that_is_too_long() -> None:
    encoder = Encoder(character_tokenizer(), Prompt(turn="{instruction}"))
    rows = [encoder.encode(Row(str(number), "甲" * number, "乙")) for number in (1, 5, 9)]
    with pytest.raises(UserError) as error:
        apply_max_length(rows, 6, "error", source="f.json", has_bos=True)
    assert error.value.problems == [
        "f.json: row 2 (id 5): too long: 8 tokens, limit 6",
        "f.json: row 3 (id 9): too long: 12 tokens, limit 6",
        "set data.max_length=12, data.too_long=drop or data.too_long=truncate_prompt",
    ]


def test_apply_max_length_drops_rows_or_truncates_prompts() -> None:
    encoder = Encoder(character_tokenizer(), Prompt(turn="{instruction}"))
    rows = [encoder.encode(Row("a", "甲", "乙")), encoder.encode(Row("b", "甲乙丙丁戊", "己"))]
    fitting, report = apply_max_length(rows, 6, "drop", source="f", has_bos=True)
    assert [row.id for row in fitting] == ["a"] and report.dropped == ["b"] and report.truncated == []
    fitting, report = apply_max_length(rows, 6, "truncate_prompt", source="f", has_bos=True)
    assert fitting[1].input_ids == [2, 6, 7, 8, 9, 1] and report.truncated == ["b"]


def test_apply_max_length_never_truncates_an_output() -> None:
    encoder = Encoder(character_tokenizer(), Prompt(turn="{instruction}"))
    with pytest.raises(UserError, match=r"row 1 \(id a\): no prompt token would be left: 8 tokens, limit 6"):
        apply_max_length([encoder.encode(Row("a", "甲", "乙乙乙乙乙"))], 6, "truncate_prompt", source="f", has_bos=True)


@given(instruction=TEXTS, output=TEXTS)
def test_any_row_has_one_bos_and_one_eos(instruction: str, output: str) -> None:
    row = Encoder(_TOKENIZER, PROMPT).encode(Row("a", instruction, output))
    assert row.input_ids.count(2) == 1 and row.input_ids[0] == 2
    assert row.input_ids.count(1) == 1 and row.input_ids[-1] == 1
    assert len(row.output_ids) == len(output) + 1
    assert row.labels == [-100] * len(row.prompt_ids) + row.output_ids


def test_find_changed_rows_names_rows_that_a_tokenizer_changes() -> None:
    rows = [Row("a", "甲", "乙"), Row("b", "Ａ", "乙"), Row("c", "甲", "：a"), Row("d", "①", None), Row("e", "甲", "é")]
    tokenizer = character_tokenizer()
    assert find_changed_rows(rows, Encoder(tokenizer, PROMPT)) == []
    # é is unknown to this vocabulary, and counted as such.
    vocabulary = {token: id for id, token in enumerate(["<eos>", "<unk>", *"甲乙A:a1"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    assert find_changed_rows(rows, Encoder(tokenizer, PROMPT)) == ["b", "c", "d"]


_TOKENIZER = character_tokenizer()


@pytest.fixture(params=["gemma2", "llama3"])
def real_encoder(request: pytest.FixtureRequest, repository: Path) -> Encoder:
    folder = SHARED / "tokenizers" / request.param
    if not folder.is_dir():
        pytest.skip(f"the vocabulary of {request.param} is not installed beside the repository")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Encoder(tokenizer, load_prompt(repository / "recipes/prompts/study.yaml"))


def test_gemma_and_llama_encode_to_literal_ids(real_encoder: Encoder) -> None:
    row = real_encoder.encode(Row("a", "明日至。\n翻譯成現代文：", "《書》<eos><|eot_id|>"))
    is_gemma = real_encoder.bos_token_id == 2
    assert row.prompt_ids[0] == (2 if is_gemma else 128000)
    # The prompt ends with newline, ASSISTANT and a full-width colon; Gemma has one token, 86261, for this colon and 《.
    assert row.prompt_ids[-4:] == ([108, 222412, 6100, 235465] if is_gemma else [5045, 3931, 2891, 5232])
    assert row.output_ids[0] == (236030 if is_gemma else 28038)
    assert row.output_ids[-1] == (1 if is_gemma else 128009)
    assert row.input_ids.count(real_encoder.eos_token_id) == 1
    assert real_encoder.decode(row.output_ids) == "《書》<eos><|eot_id|>"


def test_tokenizer_in_the_repository_encodes_to_literal_ids(repository: Path) -> None:
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


def test_a_tokenizer_that_adds_bos_and_eos_itself_adds_them_once() -> None:
    tokenizer = character_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    assert tokenizer("甲")["input_ids"] == [2, 4, 1]
    row = Row("a", "甲<eos>", "乙<eos>")
    unknown = [3] * 5
    for chat_template in (False, True):
        encoded = Encoder(tokenizer, Prompt(chat_template=chat_template)).encode(row)
        assert encoded.input_ids == [2, 4, *unknown, 5, *unknown, 1]
