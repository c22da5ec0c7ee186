"""Checkpoints are complete only with a valid record, and old ones lose their optimizer state first."""

from pathlib import Path

import pytest

from hw3.common.errors import UserError
from hw3.runs.checkpoints import (
    RESUME_FILE_PATTERN,
    external_adapter,
    find_complete_checkpoints,
    find_incomplete_checkpoints,
    mark_complete,
    prune_checkpoints,
    prune_optimizer_state,
    remove_incomplete_checkpoints,
)

WEIGHT_FILES = ("adapter_config.json", "adapter_model.safetensors")


def write_checkpoint(run_dir: Path, step: int, *files: str) -> Path:
    """Write a complete checkpoint with the given files."""
    folder = run_dir / f"checkpoint-{step}"
    for name in files or (*WEIGHT_FILES, "trainer_state.json", "optimizer.pt", "global_step4/x_optim_states.pt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name} of step {step}")
    mark_complete(folder, step)
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "trainer_accumulators.json",
        "optimizer.pt",
        "scheduler.pt",
        "scaler.pt",
        "rng_state.pth",
        "rng_state_0.pth",
        "optimizer.bin",
        "pytorch_model_fsdp.bin",
        "latest",
        "global_step12/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    ],
)
def test_resume_file_matches_files_that_only_a_resumed_run_reads(name: str) -> None:
    assert RESUME_FILE_PATTERN.fullmatch(name)


@pytest.mark.parametrize(
    "name",
    [
        "adapter_model.safetensors",
        "adapter_config.json",
        "model-00001-of-00002.safetensors",
        "config.json",
        "trainer_state.json",
        "training_args.bin",
        "other/optimizer.pt",
        "optimizer.pt.old",
        "latest.json",
        "global_step12",
    ],
)
def test_resume_file_matches_no_other_file(name: str) -> None:
    assert not RESUME_FILE_PATTERN.fullmatch(name)


def test_find_complete_checkpoints_sorts_by_step_and_needs_a_valid_record(tmp_path: Path) -> None:
    for step in (100, 20):
        write_checkpoint(tmp_path, step)
    (write_checkpoint(tmp_path, 30) / "COMPLETE.json").unlink()
    (write_checkpoint(tmp_path, 40) / "COMPLETE.json").write_text("{")
    (write_checkpoint(tmp_path, 50) / "adapter_model.safetensors").write_text("cut")
    assert [(checkpoint.step, checkpoint.name) for checkpoint in find_complete_checkpoints(tmp_path)] == [
        (20, "checkpoint-20"),
        (100, "checkpoint-100"),
    ]
    assert [folder.name for folder in find_incomplete_checkpoints(tmp_path)] == [
        "checkpoint-30",
        "checkpoint-40",
        "checkpoint-50",
    ]


def test_checkpoint_is_not_resumable_without_all_resume_files(tmp_path: Path) -> None:
    (write_checkpoint(tmp_path, 10) / "optimizer.pt").unlink()
    write_checkpoint(tmp_path, 20, *WEIGHT_FILES)
    write_checkpoint(tmp_path, 30)
    assert [checkpoint.resumable for checkpoint in find_complete_checkpoints(tmp_path)] == [False, False, True]


def test_record_separates_files_for_inference_from_resume_files(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 10)
    (checkpoint,) = find_complete_checkpoints(tmp_path)
    record = checkpoint.record()
    assert record.step == 10
    assert list(record.files) == [*WEIGHT_FILES, "trainer_state.json"]
    assert list(record.resume_files) == ["global_step4/x_optim_states.pt", "optimizer.pt"]
    assert record.files["adapter_config.json"].size == len("adapter_config.json of step 10")


def test_checkpoint_hash_depends_only_on_weights_and_adapter_configuration(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 10)
    before = find_complete_checkpoints(tmp_path)[0].sha256
    (folder / "trainer_state.json").write_text("{}")
    mark_complete(folder, 10)
    assert find_complete_checkpoints(tmp_path)[0].sha256 == before == external_adapter(folder).sha256
    (folder / "adapter_model.safetensors").write_text("other")
    mark_complete(folder, 10)
    assert find_complete_checkpoints(tmp_path)[0].sha256 != before


def test_external_adapter_refuses_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"not a PEFT adapter: adapter_model\.safetensors missing"):
        external_adapter(tmp_path)


def test_prune_checkpoints_deletes_the_oldest_by_step(tmp_path: Path) -> None:
    for step in (100, 20, 30):
        write_checkpoint(tmp_path, step)
    prune_checkpoints(tmp_path, 2)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-30"]


def test_prune_optimizer_state_leaves_that_of_the_last_two_checkpoints(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write_checkpoint(tmp_path, step)
    prune_optimizer_state(tmp_path)
    assert [checkpoint.resumable for checkpoint in find_complete_checkpoints(tmp_path)] == [False, True, True]
    assert sorted(file.name for file in (tmp_path / "checkpoint-10").iterdir()) == [
        "COMPLETE.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "trainer_state.json",
    ]


def test_remove_incomplete_checkpoints_deletes_only_those_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-10").mkdir()
    with pytest.raises(UserError, match="checkpoint-10 was not written by this project"):
        remove_incomplete_checkpoints(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "checkpoint-best").mkdir()
    complete = write_checkpoint(tmp_path, 20)
    assert remove_incomplete_checkpoints(tmp_path) == [tmp_path / "checkpoint-10"]
    assert complete.exists() and (tmp_path / "checkpoint-best").exists()
