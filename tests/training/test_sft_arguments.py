"""TRL's arguments, and the number of steps and the disk space that follow from them."""

from pathlib import Path

import pytest
from trl import SFTConfig

from hw3.config.recipe import load_recipe
from hw3.training.batch_layout import divide_batch
from hw3.training.sft_arguments import (
    PROCESS_TIMEOUT_SECONDS,
    build_sft_config,
    count_optimizer_steps,
    estimate_checkpoint_bytes,
)
from hw3.training.step_strategy import StepStrategy


def build_config(recipe_path: Path, run_dir: Path, *overrides: str) -> SFTConfig:
    recipe = load_recipe(recipe_path, list(overrides))
    strategy = StepStrategy(divide_batch(recipe, 1), False, False, False, recipe.training["optim"])
    return build_sft_config(recipe, strategy, run_dir)


@pytest.mark.parametrize(("overrides", "seconds"), [([], 600), (["training.ddp_timeout=60"], 60)])
def test_process_timeout_outlasts_a_slow_disk(
    mini_recipe: Path, tmp_path: Path, overrides: list[str], seconds: int
) -> None:
    assert PROCESS_TIMEOUT_SECONDS == 600
    assert build_config(mini_recipe, tmp_path / "run", *overrides).ddp_timeout == seconds


def test_count_optimizer_steps_leaves_out_rows_that_do_not_fill_a_step(mini_recipe: Path, tmp_path: Path) -> None:
    config = build_config(mini_recipe, tmp_path / "run", "training.max_steps=-1", "training.num_train_epochs=2")
    assert count_optimizer_steps(config, rows=44, rows_per_step=8) == 10
    assert count_optimizer_steps(build_config(mini_recipe, tmp_path / "run"), rows=44, rows_per_step=8) == 12


def test_estimate_checkpoint_bytes_counts_optimizer_state_of_the_newest_checkpoints(
    mini_recipe: Path, tmp_path: Path
) -> None:
    """Ten checkpoints of 4 bytes per parameter; three hold 8 more while the newest is written."""
    config = build_config(mini_recipe, tmp_path / "run")  # saves every 4 steps
    assert estimate_checkpoint_bytes(config, None, 1000, steps=40, steps_per_epoch=5) == 1000 * (4 * 10 + 8 * 3)
    assert estimate_checkpoint_bytes(config, 1, 1000, steps=40, steps_per_epoch=5) == 1000 * (4 * 2 + 8 * 2)
