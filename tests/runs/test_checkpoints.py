"""Checkpoints are complete only with a valid record, and old ones lose their optimizer state first."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hw3.common.errors import RunError, UserError
from hw3.runs.checkpoints import (
    RESUME_FILE_PATTERN,
    check_finite_weights,
    external_adapter,
    find_complete_checkpoints,
    find_incomplete_checkpoints,
    mark_complete,
    prune_checkpoints,
    prune_optimizer_state,
    remove_damaged_files,
    remove_incomplete_checkpoints,
    start_checkpoint,
)

WEIGHT_FILES = ("adapter_config.json", "adapter_model.safetensors")


def write_checkpoint(run_dir: Path, step: int, *files: str) -> Path:
    """Write a complete checkpoint with the given files."""
    folder = run_dir / f"checkpoint-{step}"
    for name in files or (*WEIGHT_FILES, "trainer_state.json", "optimizer.pt", "global_step4/x_optim_states.pt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name} of step {step}", encoding="utf-8")
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
    (write_checkpoint(tmp_path, 40) / "COMPLETE.json").write_text("{", encoding="utf-8")
    (write_checkpoint(tmp_path, 50) / "adapter_model.safetensors").write_text("cut", encoding="utf-8")
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
    (folder / "trainer_state.json").write_text("{}", encoding="utf-8")
    mark_complete(folder, 10)
    assert find_complete_checkpoints(tmp_path)[0].sha256 == before == external_adapter(folder).sha256
    (folder / "adapter_model.safetensors").write_text("other", encoding="utf-8")
    mark_complete(folder, 10)
    assert find_complete_checkpoints(tmp_path)[0].sha256 != before


def test_external_adapter_refuses_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
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


def test_remove_incomplete_checkpoints_deletes_only_what_this_project_wrote(tmp_path: Path) -> None:
    complete = write_checkpoint(tmp_path, 20)
    start_checkpoint(tmp_path / "checkpoint-10")
    (write_checkpoint(tmp_path, 30) / "COMPLETE.json").write_text("", encoding="utf-8")
    (tmp_path / "checkpoint-40").mkdir()
    for name in ("checkpoint-best", "checkpoint-20-backup"):
        shutil.copytree(complete, tmp_path / name)
    other = tmp_path / "checkpoint-50"
    other.mkdir()
    (other / "weights.pt").touch()
    with pytest.raises(UserError, match="checkpoint-50: was not written by this project"):
        remove_incomplete_checkpoints(tmp_path)
    assert len(list(tmp_path.iterdir())) == 7
    (other / "weights.pt").rename(tmp_path / "weights.pt")
    removed = remove_incomplete_checkpoints(tmp_path)
    assert [folder.name for folder in removed] == ["checkpoint-10", "checkpoint-30", "checkpoint-40", "checkpoint-50"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-20",
        "checkpoint-20-backup",
        "checkpoint-best",
        "weights.pt",
    ]


def test_copies_and_links_of_checkpoints_are_not_pruned(tmp_path: Path) -> None:
    elsewhere = write_checkpoint(tmp_path / "elsewhere", 10)
    run = tmp_path / "run"
    for step in (20, 30, 40):
        write_checkpoint(run, step)
    shutil.copytree(run / "checkpoint-20", run / "checkpoint-20-backup")
    (run / "checkpoint-10").symlink_to(elsewhere)
    assert [checkpoint.step for checkpoint in find_complete_checkpoints(run)] == [10, 20, 30, 40]
    prune_optimizer_state(run)
    prune_checkpoints(run, 1)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-10", "checkpoint-20-backup", "checkpoint-40"]
    for folder in (elsewhere, run / "checkpoint-20-backup"):
        assert (folder / "COMPLETE.json").exists() and (folder / "optimizer.pt").exists()


def test_start_checkpoint_replaces_only_what_this_project_wrote(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 10)
    start_checkpoint(folder)
    assert [path.name for path in folder.iterdir()] == [".incomplete"]
    (folder / ".incomplete").unlink()
    (folder / "weights.pt").touch()
    with pytest.raises(RunError, match="checkpoint-10: was not written by this project, so it is not replaced"):
        start_checkpoint(folder)


@pytest.mark.parametrize("step", [10, 20])
def test_mark_complete_ends_a_started_checkpoint(tmp_path: Path, step: int) -> None:
    folder = tmp_path / f"checkpoint-{step}"
    start_checkpoint(folder)
    (folder / "adapter_model.safetensors").touch()
    assert find_complete_checkpoints(tmp_path) == []
    mark_complete(folder, step)
    assert not (folder / ".incomplete").exists()
    (checkpoint,) = find_complete_checkpoints(tmp_path)
    assert checkpoint.step == step and list(checkpoint.record().files) == ["adapter_model.safetensors"]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_find_damaged_files_names_a_file_with_one_other_bit(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path, 10)
    (checkpoint,) = find_complete_checkpoints(tmp_path)
    assert checkpoint.find_damaged_files() == []
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert checkpoint.find_damaged_files() == [name]
    (folder / name).unlink()
    assert checkpoint.find_damaged_files() == [name]


def test_remove_damaged_files_deletes_what_a_resumed_run_does_not_write_again(tmp_path: Path) -> None:
    """Checkpoints 4 and 9 cannot be resumed; of 7 only that is damaged which a resumed run reads; 8 is intact."""
    damaged = {4: "trainer_state.json", 5: "trainer_state.json", 6: "adapter_model.safetensors", 7: "optimizer.pt"}
    for step in range(4, 10):
        folder = write_checkpoint(tmp_path, step)
        if step in damaged:
            file = folder / damaged[step]
            file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    (tmp_path / "checkpoint-9/optimizer.pt").unlink()
    removed = remove_damaged_files(tmp_path, after=4)
    assert removed == [tmp_path / name for name in ("checkpoint-5", "checkpoint-6", "checkpoint-7/optimizer.pt")]
    left = find_complete_checkpoints(tmp_path)
    assert [(checkpoint.step, checkpoint.resumable) for checkpoint in left] == [
        (4, True),
        (7, False),
        (8, True),
        (9, False),
    ]
    assert sorted(path.name for path in (tmp_path / "checkpoint-7").iterdir()) == [
        "COMPLETE.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "trainer_state.json",
    ]
    assert remove_damaged_files(tmp_path, after=4) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_check_finite_weights_refuses_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    weights = {"a": torch.zeros(3), "b": torch.ones(2, 2)}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    check_finite_weights(tmp_path, 7)
    weights["b"][1, 0] = value
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(RunError, match="b is NaN or infinite after step 7"):
        check_finite_weights(tmp_path, 7)
