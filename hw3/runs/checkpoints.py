"""Complete checkpoints: write the record that completes one, list them, delete old ones."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hw3.common.atomic_io import write_json
from hw3.common.errors import UserError
from hw3.common.hashing import file_sha256
from hw3.modeling.fingerprint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, weights_sha256
from hw3.runs.run_dir import MANIFEST, portable

COMPLETE = "COMPLETE.json"

# What only a resumed run reads; kept in the last two complete checkpoints. FSDP and DeepSpeed have files of their own.
RESUME_FILE = re.compile(
    r"accumulated\.json|optimizer\.pt|scheduler\.pt|scaler\.pt|rng_state.*\.pth"
    r"|optimizer\.bin|pytorch_model_fsdp\.bin|latest|global_step\d+/.*"
)
CHECKPOINTS_WITH_STATE = 2


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        step: optimizer steps done.
        path: its folder.
        sha256: hash of the adapter's (or model's) configuration and weights.
        resumable: whether optimizer, scheduler and RNG state are there as well.
        name: the folder's name; the path of one that is no part of the run.
    """

    step: int
    path: Path
    sha256: str
    resumable: bool
    name: str


def mark_complete(checkpoint: Path, step: int) -> None:
    """Write `COMPLETE.json`, last of all: sizes and checksums of everything in the folder."""
    files = {
        file.relative_to(checkpoint).as_posix(): {"size": file.stat().st_size, "sha256": file_sha256(file)}
        for file in sorted(checkpoint.rglob("*"))
        if file.is_file() and file.name != COMPLETE and not file.name.startswith(".")
    }
    kept = {name: entry for name, entry in files.items() if not RESUME_FILE.fullmatch(name)}
    state = {name: entry for name, entry in files.items() if RESUME_FILE.fullmatch(name)}
    write_json(checkpoint / COMPLETE, {"schema": 1, "step": step, "files": kept, "resume_files": state})


def complete_checkpoints(run: Path) -> list[Checkpoint]:
    """The run's complete checkpoints by step. A folder whose files are not of the recorded sizes is left out."""
    found = []
    for folder in run.glob("checkpoint-*"):
        try:
            record = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
            step, files, state = record["step"], record["files"], record["resume_files"]
        except (OSError, ValueError, KeyError):
            continue
        if _sizes_match(folder, files):
            resumable = bool(state) and _sizes_match(folder, state)
            sha256 = weights_sha256({name: entry["sha256"] for name, entry in files.items()})
            found.append(Checkpoint(step, folder, sha256, resumable, folder.name))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def adapter_folder(folder: Path) -> Checkpoint:
    """Any PEFT adapter folder, ours or not, to be scored beside a run's checkpoints.

    Raises:
        UserError: it holds no adapter in safetensors form.
    """
    names = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: no PEFT adapter: {' and '.join(missing)} missing")
    sha256 = weights_sha256({name: file_sha256(folder / name) for name in names})
    return Checkpoint(0, folder, sha256, False, portable(folder))


def torn_checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders whose writing was cut short."""
    complete = {checkpoint.path for checkpoint in complete_checkpoints(run)}
    folders = (folder for folder in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name))
    return sorted(folder for folder in folders if folder.is_dir() and folder not in complete)


def remove_torn(run: Path) -> list[Path]:
    """Delete checkpoints whose writing was cut short; returns them.

    Raises:
        UserError: the folder holds checkpoints that are not of this project.
    """
    torn = torn_checkpoints(run)
    if torn and not (run / MANIFEST).is_file():
        raise UserError(f"{run}: holds {torn[0].name}, which is not this project's; give the run another folder: RUN=")
    for folder in torn:
        shutil.rmtree(folder)
    return torn


def rotate(run: Path, limit: int) -> None:
    """Delete the oldest complete checkpoints, by step, until `limit` are left."""
    for checkpoint in complete_checkpoints(run)[:-limit]:
        # Incomplete first: a kill in between leaves a torn folder, not a checkpoint without weights.
        (checkpoint.path / COMPLETE).unlink()
        shutil.rmtree(checkpoint.path)


def drop_old_state(run: Path) -> None:
    """Delete optimizer, scheduler and RNG state from all but the last `CHECKPOINTS_WITH_STATE` checkpoints."""
    resumable = [checkpoint for checkpoint in complete_checkpoints(run) if checkpoint.resumable]
    for checkpoint in resumable[:-CHECKPOINTS_WITH_STATE]:
        for file in list(checkpoint.path.rglob("*")):
            if RESUME_FILE.fullmatch(file.relative_to(checkpoint.path).as_posix()):
                file.unlink()
        for folder in checkpoint.path.glob("global_step*"):
            folder.rmdir()


def _sizes_match(folder: Path, files: dict[str, Any]) -> bool:
    try:
        return all((folder / name).stat().st_size == entry["size"] for name, entry in files.items())
    except OSError:
        return False
