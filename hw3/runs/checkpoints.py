"""Complete checkpoints: write the record that makes one complete, find them, delete old ones.

`COMPLETE.json` is written last. A process that is killed while it saves leaves a folder without a valid record, which
counts as incomplete, and the checkpoint before it is still complete.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from safetensors import safe_open

from hw3.common.atomic_io import flush, flush_folder
from hw3.common.errors import RunError, UserError
from hw3.common.hashing import file_sha256
from hw3.common.paths import portable_path
from hw3.modeling.fingerprint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, combine_weight_hashes, hash_adapter_config
from hw3.runs.file_model import FileModel

MANIFEST_FILE = "manifest.json"
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
COMPLETE_FILE = "COMPLETE.json"
INCOMPLETE_MARKER = ".incomplete"  # in a checkpoint's folder while it is written or deleted
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
        """Return the Trainer's state, as transformers saved it.

        Raises:
            UserError: the file was changed since.
        """
        path = self.path / TRAINER_STATE_FILE
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != self.record().files[TRAINER_STATE_FILE].sha256:
            raise UserError(f"{path}: does not have its recorded checksum; train again: the damaged files are replaced")
        return json.loads(content)

    def record(self) -> CheckpointRecord:
        """Return the record that makes the checkpoint complete."""
        return CheckpointRecord.read(self.path / COMPLETE_FILE)

    def find_damaged_files(self, *, only_weights: bool = False) -> list[str]:
        """Read the checkpoint, and return the names of the files that do not have their recorded checksums.

        Args:
            only_weights: leave out the files that only a resumed run reads.
        """
        record = self.record()
        return [
            name
            for name, file in (record.files | ({} if only_weights else record.resume_files)).items()
            if not (self.path / name).is_file() or file_sha256(self.path / name) != file.sha256
        ]


def start_checkpoint(folder: Path) -> None:
    """Create an empty folder for a checkpoint, in place of one that an earlier session has written.

    Raises:
        RunError: another program has written the folder.
    """
    if folder.exists():
        if not _is_own(folder):
            raise RunError(f"{folder}: was not written by this project, so it is not replaced; move it away")
        _delete_checkpoint(folder)
    folder.mkdir(parents=True)
    (folder / INCOMPLETE_MARKER).touch()


def _is_own(folder: Path) -> bool:
    """Return whether this project wrote a checkpoint folder, completely or not. An empty folder counts as its own."""
    if folder.is_symlink():
        return False
    names = {path.name for path in folder.iterdir()}
    return not names or COMPLETE_FILE in names or INCOMPLETE_MARKER in names


def _delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint. After a kill, what is left is an incomplete checkpoint that the next session deletes."""
    if (folder / COMPLETE_FILE).exists():
        (folder / COMPLETE_FILE).replace(folder / INCOMPLETE_MARKER)
    else:
        (folder / INCOMPLETE_MARKER).touch()
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != INCOMPLETE_MARKER:
            path.unlink()
    shutil.rmtree(folder)


def mark_complete(checkpoint: Path, step: int) -> None:
    """Flush all files of the folder to disk, then write `COMPLETE.json` with their sizes and checksums."""
    flush_folder(checkpoint)
    files = {
        file.relative_to(checkpoint).as_posix(): FileRecord(size=file.stat().st_size, sha256=file_sha256(file))
        for file in sorted(checkpoint.rglob("*"))
        if file.is_file() and file.name != COMPLETE_FILE and not file.name.startswith(".")
    }
    record = CheckpointRecord(
        step=step,
        files={name: record for name, record in files.items() if not RESUME_FILE_PATTERN.fullmatch(name)},
        resume_files={name: record for name, record in files.items() if RESUME_FILE_PATTERN.fullmatch(name)},
    )
    # One rename, so that a checkpoint always has exactly one of both files.
    record.write(checkpoint / INCOMPLETE_MARKER)
    (checkpoint / INCOMPLETE_MARKER).rename(checkpoint / COMPLETE_FILE)
    flush(checkpoint)


def check_finite_weights(checkpoint: Path, step: int) -> None:
    """Read a checkpoint's weights, before it is marked complete.

    Raises:
        RunError: a weight is NaN or infinite.
    """
    from hw3.modeling.adapter_io import find_nonfinite  # imports PyTorch

    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            name = find_nonfinite((name, weights.get_tensor(name)) for name in weights.keys())  # noqa: SIM118 (no dict)
        if name is not None:
            raise RunError(
                f"{checkpoint}: {name} is NaN or infinite after step {step}. Checkpoints that were complete before are "
                "intact. A lower learning_rate or max_grad_norm, or float32, usually helps"
            )


