"""Text that spells an added token stays text; the tokens of a chat template stay tokens; other ids do not change."""

import pytest
from helpers import SHARED, character_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hw3.data.control_tokens import ControlTokens
from hw3.data.prompt import Example, Prompt
from hw3.data.rows import Row
from hw3.data.tokenization import Encoder

# Qwen3's template, without tools and reasoning: an empty `<think>` block begins the output.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ADDED = ["<think>", "</think>", "<tool_call>"]
PLAIN, CHAT = Prompt(turn="{instruction}"), Prompt(turn="{instruction}", chat_template=True)


def bare_qwen_tokenizer() -> Tokenizer:
    """Return a byte-level BPE tokenizer without added tokens: 256 bytes, then `th` 256, `in` 257, `think` 260."""
    merges = [("t", "h"), ("i", "n"), ("in", "k"), ("th", "ink")]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "in", "ink", "think"]
    tokenizer = Tokenizer(models.BPE({piece: id for id, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with Qwen3's kinds of tokens: special ones from 260, added ones that are not from 263."""
    tokenizer = bare_qwen_tokenizer()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ADDED])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE)


QWEN, BARE = qwen_tokenizer(), bare_qwen_tokenizer()
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
TYPED = st.lists(TEXT | st.sampled_from(SPECIAL + ADDED), max_size=6).map("".join)


def test_a_typed_added_token_is_encoded_as_text() -> None:
    encoder = Encoder(QWEN, PLAIN)
    assert QWEN.convert_tokens_to_ids(["think", *SPECIAL, *ADDED]) == [259, 260, 261, 262, 263, 264, 265]
    # a < think > \n < / think >
    ids = [64, 27, 259, 29, 198, 27, 14, 259, 29]
    assert encoder.encode_text("a<think>\n</think>") == ids
    row = encoder.encode(Row("1", "a<think>\n</think>", "a<think>\n</think>"))
    assert row.prompt_ids == ids
    assert row.output_ids == [*ids, 262]
    assert encoder.decode(row.output_ids) == "a<think>\n</think>"


def test_a_turn_and_an_instruction_that_join_to_an_added_token_are_text() -> None:
    prompt = Prompt(turn="<{instruction}>")
    assert Encoder(QWEN, prompt).encode_prompt("think") == [27, 259, 29]


def test_a_chat_templates_tokens_stay_tokens_beside_typed_ones() -> None:
    encoder = Encoder(QWEN, CHAT)
    user, assistant = ([*BARE.encode(f"{role}\n").ids] for role in ("user", "assistant"))
    empty_thought = [263, 198, 198, 264, 198, 198]
    for text, ids in {"a": [64], "<think>": [27, 259, 29], "<|im_end|>a": BARE.encode("<|im_end|>a").ids}.items():
        expected = [261, *user, *ids, 262, 198, 261, *assistant, *empty_thought]
        assert encoder.encode_prompt(text) == expected
    examples = [Example(instruction="<tool_call>", output="</think>")]
    assert encoder.encode_prompt("a", examples) == [
        *(261, *user, *BARE.encode("<tool_call>").ids, 262, 198),
        *(261, *assistant, 27, 14, 259, 29, 262, 198),
        *(261, *user, 64, 262, 198, 261, *assistant, *empty_thought),
    ]


@given(instruction=TYPED, output=TYPED)
def test_no_text_is_encoded_as_a_control_token(instruction: str, output: str) -> None:
    plain, chat = Encoder(QWEN, PLAIN), Encoder(QWEN, CHAT)
    assert plain.encode_text(instruction) == BARE.encode(instruction).ids
    row = chat.encode(Row("1", instruction, output), [Example(instruction=output, output=instruction or "a")])
    control_tokens = chat.control_tokens
    assert control_tokens.select(row.prompt_ids) == [261, 262, 261, 262, 261, 262, 261, 263, 264]
    assert control_tokens.select(row.output_ids) == [262]
    assert plain.decode(row.output_ids) == output


@given(instruction=TEXT, output=TEXT)
def test_other_rows_have_the_tokenizers_own_ids(instruction: str, output: str) -> None:
    instruction = instruction.strip() or "a"
    row = Encoder(QWEN, CHAT).encode(Row("1", instruction, output))
    messages = [{"role": "user", "content": instruction}]
    assert row.prompt_ids == QWEN.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert row.output_ids == [*QWEN(output, add_special_tokens=False)["input_ids"], 262]
    assert Encoder(QWEN, PLAIN).encode_prompt(instruction) == QWEN(instruction, add_special_tokens=False)["input_ids"]


