"""A merged model gives the outputs and the score of the adapter with its base model, with plain transformers."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import copy_run_with_scaled_scores, hw3
from safetensors.torch import load_file
from tiny_models import OTHER_ARCHITECTURES, TRAINING_SHAPE, write_base
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

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
    config = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config and config["dtype"] == "float32" and config["use_cache"] is True
    generation_config = json.loads((exported / "generation_config.json").read_text(encoding="utf-8"))
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
    entries = json.loads((scored_run / "eval/eval/results.json").read_text(encoding="utf-8"))["entries"]
    (entry,) = (entry for entry in entries if entry["checkpoint"] == "checkpoint-4")
    assert before == pytest.approx(entry["mean_perplexity"], abs=5e-5)
    _, stderr = hw3("export", scored_run, "--checkpoint", "4", "--output", tmp_path / "model", expected=2)
    assert "already exists, and existing files are never overwritten" in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_export_keeps_nothing_if_the_merged_model_scores_differently(scored_run: Path, tmp_path: Path) -> None:
    run = copy_run_with_scaled_scores(scored_run, tmp_path / "run", 1 / 1.002)
    _, stderr = hw3("export", run, expected=1)
    assert "relative change +2.0e-03" in stderr
    assert "rounding to float32 explains at most 0.1%, so the merged model was not kept" in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


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


@pytest.mark.parametrize("lora", ["use_dora=true", "use_rslora=true", "alpha_pattern={q_proj: 32}", "bias=lora_only"])
def test_export_merges_variants_of_lora(lora: str, mini_recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    hw3("train", mini_recipe, "--run", run, f"lora.{lora}", "quantization=null", "training.max_steps=4")
    hw3("eval", run)
    before, after = read_perplexities(hw3("export", run)[0])
    assert after == pytest.approx(before, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "are_tied"),
    [
        (["lora.target_modules=[q_proj, embed_tokens]"], False),
        (["lora.target_modules=[q_proj, embed_tokens]", "lora.use_dora=true"], False),
        (["lora.modules_to_save=[embed_tokens]"], False),
        (["lora.modules_to_save=[embed_tokens]", "lora.ensure_weight_tying=true"], True),
        (["lora.trainable_token_indices=[5, 30]"], True),
        (["lora.trainable_token_indices={embed_tokens: [5], lm_head: [30]}"], False),
        ([], True),
    ],
)
def test_export_unties_embeddings_that_an_adapter_made_different(
    settings: list[str], are_tied: bool, mini_recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    hw3("train", mini_recipe, "--run", run, *settings, "training.max_steps=4", "lora.lora_dropout=0.0")
    hw3("eval", run)
    before, after = read_perplexities(hw3("export", run)[0])
    assert after == pytest.approx(before, rel=1e-4)
    config = json.loads((tmp_path / "run-export/config.json").read_text(encoding="utf-8"))
    weights = load_file(tmp_path / "run-export/model.safetensors")
    assert config["tie_word_embeddings"] is are_tied
    assert ("lm_head.weight" in weights) is not are_tied
    if not are_tied:
        assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])


def test_export_merges_the_biases_of_an_adapter(mini_recipe: Path, tmp_path: Path) -> None:
    config = LlamaConfig(**TRAINING_SHAPE, attention_bias=True, max_position_embeddings=256)
    base = write_base(tmp_path / "base", config)
    settings = [f"model.pretrained_model_name_or_path={base}", "quantization=null", "training.max_steps=4"]
    settings += ["lora.lora_bias=true", "lora.target_modules=[q_proj, v_proj]"]
    hw3("train", mini_recipe, "--run", tmp_path / "run", *settings)
    hw3("eval", tmp_path / "run")
    before, after = read_perplexities(hw3("export", tmp_path / "run")[0])
    assert after == pytest.approx(before, rel=1e-4)
    adapter = load_file(tmp_path / "run/checkpoint-4/adapter_model.safetensors")
    assert adapter["base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias"].abs().max() > 0.001


@pytest.mark.parametrize("command", ["check", "train"])
def test_adapter_biases_that_cannot_be_merged_are_refused(command: str, mini_recipe: Path, tmp_path: Path) -> None:
    _, stderr = hw3(command, mini_recipe, "--run", tmp_path / "run", "lora.lora_bias=true", expected=2)
    assert (
        "lora.lora_bias: found true, but 14 adapted layers have no bias, so the adapter could not be merged into them: "
        "model.layers.0.self_attn.q_proj is one; set it to false, or adapt only layers with a bias"
    ) in stderr
    assert not (tmp_path / "run").exists()


def test_an_adapter_that_weight_tying_puts_on_the_head_is_refused(mini_recipe: Path, tmp_path: Path) -> None:
    settings = ["lora.target_modules=[q_proj, embed_tokens]", "lora.ensure_weight_tying=true"]
    _, stderr = hw3("train", mini_recipe, "--run", tmp_path / "run", *settings, expected=2)
    assert "lora.ensure_weight_tying: this puts an adapter on the output head, which would never be trained" in stderr
    assert not (tmp_path / "run").exists()


def test_export_of_a_4bit_gpt2_writes_its_own_kind_of_layers(mini_recipe: Path, tmp_path: Path) -> None:
    """4-bit layers are linear, but GPT-2 stores the transposed weights of `Conv1D` layers."""
    base = write_base(tmp_path / "base", OTHER_ARCHITECTURES["gpt2"][0])
    settings = [f"model.pretrained_model_name_or_path={base}", "lora.target_modules=[c_attn]", "training.max_steps=4"]
    hw3("train", mini_recipe, "--run", tmp_path / "run", *settings)
    hw3("eval", tmp_path / "run")
    before, after = read_perplexities(hw3("export", tmp_path / "run")[0])
    assert after == pytest.approx(before, rel=1e-4)
    weights = load_file(tmp_path / "run-export/model.safetensors")
    assert weights["transformer.h.0.attn.c_attn.weight"].shape == (64, 192)


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
