"""A merged model gives the outputs and the score of the adapter with its base model, with plain transformers."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import copy_run_with_scaled_scores, hw3
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hw3.config.recipe import load_recipe
from hw3.data.rows import read_rows
from hw3.modeling.adapter_slot import AdapterSlot
from hw3.modeling.loading import load_base_model


def read_perplexities(stdout: str) -> tuple[float, float]:
    """Return the mean perplexity before and after merging, as `hw3 export` printed them."""
    before, after = re.findall(r"([\d.]+) (?:before|after) merging", stdout)
    return float(before), float(after)


def test_export_writes_a_model_that_plain_transformers_generates_with(
    exported: Path, scored_run: Path, tmp_path: Path
) -> None:
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
    generation_config = json.loads((exported / "generation_config.json").read_text())
    assert [generation_config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [2, [1], 0]

    hw3("predict", shutil.copytree(scored_run, tmp_path / "run"), "--output", tmp_path / "predictions.json")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    rows = read_rows(scored_run.parent / "eval.json")
    predictions = json.loads((tmp_path / "predictions.json").read_text(encoding="utf-8"))
    for row, prediction in zip(rows, predictions, strict=True):
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": row.instruction}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        new_ids = model.generate(**inputs, max_new_tokens=32)[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(new_ids, skip_special_tokens=True) == prediction["output"]


def test_export_does_not_change_the_score(scored_run: Path, tmp_path: Path) -> None:
    stdout, _ = hw3("export", scored_run, "--checkpoint", "4", "--output", tmp_path / "model")
    before, after = read_perplexities(stdout)
    assert after == pytest.approx(before, rel=1e-4) and "warning" not in stdout
    entries = json.loads((scored_run / "eval/eval/results.json").read_text())["entries"]
    (entry,) = (entry for entry in entries if entry["checkpoint"] == "checkpoint-4")
    assert before == pytest.approx(entry["mean_perplexity"], abs=5e-5)
    _, stderr = hw3("export", scored_run, "--checkpoint", "4", "--output", tmp_path / "model", expected=2)
    assert "already exists, and existing files are never overwritten" in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_export_warns_if_the_score_changes_by_more_than_a_percent(scored_run: Path, tmp_path: Path) -> None:
    run = copy_run_with_scaled_scores(scored_run, tmp_path / "run", 1 / 1.02)
    stdout, _ = hw3("export", run)
    assert "relative change +2.0e-02" in stdout and "warning: the change exceeds 1%" in stdout
    assert (tmp_path / "run-export/model.safetensors").is_file()


def test_merge_adds_in_float32_and_rounds_once(scored_run: Path) -> None:
    recipe = load_recipe(scored_run / "recipe.yaml", ["model.dtype=bfloat16", "quantization=null"])
    name = "model.layers.0.mlp.up_proj"
    before = load_base_model(recipe, torch.device("cpu")).get_submodule(name).weight
    slot = AdapterSlot(load_base_model(recipe, torch.device("cpu")))
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


@pytest.mark.parametrize("lora", ["use_dora=true", "use_rslora=true", "alpha_pattern={q_proj: 32}"])
def test_export_merges_variants_of_lora(lora: str, mini_recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    hw3("train", mini_recipe, "--run", run, f"lora.{lora}", "quantization=null", "training.max_steps=4")
    hw3("eval", run)
    before, after = read_perplexities(hw3("export", run)[0])
    assert after == pytest.approx(before, rel=1e-4)


def test_export_after_full_fine_tuning_writes_the_trained_weights(mini_recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    hw3("train", mini_recipe, "--run", run, "quantization=null", "lora=null", "training.max_steps=4")
    hw3("eval", run)
    hw3("export", run, "--output", tmp_path / "model")
    trained = {key: value for file in run.glob("checkpoint-4/*.safetensors") for key, value in load_file(file).items()}
    written = load_file(tmp_path / "model/model.safetensors")
    assert written.keys() == trained.keys()
    assert all(torch.equal(written[key], trained[key]) for key in written)
    assert "Full fine-tuning" in (tmp_path / "model/README.md").read_text(encoding="utf-8")
