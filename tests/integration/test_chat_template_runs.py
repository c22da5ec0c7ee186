"""Runs with a chat template: one date on every day, typed tokens, and templates that lose the instruction."""

import datetime
import json
import shutil
from pathlib import Path

import pytest
import transformers.utils.chat_template_utils
from helpers import hw3, write_recipe
from tokenizers import AddedToken
from transformers import AutoTokenizer

from hw3.data.rows import read_rows
from hw3.data.tokenization import Encoder
from hw3.modeling.fingerprint import hash_tokenizer
from hw3.modeling.loading import load_tokenizer
from hw3.runs.run import Run

DATED = (
    "{{ bos_token }}{{ strftime_now('%Y-%m-%d') }}\n"
    "{% for m in messages %}<think>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}答：{% endif %}"
)
NOTE = "the chat template asks for the date: it gets 26 July 2024 on every day, so that prompts do not change\n"


def set_day(monkeypatch: pytest.MonkeyPatch, year: int) -> None:
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> "Clock":
            return cls(year, 1, 1, tzinfo=tz)

    monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", Clock)


def write_base(source: Path, base: Path, template: str) -> Path:
    """Copy a base model and give its tokenizer a chat template and the added token `<think>`, which is not special."""
    shutil.copytree(source, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(base)
    return base


def write_chat_recipe(folder: Path, base: Path) -> Path:
    recipe = write_recipe(folder, base)
    text = recipe.read_text(encoding="utf-8")
    recipe.write_text(text.replace("prompt:\n", "prompt:\n  chat_template: true\n"), encoding="utf-8")
    rows = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    rows[0] |= {"instruction": "甲<think>", "output": "<think>乙"}
    (folder / "eval.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return recipe


def test_a_run_has_one_date_and_typed_tokens_are_text(
    mini_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_chat_recipe(tmp_path, write_base(mini_base, tmp_path / "base", DATED))
    set_day(monkeypatch, 2031)
    assert NOTE in hw3("check", recipe)[0]
    settings = ["training.max_steps=4", "data.max_length=100"]
    out, err = hw3("train", recipe, "--run", tmp_path / "run", *settings)
    assert NOTE.strip() in out + err
    run = Run(tmp_path / "run")
    manifest = json.loads((tmp_path / "run/manifest.json").read_text(encoding="utf-8"))
    assert manifest["chat_template_date"] == "2024-07-26"
    out, err = hw3("eval", tmp_path / "run")
    assert NOTE.strip() in out + err
    results = tmp_path / "run/eval/eval/results.json"
    before = json.loads(results.read_text(encoding="utf-8"))["entries"]

    # On another day nothing is scored again, and new scores are the same.
    set_day(monkeypatch, 2040)
    content = results.read_bytes()
    hw3("eval", tmp_path / "run")
    assert results.read_bytes() == content
    shutil.rmtree(tmp_path / "run/eval")
    hw3("eval", tmp_path / "run")
    after = json.loads(results.read_text(encoding="utf-8"))["entries"]
    assert [entry | {"seconds": 0} for entry in after] == [entry | {"seconds": 0} for entry in before]
    hw3("train", recipe, "--run", tmp_path / "run", "training.max_steps=5", "data.max_length=100")

    # Other programs that load the run's tokenizer or the exported model render the same prompt.
    hw3("export", tmp_path / "run", "--output", tmp_path / "export")
    for folder in (tmp_path / "run/tokenizer", tmp_path / "export"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
        assert text == "<bos>2024-07-26\n<think>x\n"

    # The homework's grader reads what was typed as the token, and the difference is reported.
    _, err = hw3("pack", tmp_path / "run", "--grader-year", "2024", "--output", tmp_path / "pack", expected=1)
    assert "1 rows contain the text of a special token, which the grader reads as the token itself: row-100" in err
    section = run.load_recipe().model
    assert hash_tokenizer(run.load_tokenizer(run.load_recipe())) == hash_tokenizer(load_tokenizer(section))

    think = tokenizer.convert_tokens_to_ids("<think>")
    row = read_rows(tmp_path / "eval.json")[0]
    encoded = Encoder(load_tokenizer(section), run.load_recipe().prompt).encode(row)
    assert encoded.prompt_ids.count(think) == 1 and think not in encoded.output_ids


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("x", "leaves out the instruction"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "repeats the instruction"),
        ("{{ messages[0].content | upper }}", "changes the instruction"),
        ("{{ raise_exception('no') }}", "cannot be rendered: TemplateError: no"),
        ("{{ messages", "cannot be rendered: TemplateSyntaxError: unexpected end of template"),
    ],
)
def test_a_template_that_loses_the_instruction_is_refused_before_anything_is_written(
    mini_base: Path, tmp_path: Path, template: str, problem: str
) -> None:
    base = write_base(mini_base, tmp_path / "base", template)
    recipe = write_chat_recipe(tmp_path, base)
    run = tmp_path / "run"
    for command in (
        ["check", recipe],
        ["train", recipe, "--run", run],
        ["eval", run, "--base-only", "--recipe", recipe],
    ):
        out, err = hw3(*command, expected=2)
        assert f"prompt.chat_template: the chat template of {base} {problem}" in err
        assert "Traceback" not in out + err and err.count("the chat template of") == 1
        assert not run.exists()
