"""`hw3 train` on a small Gemma-2: equality of batch layouts, and of uninterrupted and resumed runs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hw3.common.errors import UserError
from hw3.config.recipe import load_recipe
from hw3.runs.checkpoints import find_complete_checkpoints, mark_complete
from hw3.runs.manifest import BatchLayoutRecord
from hw3.runs.run import Run
from hw3.training.train import train
from hw3.training.trainer import CompletionTrainer


def train_run(recipe_path: Path, run_dir: Path, *overrides: str) -> list[dict[str, Any]]:
    """Train in this process; return the log lines of the last checkpoint."""
    assert train(load_recipe(recipe_path, list(overrides)), run_dir) == 0
    state = json.loads((find_complete_checkpoints(run_dir)[-1].path / "trainer_state.json").read_text(encoding="utf-8"))
    return [log for log in state["log_history"] if "loss" in log]


def load_last_adapter(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(find_complete_checkpoints(run_dir)[-1].path / "adapter_model.safetensors")


def test_train_gives_the_same_run_under_every_batch_layout(mini_recipe: Path, tmp_path: Path) -> None:
    """1 x 8, 2 x 4 and 8 x 1 rows have equal losses to 1e-5 and equal weights to 1e-6."""
    results = {}
    for rows in (1, 2, 8):
        layout = [
            f"training.per_device_train_batch_size={rows}",
            f"training.gradient_accumulation_steps={8 // rows}",
            "lora.lora_dropout=0.0",
            "training.logging_steps=1",
            "training.learning_rate=0.001",
        ]
        run_dir = tmp_path / f"run-{rows}"
        results[rows] = (train_run(mini_recipe, run_dir, *layout), load_last_adapter(run_dir))
    losses, weights = results[8]
    assert len(losses) == 12
    assert all(tensor.any() for tensor in weights.values())
    for rows in (1, 2):
        other_losses, other_weights = results[rows]
        for log, other in zip(losses, other_losses, strict=True):
            assert other["loss"] == pytest.approx(log["loss"], abs=1e-5)
            assert other["num_tokens"] == log["num_tokens"]
        for name, tensor in weights.items():
            assert torch.allclose(other_weights[name], tensor, rtol=0, atol=1e-6), name


@pytest.mark.parametrize(
    "options",
    [[], ["quantization=null"], ["lora.trainable_token_indices=[5, 9]"]],
    ids=["nf4", "float32", "trained tokens"],
)
def test_resumed_run_is_bitwise_the_uninterrupted_run(mini_recipe: Path, tmp_path: Path, options: list[str]) -> None:
    """The run is stopped between two log lines. Adapter, optimizer, generators, losses and token counts are equal."""
    straight = train_run(mini_recipe, tmp_path / "straight", *options)
    train_run(mini_recipe, tmp_path / "resumed", *options, "training.max_steps=8")
    resumed = train_run(mini_recipe, tmp_path / "resumed", *options)
    timeless = without_times(straight)
    assert [log["step"] for log in timeless] == [3, 6, 9, 12]
    assert without_times(resumed) == timeless
    last, other = (find_complete_checkpoints(tmp_path / name)[-1].path for name in ("straight", "resumed"))
    for name in ("adapter_model.safetensors",):
        assert (last / name).read_bytes() == (other / name).read_bytes()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert_equal(*(torch.load(folder / name, weights_only=False) for folder in (last, other)))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("adapter_model.safetensors", "bit"),
        ("optimizer.pt", "bit"),
        ("rng_state.pth", "zeros"),
        ("scheduler.pt", "zeros"),
        ("trainer_state.json", "zeros"),
    ],
)
def test_train_resumes_from_the_checkpoint_before_a_damaged_one(
    mini_recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    run = Run(tmp_path / "run")
    train_run(mini_recipe, run.path, "training.max_steps=8")
    weights = (run.path / "checkpoint-8/adapter_model.safetensors").read_bytes()
    file = run.path / "checkpoint-8" / name
    content = file.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    file.write_bytes(flipped if damage == "bit" else bytes(len(content)))
    with caplog.at_level("INFO"):
        train_run(mini_recipe, run.path, "training.max_steps=8")
    assert f"{run}/checkpoint-8: {name}: damaged, so the checkpoint before it is used" in caplog.text
    assert f"resuming {run} from step 4 of 8" in caplog.text
    assert (run.path / "checkpoint-8/adapter_model.safetensors").read_bytes() == weights
    assert all(not checkpoint.find_damaged_files() for checkpoint in run.complete_checkpoints())


def test_train_saves_a_tokenizer_with_several_chat_templates(
    mini_base: Path, mini_recipe: Path, tmp_path: Path
) -> None:
    """All but the default one are in a folder of their own. A resumed run writes the same files again."""
    base = shutil.copytree(mini_base, tmp_path / "templates")
    (base / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}", encoding="utf-8")
    run = Run(tmp_path / "run")
    for steps in (1, 2):
        overrides = [f"model.pretrained_model_name_or_path={base}", f"training.max_steps={steps}"]
        train_run(mini_recipe, run.path, *overrides)
        tokenizer = run.load_tokenizer(load_recipe(mini_recipe, overrides))
        assert tokenizer.chat_template == {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    assert not (run.path / ".tokenizer").exists()


def test_train_removes_a_damaged_checkpoint_that_it_does_not_write_again(
    mini_recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The run ended at step 6, and is resumed to step 8 with a checkpoint at every fourth step."""
    run = Run(tmp_path / "run")
    train_run(mini_recipe, run.path, "training.max_steps=6")
    file = run.path / "checkpoint-6/trainer_state.json"
    file.write_bytes(bytes(file.stat().st_size))
    with caplog.at_level("INFO"):
        train_run(mini_recipe, run.path, "training.max_steps=8")
    assert f"{run}/checkpoint-6: damaged, removed" in caplog.text
    assert [checkpoint.step for checkpoint in run.complete_checkpoints()] == [4, 8]
    assert all(not checkpoint.find_damaged_files() for checkpoint in run.complete_checkpoints())


