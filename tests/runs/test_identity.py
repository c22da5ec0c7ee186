"""A result's key changes with everything that the result depends on."""

from dataclasses import replace

from hw3.data.prompt import Example, Prompt
from hw3.runs.identity import ModelIdentity, prompt_name

IDENTITY = ModelIdentity(
    base="base hash",
    tokenizer="tokenizer hash",
    dtype="float32",
    attn_implementation="eager",
    quantization={"load_in_4bit": True},
    dequantized=True,
)
PROMPT = Prompt(turn="Q {instruction} A")
EXAMPLES = [Example(instruction="1", output="one")]


def test_key_is_stable() -> None:
    assert IDENTITY.key(None, PROMPT, [], data="data hash") == "aaa5e7305cfd4eda"
    # Examples that are not shown do not count.
    with_examples = PROMPT.model_copy(update={"examples": EXAMPLES})
    assert IDENTITY.key(None, with_examples, [], data="data hash") == "aaa5e7305cfd4eda"


def test_key_changes_with_every_part() -> None:
    keys = {
        IDENTITY.key(None, PROMPT, [], data="data hash"),
        IDENTITY.key("abc", PROMPT, [], data="data hash"),
        IDENTITY.key(None, Prompt(turn="{instruction}"), [], data="data hash"),
        IDENTITY.key(None, PROMPT, EXAMPLES, data="data hash"),
        IDENTITY.key(None, PROMPT, [], data="other hash"),
        *(
            replace(IDENTITY, **change).key(None, PROMPT, [], data="data hash")
            for change in (
                {"base": "other"},
                {"tokenizer": "other"},
                {"dtype": "bfloat16"},
                {"attn_implementation": None},
                {"quantization": None},
                {"dequantized": False},
            )
        ),
    }
    assert len(keys) == 11


def test_prompt_name_is_recipe_for_a_prompt_without_a_file() -> None:
    assert prompt_name(Prompt(turn="no file has this turn: {instruction}")) == "recipe"
