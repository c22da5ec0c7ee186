"""Write an Ollama `Modelfile` whose template is the prompt of the training."""

from __future__ import annotations

import json
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from hw3.config.schema import GenerationSection
from hw3.data.chat_rendering import get_chat_template, render_chat_parts
from hw3.data.prompt import PLACEHOLDER, Prompt


def build_modelfile(
    gguf_name: str,
    prompt: Prompt,
    generation: GenerationSection,
    tokenizer: PreTrainedTokenizerBase,
    stop_tokens: Sequence[str],
) -> str:
    """Return the text of the `Modelfile`.

    The last user message becomes the instruction, and earlier turns become few-shot examples. Messages of other roles
    are left out. BOS is not in the template, because Ollama adds it as the GGUF file's metadata require.

    Args:
        gguf_name: name of the GGUF file beside it.
        prompt: the run's prompt.
        generation: the recipe's section.
        tokenizer: the run's tokenizer.
        stop_tokens: EOS, and other tokens that end an output.
    """
    lines = [f"FROM ./{gguf_name}", f'TEMPLATE """{build_template(prompt, tokenizer)}"""']
    lines += [f"PARAMETER stop {json.dumps(token, ensure_ascii=False)}" for token in stop_tokens]
    values = {
        "temperature": generation.temperature if generation.do_sample else 0,
        "top_k": generation.top_k,
        "top_p": generation.top_p,
        "repeat_penalty": generation.repetition_penalty or 1,  # Ollama's default is 1.1
        "num_predict": generation.max_new_tokens,
    }
    lines += [f"PARAMETER {name} {value}" for name, value in values.items() if value is not None]
    return "\n".join(lines) + "\n"


def build_template(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the prompt as a template of Go's `text/template`, without BOS."""
    start, after_turn, between_turns, end = _list_parts(prompt, tokenizer)
    user = "{{ $message.Content }}"
    if after_turn == end:
        user += _literal(end)
    else:
        user += f"{{{{ if eq (len (slice $.Messages $index)) 1 }}}}{_literal(end)}{{{{ else }}}}{_literal(after_turn)}"
        user += "{{ end }}"
    assistant = f"{{{{ $message.Content }}}}{_literal(between_turns)}"
    return (
        f"{_literal(start)}{{{{ range $index, $message := .Messages }}}}"
        f'{{{{ if eq $message.Role "user" }}}}{user}'
        f'{{{{ else if eq $message.Role "assistant" }}}}{assistant}{{{{ end }}}}{{{{ end }}}}'
    )


def _list_parts(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str, str]:
    """Return the texts before the first instruction, after an example's, before the next, and after the last."""
    prefix, suffix = prompt.turn.split(PLACEHOLDER)
    system = "" if prompt.system is None else f"{prompt.system}\n"
    if not prompt.chat_template:
        return system + prefix, suffix, prompt.example_separator + prefix, suffix
    parts = render_chat_parts(tokenizer, get_chat_template(tokenizer), ["user", "assistant", "user"])
    start, after_turn, between_turns, end = parts
    # `build_messages` strips messages at both ends.
    prefix, suffix = prefix.lstrip(), suffix.rstrip()
    system = "" if prompt.system is None else f"{prompt.system.strip()}\n"
    start = start.removeprefix(tokenizer.bos_token or "")
    return start + system + prefix, suffix + after_turn, between_turns + prefix, suffix + end


def _literal(text: str) -> str:
    """Return a Go template's action that writes a text; nothing for an empty text.

    Go reads the escapes of JSON strings. An escaped text has no three quotes, which would end the Modelfile's string.
    """
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
