"""Every command on bases of other architectures, and bases whose tokenizer or positions do not fit the model."""

import json
from pathlib import Path

import pytest
import torch
from helpers import CHARACTERS, character_tokenizer, compute_row_perplexity, hw3
from tiny_models import OTHER_ARCHITECTURES, write_base
from transformers import AutoModelForCausalLM, Gemma3Config, LlamaConfig

from hw3.config.recipe import load_recipe
from hw3.data.rows import read_rows
from hw3.data.tokenization import Encoder

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in OTHER_ARCHITECTURES if name not in ("gpt2", "granite")]


@pytest.mark.parametrize("name", ["gpt2", "granite", *SLOW])
def test_every_command_works_with_other_architectures(name: str, mini_recipe: Path, tmp_path: Path) -> None:
    """The scores are those of the exported model's own logits, and training has lowered them."""
    config, target_modules = OTHER_ARCHITECTURES[name]
    base, run = write_base(tmp_path / "base", config), tmp_path / "run"
    settings = [
        f"model.pretrained_model_name_or_path={base}", "quantization=null", f"lora.target_modules={target_modules}",
        "training.max_steps=8",
    ]  # fmt: skip
    hw3("check", mini_recipe, "--run", run, *settings)
    hw3("train", mini_recipe, "--run", run, *settings)
    hw3("eval", run)
    hw3("predict", run, "--output", tmp_path / "predictions.json")
    hw3("export", run, "--checkpoint", "8")
    scores = {
        entry["step"]: entry["mean_perplexity"]
        for entry in json.loads((run / "eval/eval/results.json").read_text(encoding="utf-8"))["entries"]
    }
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run-export", dtype=torch.float32).eval()
    encoder = Encoder(character_tokenizer(), load_recipe(mini_recipe).prompt)
    rows = [encoder.encode(row) for row in read_rows(tmp_path / "eval.json")]
    perplexities = [compute_row_perplexity(model, row) for row in rows]
    assert scores[8] == pytest.approx(sum(perplexities) / len(rows), rel=1e-4)
    assert scores[8] < scores[0]
    assert len(json.loads((tmp_path / "predictions.json").read_text(encoding="utf-8"))) == len(rows)


@pytest.mark.parametrize("kind", ["pad", "eos", "bos", "row"])
def test_a_token_without_an_embedding_is_refused_by_every_command(kind: str, mini_recipe: Path, tmp_path: Path) -> None:
    """The last character has no embedding. It is one of the special tokens, or in the first row of each file."""
    size, run, token = 3 + len(CHARACTERS), tmp_path / "run", CHARACTERS[-1]
    config = LlamaConfig(
        vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    base, tokenizer = write_base(tmp_path / "base", config), character_tokenizer()
    if kind == "row":
        place = f"row 1 (id row-0): the token {token}"
        for name in ("train", "eval"):
            rows = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
            rows[0] |= {"id": "row-0", "instruction": token}
            (tmp_path / f"{name}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    else:
        place = f"the {'padding' if kind == 'pad' else kind.upper()} token {token}"
        setattr(tokenizer, f"{kind}_token", token)
        tokenizer.save_pretrained(base)
    settings = [f"model.pretrained_model_name_or_path={base}", "quantization=null"]
    message = f"{place} has the id {size}, but the model has embeddings for ids 0 to {size - 1} only"
    for command in ("check", "train"):
        assert message in hw3(command, mini_recipe, "--run", run, *settings, expected=2)[1]
        assert not run.exists()
    run.mkdir()
    (run / "recipe.yaml").write_text(load_recipe(mini_recipe, settings).to_yaml(), encoding="utf-8")
    for command in (["eval", run, "--base-only"], ["predict", run, "--checkpoint", "base"]):
        assert message in hw3(*command, expected=2)[1]
    assert [path.name for path in run.iterdir()] == ["recipe.yaml"]


def test_rows_longer_than_the_position_embeddings_are_refused(mini_recipe: Path, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", OTHER_ARCHITECTURES["gpt2"][0])
    rows = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))
    rows[3]["output"] = "天" * 96
    (tmp_path / "eval.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    settings = [f"model.pretrained_model_name_or_path={base}", "quantization=null", "lora.target_modules=[c_attn]"]
    for command in ("check", "train"):
        _, stderr = hw3(command, mini_recipe, "--run", tmp_path / "run", *settings, expected=2)
        assert "eval.json: row 4 (id row-103): " in stderr and "the model takes 96" in stderr
    assert not (tmp_path / "run").exists()


def test_models_of_more_than_text_are_refused_by_name(mini_recipe: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    Gemma3Config().save_pretrained(base)
    character_tokenizer().save_pretrained(base)
    message = "base: gemma3 takes more than text; use a model of text only, such as one of type gemma3_text"
    for command in ("check", "train"):
        settings = [f"model.pretrained_model_name_or_path={base}", "quantization=null"]
        assert message in hw3(command, mini_recipe, "--run", tmp_path / "run", *settings, expected=2)[1]
