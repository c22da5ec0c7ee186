"""The chat template of an exported model renders the prompt of training."""

from helpers import CHARACTERS, character_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from hw3.data.prompt import Example, Prompt
from hw3.data.tokenization import Encoder
from hw3.export.chat_template import build_chat_template

TEXT = st.text(alphabet=CHARACTERS + "{}%\"'\\\t \n", min_size=1)


@given(
    system=st.none() | TEXT,
    prefix=st.just("") | TEXT,
    suffix=st.just("") | TEXT,
    instructions=st.lists(TEXT, min_size=1, max_size=3),
    bos=st.booleans(),
)
def test_build_chat_template_renders_the_training_prompt(
    system: str | None, prefix: str, suffix: str, instructions: list[str], bos: bool
) -> None:
    tokenizer = character_tokenizer(bos=bos)
    prompt = Prompt(system=system, turn=prefix + "{instruction}" + suffix, example_separator="。\n")
    tokenizer.chat_template = build_chat_template(prompt, tokenizer)
    examples = [Example(instruction=text, output=f"答{text}") for text in instructions[:-1]]
    messages = []
    for example in examples:
        messages.append({"role": "user", "content": example.instruction})
        messages.append({"role": "assistant", "content": example.output})
    messages.append({"role": "user", "content": instructions[-1]})
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == Encoder(tokenizer, prompt).encode_prompt(instructions[-1], examples)