def test_train_continues_with_half_the_rows_after_a_step_ran_out_of_memory(
    mini_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = [
        "training.per_device_train_batch_size=8",
        "training.gradient_accumulation_steps=1",
        "lora.lora_dropout=0",
    ]
    straight = train_run(mini_recipe, tmp_path / "straight", *options)
    training_step = CompletionTrainer.training_step

    def run_out_of_memory(trainer: CompletionTrainer, model: Any, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        if trainer.state.global_step >= 6 and len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return training_step(trainer, model, inputs, *args)

    monkeypatch.setattr(CompletionTrainer, "training_step", run_out_of_memory)
    run = Run(tmp_path / "run")
    with caplog.at_level("INFO"):
        losses = train_run(mini_recipe, run.path, *options)
    for before, after in (("8 rows x 1", "4 x 2"), ("4 rows x 2", "2 x 4")):
        assert (
            f"out of memory with {before}; continuing with {after}: the same loss over the step's tokens" in caplog.text
        )
    assert caplog.text.count(f"resuming {run} from step 4 of 12") == 2
    manifest = run.read_manifest()
    assert manifest is not None and manifest.layout == BatchLayoutRecord(processes=1, rows_per_device=2, accumulation=4)
    assert [log["loss"] for log in losses] == pytest.approx([log["loss"] for log in straight], abs=1e-5)


def test_train_ends_if_one_row_runs_out_of_memory(
    mini_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out_of_memory(*args: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(CompletionTrainer, "training_step", run_out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        train_run(
            mini_recipe,
            tmp_path / "run",
            "training.per_device_train_batch_size=3",
            "training.gradient_accumulation_steps=1",
        )


def test_train_refuses_a_run_whose_checkpoints_are_all_damaged(mini_recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_run(mini_recipe, run, "training.max_steps=4")
    (run / "checkpoint-4/optimizer.pt").write_bytes(bytes((run / "checkpoint-4/optimizer.pt").stat().st_size))
    with pytest.raises(UserError, match="no checkpoint has its optimizer state undamaged; start a new run"):
        train(load_recipe(mini_recipe), run)


def test_train_reports_that_a_run_is_resumed_with_other_software(
    mini_recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path / "run")
    train_run(mini_recipe, run.path, "training.max_steps=4")
    manifest = run.read_manifest()
    assert manifest is not None and manifest.speed.tokens_per_replay == 0
    manifest.versions["torch"], manifest.device = "2.9.1", "Tesla T4"
    manifest.write(run.manifest_path)
    with caplog.at_level("INFO"):
        train_run(mini_recipe, run.path, "training.max_steps=6")
    line = f"weights may differ by rounding: torch 2.9.1 -> {torch.__version__}, device Tesla T4 -> cpu"
    assert line in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        train_run(mini_recipe, run.path, "training.max_steps=8")
    assert "rounding" not in caplog.text


def without_times(logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: log[key] for key in log if "second" not in key and "runtime" not in key} for log in logs]


def assert_equal(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_equal(left, right)
    else:
        assert (one == other) is True or (one == other).all()


@pytest.mark.parametrize("overrides", [["lora=null", "quantization=null"], ["training.bf16=false", "speed=lean"]])
def test_train_reduces_the_loss_under_other_settings(mini_recipe: Path, tmp_path: Path, overrides: list[str]) -> None:
    losses = train_run(mini_recipe, tmp_path / "run", *overrides)
    assert losses[-1]["loss"] < losses[0]["loss"]


def test_checkpoint_that_cannot_be_completed_ends_the_run(
    mini_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread's error is raised at one of the next steps, and the checkpoint before stays complete."""

    def fail_on_full_disk(checkpoint: Path, step: int) -> None:
        if step == 2:
            raise OSError(28, "No space left on device")
        mark_complete(checkpoint, step)

    monkeypatch.setattr("hw3.training.callbacks.mark_complete", fail_on_full_disk)
    with pytest.raises(OSError, match="No space left"):
        train(load_recipe(mini_recipe, ["training.save_steps=1", "training.max_steps=40"]), tmp_path / "run")
    assert [checkpoint.step for checkpoint in find_complete_checkpoints(tmp_path / "run")] == [1]
    assert not (tmp_path / "run/checkpoint-4").exists()