def find_complete_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """Return the complete checkpoints of a run folder, by step.

    A checkpoint whose files do not have the recorded sizes is not complete. A folder with another name, such as a copy,
    is not a checkpoint of the run.
    """
    found = []
    for folder in run_dir.glob("checkpoint-*"):
        try:
            record = CheckpointRecord.read(folder / COMPLETE_FILE)
        except (OSError, UserError):
            continue
        if folder.name == f"checkpoint-{record.step}" and _sizes_match(folder, record.files):
            resumable = bool(record.resume_files) and _sizes_match(folder, record.resume_files)
            sha256 = _hash_weights(folder, record.files)
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
    hashes = {
        ADAPTER_CONFIG: hash_adapter_config((folder / ADAPTER_CONFIG).read_bytes()),
        ADAPTER_WEIGHTS: file_sha256(folder / ADAPTER_WEIGHTS),
    }
    sha256 = combine_weight_hashes(hashes)
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
        UserError: another program wrote one of them; nothing has been deleted.
    """
    incomplete = find_incomplete_checkpoints(run_dir)
    foreign = [folder for folder in incomplete if not _is_own(folder)]
    if foreign:
        raise UserError(
            f"{foreign[0]}: was not written by this project; use another folder for the run: --run DIR (make: RUN=DIR)"
        )
    for folder in incomplete:
        _delete_checkpoint(folder)
    return incomplete


def remove_damaged_files(run_dir: Path, after: int) -> list[Path]:
    """Remove damage from checkpoints that a run, resumed from an earlier step, may not write again. Links stay.

    A checkpoint with a damaged file that scoring needs is deleted. From others, damaged resume files are deleted, with
    those that belong to them.

    Args:
        run_dir: the run folder.
        after: the step that the run is resumed from.

    Returns:
        The deleted folders, and the damaged files in folders that stay.
    """
    removed = []
    for checkpoint in find_complete_checkpoints(run_dir):
        damaged = (
            checkpoint.find_damaged_files(only_weights=not checkpoint.resumable) if checkpoint.step > after else []
        )
        if not damaged or not _is_own(checkpoint.path):
            continue
        if checkpoint.find_damaged_files(only_weights=True):
            _delete_checkpoint(checkpoint.path)
            removed.append(checkpoint.path)
        else:
            _delete_resume_files(checkpoint.path)
            removed += [checkpoint.path / name for name in damaged]
    return removed


def prune_checkpoints(run_dir: Path, limit: int, best_step: int | None = None) -> None:
    """Delete the oldest complete checkpoints, by step, until `limit` are left. Links to folders stay.

    Args:
        run_dir: the run folder.
        limit: number of checkpoints to keep.
        best_step: step of another one that is kept as well.
    """
    for checkpoint in find_complete_checkpoints(run_dir)[:-limit]:
        if checkpoint.step != best_step and _is_own(checkpoint.path):
            _delete_checkpoint(checkpoint.path)


def prune_optimizer_state(run_dir: Path) -> None:
    """Delete the resume files of all but the newest `CHECKPOINTS_WITH_OPTIMIZER_STATE` checkpoints. Links stay."""
    resumable = [checkpoint for checkpoint in find_complete_checkpoints(run_dir) if checkpoint.resumable]
    for checkpoint in resumable[:-CHECKPOINTS_WITH_OPTIMIZER_STATE]:
        if _is_own(checkpoint.path):
            _delete_resume_files(checkpoint.path)


def _delete_resume_files(checkpoint: Path) -> None:
    for file in list(checkpoint.rglob("*")):
        if RESUME_FILE_PATTERN.fullmatch(file.relative_to(checkpoint).as_posix()):
            file.unlink()
    for folder in checkpoint.glob("global_step*"):
        folder.rmdir()


def _sizes_match(folder: Path, files: dict[str, FileRecord]) -> bool:
    try:
        return all((folder / name).stat().st_size == record.size for name, record in files.items())
    except OSError:
        return False


def _hash_weights(folder: Path, files: dict[str, FileRecord]) -> str:
    """Return the hash of a checkpoint's weights and configuration, from the recorded hashes of its files."""
    hashes = {name: record.sha256 for name, record in files.items()}
    if ADAPTER_CONFIG in files:
        content = (folder / ADAPTER_CONFIG).read_bytes()
        # A configuration that was changed keeps the recorded hash, and `load_checkpoint` refuses it.
        if hashlib.sha256(content).hexdigest() == hashes[ADAPTER_CONFIG]:
            hashes[ADAPTER_CONFIG] = hash_adapter_config(content)
    return combine_weight_hashes(hashes)
