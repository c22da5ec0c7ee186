"""What the launcher shards the model with, and what is refused under it."""

from pathlib import Path

import pytest
from helpers import REPOSITORY

from hw3.common.errors import UserError
from hw3.config.recipe import load_recipe
from hw3.training.plan import plan_run
from hw3.training.sharding import Sharding, find_sharding_problems, sharding_from_env, sharding_from_file


def test_sharding_from_env_reads_accelerates_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sharding_from_env() is None
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert sharding_from_env() == "DeepSpeed"


def test_sharding_from_file_reads_accelerates_files(tmp_path: Path) -> None:
    files = {file.stem: sharding_from_file(file) for file in (REPOSITORY / "accelerate_configs").glob("*.yaml")}
    assert files == {"cpu2": None, "ddp": None, "multi_node": None, "fsdp2": "FSDP", "zero3": "DeepSpeed"}
    (tmp_path / "a.yaml").write_text("- a", encoding="utf-8")
    with pytest.raises(UserError, match="expected an accelerate configuration file"):
        sharding_from_file(tmp_path / "a.yaml")


def test_settings_that_cannot_be_sharded_are_refused_together(
    mini_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hw3.training.sharding.find_spec", lambda name: None)
    overrides = ["training.optim=paged_adamw_8bit", "model.dtype=bfloat16", "evaluation.during_training=true"]
    recipe = load_recipe(mini_recipe, overrides)
    with pytest.raises(UserError) as refused:
        plan_run(recipe, tmp_path / "run", 2, "DeepSpeed")
    shown = "\n".join(refused.value.problems)
    assert 'SET="quantization.bnb_4bit_quant_storage=bfloat16"' in shown
    assert "found paged_adamw_8bit; the optimizers of bitsandbytes do not support sharded parameters" in shown
    assert 'use SET="training.optim=adamw_torch_fused"' in shown
    assert "evaluation.during_training: DeepSpeed shards the model" in shown
    assert "DeepSpeed is not installed; install it: pip install" in shown
    assert "model.dtype: found bfloat16; DeepSpeed computes in the dtype of the weights" in shown
    assert 'SET="model.dtype=float32"' in shown


@pytest.mark.parametrize("sharding", ["FSDP", "DeepSpeed"])
def test_float16_is_not_sharded(mini_recipe: Path, sharding: Sharding) -> None:
    problems = find_sharding_problems(load_recipe(mini_recipe, ["model.dtype=float16"]), sharding)
    assert problems == [f"model.dtype: found float16, which {sharding} cannot shard; use ACCELERATE=ddp, or float32"]
