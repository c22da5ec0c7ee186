"""A merged model: the same answers and score as the adapter beside its base, readable by plain transformers."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import CHARACTERS, character_tokenizer, with_scores_times
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hw3.cli import main
from hw3.config.recipe import load_recipe
from hw3.data.prompt import Example, Prompt
from hw3.data.rows import read_rows
from hw3.data.tokenization import Encoder
from hw3.export.merge import prompt_as_template
from hw3.export.model_card import public_recipe
from hw3.modeling.adapter_slot import AdapterSlot
from hw3.modeling.loading import load_base


def hw3(*words: object, expected: int = 0) -> None:
    assert main([str(word) for word in words]) == expected


@pytest.fixture(scope="module")
def exported(scored_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    hw3("export", scored_run, "--out", folder / "model")
    assert [path.name for path in folder.iterdir()] == ["model"]
    return folder / "model"


def test_the_folder_is_a_model_of_plain_transformers(exported: Path, scored_run: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in exported.iterdir()) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((exported / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32" and config["use_cache"] is True
    generation = json.loads((exported / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (2, [1], 0)

    hw3("predict", shutil.copytree(scored_run, tmp_path / "run"), "--output", tmp_path / "own.json")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    rows = read_rows(scored_run.parent / "eval.json")
    for row, own in zip(rows, json.loads((tmp_path / "own.json").read_text(encoding="utf-8")), strict=True):
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": row.instruction}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        new = model.generate(**inputs, max_new_tokens=32)[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(new, skip_special_tokens=True) == own["output"]


def test_the_score_stays(scored_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hw3("export", scored_run, "--checkpoint", "4", "--out", tmp_path / "model")
    shown = capsys.readouterr().out
    before, after = map(float, re.findall(r"([\d.]+) (?:before merging|after)", shown))
    assert after == pytest.approx(before, rel=1e-4) and "warning" not in shown
    entries = json.loads((scored_run / "eval/eval/results.json").read_text())["entries"]
    (entry,) = (entry for entry in entries if entry["checkpoint"] == "checkpoint-4")
    assert before == pytest.approx(entry["mean_perplexity"], abs=5e-5)
    hw3("export", scored_run, "--checkpoint", "4", "--out", tmp_path / "model", expected=2)
    said = capsys.readouterr().err
    assert "exists already, and nothing is written over it" in said
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_more_than_a_percent_apart_is_said(
    scored_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = with_scores_times(scored_run, tmp_path / "run", 1 / 1.02)
    hw3("export", run)
    shown = capsys.readouterr().out
    assert "+2.0e-02 of it" in shown and "warning: more than 1% apart" in shown
    assert (tmp_path / "run-export/model.safetensors").is_file()


def test_sums_are_made_in_float32_and_rounded_once(scored_run: Path) -> None:
    half = ["model.dtype=bfloat16", "quantization=null"]
    recipe = load_recipe(scored_run / "recipe.yaml", half)
    name = "model.layers.0.mlp.up_proj"
    before = load_base(recipe, torch.device("cpu")).get_submodule(name).weight
    slot = AdapterSlot(load_base(recipe, torch.device("cpu")))
    folder = scored_run / "checkpoint-12"
    slot.load(folder)
    merged = slot.merge()
    adapter = load_file(folder / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
    assert a.dtype == torch.float32 and before.dtype == torch.bfloat16
    expected = (before.float() + b @ a * (8 / 4)).bfloat16()
    assert torch.equal(merged.get_submodule(name).weight, expected) and not torch.equal(before, expected)
    assert {weight.dtype for weight in merged.state_dict().values()} == {torch.bfloat16}
    assert not any("lora" in key for key in merged.state_dict())


def test_the_card_says_what_it_is_and_shows_no_row(exported: Path, scored_run: Path) -> None:
    text = (exported / "README.md").read_text(encoding="utf-8")
    manifest = json.loads((scored_run / "manifest.json").read_text())
    best = json.loads((scored_run / "eval/eval/results.json").read_text())["best"]
    assert manifest["data"]["train"]["sha256"] in text and "| train | `train.json` | 44 |" in text
    assert f"| tuned, step {best['step']} | {best['mean_perplexity']:.3f} [" in text and "| base | " in text
    assert str(scored_run.parent) not in text
    for name in ("train.json", "eval.json"):
        for row in read_rows(scored_run.parent / name):
            assert row.instruction not in text and f"{row.output}\n" not in text


def test_the_card_keeps_secrets_and_worked_examples_to_itself(mini_recipe: Path) -> None:
    examples = "prompt.examples=[{instruction: 甲, output: 乙}]"
    recipe = load_recipe(mini_recipe, [examples, "training.run_name=mine"])
    public = public_recipe(recipe)
    assert public["prompt"] == {
        "system": "天地玄黃",
        "turn": "問：{instruction}\n答：",
        "example_separator": "\n\n",
        "chat_template": False,
    }
    assert public["model"]["pretrained_model_name_or_path"] == "base" and public["data"]["max_length"] == 64
    assert "run_name" not in public["training"]
    assert public["training"]["learning_rate"] == 0.01


TEXT = st.text(alphabet=CHARACTERS + "{}%\"'\\\t \n", min_size=1)


@given(
    system=st.none() | TEXT,
    before=st.just("") | TEXT,
    after=st.just("") | TEXT,
    instructions=st.lists(TEXT, min_size=1, max_size=3),
    bos=st.booleans(),
)
def test_the_chat_template_is_the_training_prompt(
    system: str | None, before: str, after: str, instructions: list[str], bos: bool
) -> None:
    tokenizer = character_tokenizer(bos=bos)
    prompt = Prompt(system=system, turn=before + "{instruction}" + after, example_separator="。\n")
    tokenizer.chat_template = prompt_as_template(prompt, tokenizer)
    examples = [Example(instruction=text, output=f"答{text}") for text in instructions[:-1]]
    messages = [{"role": "user", "content": instructions[-1]}]
    for example in reversed(examples):
        messages[:0] = [
            {"role": "user", "content": example.instruction},
            {"role": "assistant", "content": example.output},
        ]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == Encoder(tokenizer, prompt).prompt_ids(instructions[-1], examples)


@pytest.mark.parametrize("lora", ["use_dora=true", "use_rslora=true", "alpha_pattern={q_proj: 32}"])
def test_other_ways_of_lora_merge_too(
    lora: str, mini_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    hw3("train", mini_recipe, "--run", run, f"lora.{lora}", "quantization=null", "training.max_steps=4")
    hw3("eval", run)
    hw3("export", run)
    before, after = map(float, re.findall(r"([\d.]+) (?:before merging|after)", capsys.readouterr().out))
    assert after == pytest.approx(before, rel=1e-4)


def test_full_fine_tuning_keeps_its_weights(mini_recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    hw3("train", mini_recipe, "--run", run, "quantization=null", "lora=null", "training.max_steps=4")
    hw3("eval", run)
    hw3("export", run, "--out", tmp_path / "model")
    trained = {key: value for file in run.glob("checkpoint-4/*.safetensors") for key, value in load_file(file).items()}
    written = load_file(tmp_path / "model/model.safetensors")
    assert written.keys() == trained.keys()
    assert all(torch.equal(written[key], trained[key]) for key in written)
    assert "full fine-tuning" in (tmp_path / "model/README.md").read_text(encoding="utf-8")
