"""Filled templates hold the recipe's prompt, so the grader reads the token ids of training."""

from pathlib import Path
from typing import Any

import pytest
from helpers import CHARACTERS, character_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from hw3.config.recipe import load_recipe
from hw3.data.prompt import Prompt
from hw3.data.rows import Row
from hw3.data.tokenization import Encoder
from hw3.submission.fill_templates import build_utils_constants, fill_python_template
from hw3.submission.grader_encoding import encode_as_grader

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<eos>{{ m['role'] }}：{{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<eos>答：{% endif %}"
)
PROMPTS = [
    Prompt(system="天地", turn="問：{instruction}\n答："),
    Prompt(turn="{instruction}"),
    Prompt(system=' "玄\\n黃" ', turn=" {instruction} "),
    Prompt(system="天地 ", turn=" 問：{instruction}", chat_template=True),
    Prompt(turn="{instruction}\n", chat_template=True),
]


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
@given(text=st.text(alphabet=CHARACTERS + " {}\"'\\", min_size=1))
def test_grader_encodes_the_filled_prompt_as_in_training(prompt: Prompt, text: str, mini_base: Path) -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    encoder = Encoder(tokenizer, prompt)
    before, after = encoder.turn_prefix_and_suffix()
    turn = prompt.turn.replace("{instruction}", text)
    constants = {"BEFORE": before, "TURN": prompt.turn, "AFTER": after, "CHAT_TEMPLATE": prompt.chat_template}
    utils: dict[str, Any] = {}
    exec(fill_python_template("utils.py", constants | {"QUANTIZATION": None}), utils)
    assert utils["get_prompt"](text) == before + (turn.strip() if prompt.chat_template else turn) + after
    encoded = encode_as_grader(tokenizer, Row("1", text, "甲"), utils["get_prompt"](text))
    assert encoded.prompt_ids == encoder.encode_prompt(text)
    assert utils["get_bnb_config"]() is None


def test_build_utils_constants_returns_the_recipes_prompt(mini_recipe: Path) -> None:
    constants = build_utils_constants(load_recipe(mini_recipe, ["quantization=null"]), character_tokenizer())
    assert constants == {
        "BEFORE": "天地玄黃\n",
        "TURN": "問：{instruction}\n答：",
        "AFTER": "",
        "CHAT_TEMPLATE": False,
        "QUANTIZATION": None,
    }


def test_float16_becomes_float32_in_a_submission_which_has_no_safe_float16(mini_recipe: Path) -> None:
    overrides = ["model.dtype=float16", "quantization.bnb_4bit_compute_dtype=float16"]
    constants = build_utils_constants(load_recipe(mini_recipe, overrides), character_tokenizer())
    assert constants["QUANTIZATION"]["bnb_4bit_compute_dtype"] == "float32"