def test_a_control_token_that_the_vocabulary_also_has_as_a_piece_is_cut() -> None:
    pieces = ["<unk>", "<", "t", ">", "<t>", "a", "</s>"]
    tokenizer = Tokenizer(models.Unigram([(piece, 0.0 if len(piece) > 1 else -1.0) for piece in pieces], unk_id=0))
    tokenizer.add_tokens([AddedToken("<t>", normalized=False)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", chat_template="<t>{{ messages[0].content }}"
    )
    assert Encoder(wrapped, PLAIN).encode_text("a<t>a<t>") == [5, 1, 2, 3, 5, 1, 2, 3]
    assert Encoder(wrapped, CHAT).encode_prompt("a<t>") == [4, 5, 1, 2, 3]
    assert Encoder(wrapped, CHAT).encode_prompt("aé") == [4, 5, 0]


def test_a_typed_unknown_token_that_is_also_eos_is_text() -> None:
    tokenizer = bare_qwen_tokenizer()
    tokenizer.add_special_tokens(["<e>"])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<e>", unk_token="<e>", chat_template="<e>{{ messages[0].content }}>"
    )
    assert Encoder(wrapped, CHAT).encode_prompt("a") == [260, 64, 29]
    assert Encoder(wrapped, CHAT).encode_prompt("<e>") == [260, 27, 68, 29, 29]
    assert Encoder(wrapped, CHAT).encode_prompt("<e") == [260, 27, 68, 29]
    assert Encoder(wrapped, PLAIN).encode_prompt("<e>") == [27, 68, 29]


def test_a_control_token_of_one_character_is_text() -> None:
    tokenizer = bare_qwen_tokenizer()
    tokenizer.add_special_tokens(["<e>", "☃"])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>")
    assert Encoder(wrapped, PLAIN).encode_text("☃a☃") == BARE.encode("☃a☃").ids


@pytest.mark.parametrize("flags", [{"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": True}])
def test_flags_of_added_tokens_do_not_matter_for_typed_text(flags: dict[str, bool]) -> None:
    tokenizer = bare_qwen_tokenizer()
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_special_tokens(["<e>"])
    tokenizer.add_tokens([AddedToken("<think>", **flags)])
    template = "<e> {{ messages[0].content }} <think> \n"
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>", chat_template=template)
    for text in ("a <think> b", "<think>", "x<THINK>y", " <think>\n"):
        assert Encoder(wrapped, PLAIN).encode_text(text) == BARE.encode(text.lower()).ids
        prompt_ids = Encoder(wrapped, CHAT).encode_prompt(text)
        assert prompt_ids.count(261) == 1 and prompt_ids.count(260) == 1
    messages = [{"role": "user", "content": "a"}]
    assert Encoder(wrapped, CHAT).encode_prompt("a") == wrapped.apply_chat_template(messages)["input_ids"]


def test_white_space_tokens_are_text() -> None:
    tokenizer = bare_qwen_tokenizer()
    tokenizer.add_special_tokens(["<e>"])
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False), "<t>", AddedToken("▁▁", normalized=False)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>")
    encoder = Encoder(wrapped, PLAIN)
    assert encoder.control_tokens.ids == {"<e>": 260, "<t>": 262}
    assert encoder.encode_text("a\n\na") == [64, 261, 64]
    assert encoder.encode_text("a\n\n<t>▁▁") == [64, 261, *BARE.encode("<t>").ids, 263]


def test_many_typed_tokens_are_encoded_without_recursion() -> None:
    text = "<think>" * 5000
    assert Encoder(QWEN, PLAIN).encode_text(text) == [27, 259, 29] * 5000


def test_unknown_characters_are_no_control_tokens() -> None:
    control_tokens = ControlTokens(character_tokenizer())
    assert control_tokens.ids == {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
    assert control_tokens.select([3, 1, 4, 2]) == [1, 2]
    assert control_tokens.are_all_in(["<eos>"], "甲<eos>乙", [4, 1, 5])
    assert not control_tokens.are_all_in(["<eos>"], "<eos><unk>", [1, 3])
    assert control_tokens.encode("甲<unk>") == [4, 3, 3, 3, 3, 3]


@pytest.fixture(scope="module", params=["gemma2", "llama3"])
def real_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    folder = SHARED / "tokenizers" / request.param
    if not folder.is_dir():
        pytest.skip(f"the vocabulary of {request.param} is not installed beside the repository")
    return AutoTokenizer.from_pretrained(folder)


def test_real_tokenizers_encode_typed_tokens_as_text(real_tokenizer: PreTrainedTokenizerBase) -> None:
    is_gemma = real_tokenizer.bos_token_id == 2
    encoder = Encoder(real_tokenizer, CHAT)
    text = "a\n\n<table>b"
    ids = [235250, 109, 235322, 1785, 235313, 235268] if is_gemma else [64, 271, 21668, 52507]
    assert encoder.encode_text(text) == ids
    control_tokens = encoder.control_tokens
    typed = "天".join(control_tokens.ids)
    assert control_tokens.select(encoder.encode_text(typed)) == []
    assert encoder.decode(encoder.encode_text(typed)) == typed
    prompt_ids = encoder.encode_prompt(typed, [Example(instruction=typed, output=typed)])
    assert control_tokens.select(prompt_ids) == (
        [2, 106, 107, 106, 107, 106, 107, 106]
        if is_gemma
        else [128000, 128006, 128007, 128009, 128006, 128007, 128009, 128006, 128007, 128009, 128006, 128007]
    )


def test_real_chat_templates_have_the_tokenizers_own_ids(real_tokenizer: PreTrainedTokenizerBase) -> None:
    instruction, output = "明日至。\n\n翻譯成現代文：  x", "《書》\t\tA"
    messages = [
        {"role": "user", "content": instruction},
        {"role": "assistant", "content": output},
        {"role": "user", "content": output},
    ]
    ids = real_tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert Encoder(real_tokenizer, CHAT).encode_prompt(output, [Example(instruction=instruction, output=output)]) == ids
