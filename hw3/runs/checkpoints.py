"""Complete checkpoints: write the record that makes one complete, find them, delete old ones.

`COMPLETE.json` is written last. A process that is killed while it saves leaves a folder without a valid record, which
counts as incomplete, and the checkpoint before it is still complete.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from hw3.common.errors import UserError
from hw3.common.hashing import file_sha256
from hw3.common.paths import portable_path
from hw3.modeling.fingerprint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, combine_weight_hashes
from hw3.runs.file_model import FileModel

MANIFEST_FILE = "manifest.json"
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
COMPLETE_FILE = "COMPLETE.json"
TRAINER_STATE_FILE = "trainer_state.json"
# Files that only a resumed run reads: optimizer, scheduler, RNG state. FSDP and DeepSpeed have their own files.
RESUME_FILE_PATTERN = re.compile(
    r"trainer_accumulators\.json|optimizer\.pt|scheduler\.pt|scaler\.pt|rng_state.*\.pth"
    r"|optimizer\.bin|pytorch_model_fsdp\.bin|latest|global_step\d+/.*"
)
CHECKPOINTS_WITH_OPTIMIZER_STATE = 2  # the newest complete ones


class FileRecord(FileModel):
    """Size in bytes and hash of a file."""

    size: int
    sha256: str


class CheckpointRecord(FileModel):
    """`COMPLETE.json`: the files of a complete checkpoint.

    Attributes:
        step: optimizer steps.
        files: files that scoring and prediction need, by path within the checkpoint.
        resume_files: files that only a resumed run needs. They are deleted from older checkpoints.
    """

    schema_version: Literal[1] = Field(1, alias="schema")
    step: int
    files: dict[str, FileRecord]
    resume_files: dict[str, FileRecord]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        step: optimizer steps.
        path: its folder.
        sha256: hash of the adapter's, or the model's, configuration and weights.
        resumable: whether optimizer, scheduler and RNG state are there.
        name: the folder's name; the path of an adapter that is not part of the run.
    """

    step: int
    path: Path
    sha256: str
    resumable: bool
    name: str

    @property
    def is_adapter(self) -> bool:
        """Whether the checkpoint holds an adapter. Otherwise it holds all weights of the model."""
        return (self.path / ADAPTER_CONFIG).exists()

    def trainer_state(self) -> dict[str, Any]:
        """Return the Trainer's state, as transformers saved it."""
        return json.loads((self.path / TRAINER_STATE_FILE).read_text(encoding="utf-8"))

    def record(self) -> CheckpointRecord:
        """Return the record that makes the checkpoint complete."""
        return CheckpointRecord.read(self.path / COMPLETE_FILE)


def mark_complete(checkpoint: Path, step: int) -> None:
    """Write `COMPLETE.json` with the sizes and checksums of all files in the folder."""
    files = {
        file.relative_to(checkpoint).as_posix(): FileRecord(size=file.stat().st_size, sha256=file_sha256(file))
        for file in sorted(checkpoint.rglob("*"))
        if file.is_file() and file.name != COMPLETE_FILE and not file.name.startswith(".")
    }
    CheckpointRecord(
        step=step,
        files={name: record for name, record in files.items() if not RESUME_FILE_PATTERN.fullmatch(name)},
        resume_files={name: record for name, record in files.items() if RESUME_FILE_PATTERN.fullmatch(name)},
    ).write(checkpoint / COMPLETE_FILE)


def find_complete_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """Return the complete checkpoints of a run folder, by step.

    A checkpoint whose files do not have the recorded sizes is not complete.
    """
    found = []
    for folder in run_dir.glob("checkpoint-*"):
        try:
            record = CheckpointRecord.read(folder / COMPLETE_FILE)
        except (OSError, UserError):
            continue
        if _sizes_match(folder, record.files):
            resumable = bool(record.resume_files) and _sizes_match(folder, record.resume_files)
            sha256 = combine_weight_hashes({name: file.sha256 for name, file in record.files.items()})
            found.append(Checkpoint(record.step, folder, sha256, resumable, folder.name))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def find_incomplete_checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoint folders that were not written to the end."""
    complete = {checkpoint.path for checkpoint in find_complete_checkpoints(run_dir)}
    folders = (folder for folder in run_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name))
    return sorted(folder for folder in folders if folder.is_dir() and folder not in complete)


def external_adapter(folder: Path) -> Checkpoint:
    """Return any PEFT adapter folder as a checkpoint, so that it can be scored like those of the run.

    Raises:
        UserError: the folder holds no adapter in safetensors format.
    """
    check_adapter_folder(folder)
    sha256 = combine_weight_hashes({name: file_sha256(folder / name) for name in ADAPTER_FILES})
    return Checkpoint(0, folder, sha256, False, portable_path(folder))


def check_adapter_folder(folder: Path) -> None:
    """Check that a folder holds the files of a PEFT adapter.

    Raises:
        UserError: the folder holds no adapter in safetensors format.
    """
    missing = [name for name in ADAPTER_FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: not a PEFT adapter: {' and '.join(missing)} missing")


def remove_incomplete_checkpoints(run_dir: Path) -> list[Path]:
    """Delete the incomplete checkpoints of a run folder and return their paths.

    Raises:
        UserError: the folder has no manifest, so another program wrote its checkpoints.
    """
    incomplete = find_incomplete_checkpoints(run_dir)
    if incomplete and not (run_dir / MANIFEST_FILE).is_file():
        raise UserError(
            f"{run_dir}: {incomplete[0].name} was not written by this project; use another folder: --run DIR "
            "(make: RUN=DIR)"
        )
    for folder in incomplete:
        shutil.rmtree(folder)
    return incomplete


def prune_checkpoints(run_dir: Path, limit: int) -> None:
    """Delete the oldest complete checkpoints, by step, until `limit` are left."""
    for checkpoint in find_complete_checkpoints(run_dir)[:-limit]:
        # The record goes first: a kill in between leaves an incomplete folder, not a checkpoint without weights.
        (checkpoint.path / COMPLETE_FILE).unlink()
        shutil.rmtree(checkpoint.path)


def prune_optimizer_state(run_dir: Path) -> None:
    """Delete the resume files of all but the newest `CHECKPOINTS_WITH_OPTIMIZER_STATE` checkpoints."""
    resumable = [checkpoint for checkpoint in find_complete_checkpoints(run_dir) if checkpoint.resumable]
    for checkpoint in resumable[:-CHECKPOINTS_WITH_OPTIMIZER_STATE]:
        for file in list(checkpoint.path.rglob("*")):
            if RESUME_FILE_PATTERN.fullmatch(file.relative_to(checkpoint.path).as_posix()):
                file.unlink()
        for folder in checkpoint.path.glob("global_step*"):
            folder.rmdir()


def _sizes_match(folder: Path, files: dict[str, FileRecord]) -> bool:
    try:
        return all((folder / name).stat().st_size == record.size for name, record in files.items())
    except OSError:
        return False
