"""Write a run's prompt as a chat template, so that a chat server renders what the model was trained on."""

from __future__ import annotations

import json

from transformers import PreTrainedTokenizerBase

from hw3.data.prompt import PLACEHOLDER, Prompt


def build_chat_template(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the prompt as a Jinja chat template.

    The last user message becomes the instruction, and earlier turns become few-shot examples. A message of another
    role raises an error when the template is rendered.

    Args:
        prompt: the run's prompt, without a chat template of its own.
        tokenizer: the tokenizer whose BOS token begins the text.
    """
    prefix, suffix = prompt.turn.split(PLACEHOLDER)
    system = "" if prompt.system is None else f"{prompt.system}\n"
    refusal = "the model was trained with a fixed system text: use only user and assistant messages"
    # Jinja reads the escapes of JSON strings.
    system, prefix, suffix, separator, refusal = (
        json.dumps(text, ensure_ascii=False) for text in (system, prefix, suffix, prompt.example_separator, refusal)
    )
    bos = "" if tokenizer.bos_token is None else "{{- bos_token -}}"
    return (
        f"{bos}{{{{- {system} -}}}}{{%- for message in messages -%}}"
        f"{{%- if message['role'] == 'user' -%}}{{{{- {prefix} + message['content'] + {suffix} -}}}}"
        f"{{%- elif message['role'] == 'assistant' -%}}{{{{- message['content'] + {separator} -}}}}"
        f"{{%- else -%}}{{{{- raise_exception({refusal}) -}}}}{{%- endif -%}}{{%- endfor -%}}"
    )
