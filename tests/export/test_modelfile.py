"""The Modelfile for Ollama: its template is the prompt of the training."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import character_tokenizer

from hw3.config.schema import GenerationSection
from hw3.data.prompt import Example, Prompt, render_prompt
from hw3.export.modelfile import build_modelfile, build_template

STUDY = Prompt(system="天地", turn="問：{instruction}\n答：")
THINKING_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}/{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think></think>{% endif %}"
)
# Renders the template in its first argument with the messages in its second, as Ollama does.
RENDERER = """
package main

import (
	"encoding/json"
	"os"
	"text/template"
)

func main() {
	var messages []map[string]string
	if err := json.Unmarshal([]byte(os.Args[2]), &messages); err != nil {
		panic(err)
	}
	parsed := template.Must(template.New("").Parse(os.Args[1]))
	if err := parsed.Execute(os.Stdout, map[string]any{"Messages": messages}); err != nil {
		panic(err)
	}
}
"""


def test_build_modelfile_names_file_template_stops_and_decoding() -> None:
    generation = GenerationSection(max_new_tokens=64, repetition_penalty=1.2)
    assert build_modelfile("m-f16.gguf", STUDY, generation, character_tokenizer(), ["<eos>", '<"end">']) == (
        "FROM ./m-f16.gguf\n"
        'TEMPLATE """{{ "天地\\n問：" }}{{ range $index, $message := .Messages }}{{ if eq $message.Role "user" }}'
        '{{ $message.Content }}{{ "\\n答：" }}{{ else if eq $message.Role "assistant" }}{{ $message.Content }}'
        '{{ "\\n\\n問：" }}{{ end }}{{ end }}"""\n'
        'PARAMETER stop "<eos>"\n'
        'PARAMETER stop "<\\"end\\">"\n'
        "PARAMETER temperature 0\n"
        "PARAMETER repeat_penalty 1.2\n"
        "PARAMETER num_predict 64\n"
    )


def test_build_modelfile_samples_as_the_recipe_does_and_penalizes_no_repetition() -> None:
    generation = GenerationSection(do_sample=True, temperature=0.7, top_k=20, top_p=0.9)
    text = build_modelfile("m.gguf", STUDY, generation, character_tokenizer(), ["<eos>"])
    assert text.endswith(
        "PARAMETER temperature 0.7\nPARAMETER top_k 20\nPARAMETER top_p 0.9\nPARAMETER repeat_penalty 1\n"
    )


def test_build_template_leaves_out_bos_and_tells_the_last_turn_of_a_chat_template() -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = THINKING_TEMPLATE
    prompt = Prompt(system=" 天 ", turn=" 問：{instruction}。 ", chat_template=True)
    assert build_template(prompt, tokenizer) == (
        '{{ "[user]天\\n問：" }}{{ range $index, $message := .Messages }}{{ if eq $message.Role "user" }}'
        "{{ $message.Content }}{{ if eq (len (slice $.Messages $index)) 1 }}"
        '{{ "。/[assistant]<think></think>" }}{{ else }}{{ "。/[assistant]" }}{{ end }}'
        '{{ else if eq $message.Role "assistant" }}{{ $message.Content }}{{ "/[user]問：" }}{{ end }}{{ end }}'
    )


def test_build_template_has_no_three_quotes_which_would_end_it() -> None:
    prompt = Prompt(system='"""', turn='"""{instruction}"""', example_separator='"""')
    assert '"""' not in build_template(prompt, character_tokenizer())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="needs Go, in whose template language Ollama's are written")
def test_go_renders_the_prompt_of_the_training(tmp_path: Path) -> None:
    (tmp_path / "main.go").write_text(RENDERER, encoding="utf-8")
    subprocess.run(["go", "build", "-o", tmp_path / "render", tmp_path / "main.go"], check=True)
    examples = [Example(instruction='甲 }} "q" {{x}}', output="乙")]
    for prompt in (
        STUDY,
        Prompt(),
        Prompt(system='{{ "a" }} \\ """ \t', turn='"""{instruction}', example_separator="\n"),
    ):
        for shots in (0, 1, 2):
            messages = []
            for example in examples * shots:
                messages.append({"Role": "user", "Content": example.instruction})
                messages.append({"Role": "assistant", "Content": example.output})
            messages.append({"Role": "user", "Content": "天 {{ .Messages }}"})
            template = build_template(prompt, character_tokenizer())
            done = subprocess.run(
                [tmp_path / "render", template, json.dumps(messages)], capture_output=True, text=True, check=True
            )
            assert done.stdout == render_prompt(prompt, "天 {{ .Messages }}", examples * shots)
