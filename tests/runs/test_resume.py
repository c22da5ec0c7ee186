"""Only a run with the same recipe, content and sharding is resumed."""

from pathlib import Path

import pytest

from hw3.common.errors import UserError
from hw3.config.recipe import Recipe, load_recipe
from hw3.runs.checkpoints import Checkpoint, mark_complete
from hw3.runs.manifest import Manifest
from hw3.runs.resume import check_optimizer_state, check_same_content, check_same_recipe, check_trained_as
from hw3.runs.run import Run


@pytest.fixture
def recipe(mini_recipe: Path) -> Recipe:
    return load_recipe(mini_recipe)


def store_recipe(run: Run, recipe: Recipe) -> None:
    run.path.mkdir()
    run.recipe_path.write_text(recipe.to_yaml(), encoding="utf-8")


def test_check_same_recipe_names_every_differing_key(run: Run, recipe: Recipe, mini_recipe: Path) -> None:
    store_recipe(run, recipe)
    changed = load_recipe(mini_recipe, ["training.learning_rate=0.02", "lora.r=8", "generation.num_beams=2"])
    with pytest.raises(UserError) as error:
        check_same_recipe(run, changed)
    assert error.value.problems == [
        f"{run}: the folder holds a run of another recipe:",
        "lora.r: 4 in the folder, 8 now",
        "training.learning_rate: 0.01 in the folder, 0.02 now",
        f"use another folder for this run: RUN={run}-2 (--run {run}-2)",
    ]


def test_check_same_recipe_lets_saving_logging_speed_and_evaluation_change(
    run: Run, recipe: Recipe, mini_recipe: Path
) -> None:
    store_recipe(run, recipe)
    overrides = ["training.save_steps=2", "training.logging_steps=1", "speed=lean", "evaluation.bootstrap_samples=10"]
    check_same_recipe(run, load_recipe(mini_recipe, [*overrides, "generation.num_beams=2"]))


def test_check_same_recipe_lets_the_length_change_only_under_a_constant_schedule(run: Run, mini_recipe: Path) -> None:
    store_recipe(run, load_recipe(mini_recipe))
    check_same_recipe(run, load_recipe(mini_recipe, ["training.max_steps=16"]))
    linear = "training.lr_scheduler_type=linear"
    run.recipe_path.write_text(load_recipe(mini_recipe, [linear]).to_yaml(), encoding="utf-8")
    with pytest.raises(UserError, match=r"training\.max_steps: 12 in the folder, 16 now"):
        check_same_recipe(run, load_recipe(mini_recipe, [linear, "training.max_steps=16"]))


def test_check_same_content_names_what_changed(run: Run, manifest: Manifest) -> None:
    manifest.write(run.manifest_path)
    content = {"train": "train hash", "base": "base hash", "tokenizer": "tokenizer hash"}
    check_same_content(run, content)
    with pytest.raises(UserError, match=r"^train\.json, the tokenizer of base: changed since .*-2\)$"):
        check_same_content(run, content | {"train": "other", "tokenizer": "other"})


def test_check_trained_as_refuses_another_prompt_or_base_model(run: Run, recipe: Recipe, manifest: Manifest) -> None:
    check_trained_as(run, recipe)  # nothing has been trained
    folder = run.path / "checkpoint-4"
    folder.mkdir(parents=True)
    mark_complete(folder, 4)
    manifest.write(run.manifest_path)
    with pytest.raises(UserError, match="prompt, quantization, base changed since the checkpoints were trained"):
        check_trained_as(run, recipe)
    trained = {"quantization": recipe.quantization.model_dump(), "prompt_sha256": recipe.prompt.sha256}
    base = manifest.base.model_copy(update={"name": recipe.model.pretrained_model_name_or_path})
    manifest.model_copy(update=trained | {"base": base}).write(run.manifest_path)
    check_trained_as(run, recipe)


@pytest.mark.parametrize(
    ("files", "saved", "message"),
    [
        (["optimizer.pt"], (None, 1), "one process, or with ACCELERATE=ddp"),
        (["optimizer.bin"], ("FSDP", 2), "ACCELERATE=fsdp2"),
        ([f"global_step4/{rank}_optim_states.pt" for rank in (0, 1)], ("DeepSpeed", 2), "ACCELERATE=zero3 GPUS=2"),
    ],
)
def test_check_optimizer_state_needs_the_sharding_that_it_was_saved_with(
    tmp_path: Path, files: list[str], saved: tuple[str | None, int], message: str
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    checkpoint = Checkpoint(step=4, path=tmp_path, sha256="", resumable=True, name="checkpoint-4")
    check_optimizer_state(checkpoint, *saved)
    for sharding, processes in ((None, 1), ("FSDP", 2), ("DeepSpeed", 2), ("DeepSpeed", 4)):
        if (sharding, processes) != saved:
            with pytest.raises(UserError, match=f"the optimizer state was saved with {message}; resume in the same"):
                check_optimizer_state(checkpoint, sharding, processes)
