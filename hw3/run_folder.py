"""A run's folder: its recipe and manifest, which checkpoints are complete, what may change on resume, disk."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hw3.errors import UserError
from hw3.files import write_json
from hw3.recipe import Recipe, load_recipe
from hw3.rows import Row, file_sha256

COMPLETE = "COMPLETE.json"
RECIPE = "recipe.yaml"
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PACKAGES = ("torch", "trl", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "tokenizers")
# What only a resumed run reads; kept in the last two complete checkpoints. FSDP and DeepSpeed have files of their own.
RESUME_FILE = re.compile(
    r"accumulated\.json|optimizer\.pt|scheduler\.pt|scaler\.pt|rng_state.*\.pth"
    r"|optimizer\.bin|pytorch_model_fsdp\.bin|latest|global_step\d+/.*"
)
CHECKPOINTS_WITH_STATE = 2
# Sections and keys that a resumed run may change; the rows and weights it sees stay the same.
_FREE_ON_RESUME = (
    "speed",
    "generation",
    "evaluation",
    "data.eval",
    "data.dev",
    "training.report_to",
    "training.run_name",
    "training.project",
    "training.disable_tqdm",
    "training.log_level",
    "training.ddp_timeout",
)
_FREE_PREFIXES = ("training.save_", "training.logging_", "training.dataloader_")
_LENGTH_KEYS = ("training.max_steps", "training.num_train_epochs")
_CONSTANT_SCHEDULES = ("constant", "constant_with_warmup")


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


def check_trained_as(run: Path, recipe: Recipe) -> None:
    """Refuse to use checkpoints as something they were not trained as.

    Raises:
        UserError: the run's recipe has another prompt, base or quantization now than when it was trained.
    """
    manifest = read_manifest(run)
    if not manifest or not complete_checkpoints(run):
        return
    quantization = None if recipe.quantization is None else recipe.quantization.model_dump()
    now = {
        "prompt": (manifest["prompt_sha256"], recipe.prompt.sha256),
        "quantization": (manifest["quantization"], quantization),
        "base": (manifest["base"]["name"], recipe.model.pretrained_model_name_or_path),
    }
    changed = [key for key, (then, current) in now.items() if then != current]
    if changed:
        raise UserError(
            f"{run / RECIPE}: {', '.join(changed)} changed since the checkpoints were trained; scores and "
            "answers would not be theirs. Put the recipe back, or go on all the same with --anyway"
        )


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


def check_state(checkpoint: Checkpoint, sharded: str | None, processes: int) -> None:
    """Refuse to go on from optimizer state that was kept in another way: the library would begin anew without a word.

    Args:
        checkpoint: the one to go on from.
        sharded: what shards the model now, from `hw3.speed.sharded_by`.
        processes: of this command.

    Raises:
        UserError: says how the run was begun.
    """
    parts = len(list(checkpoint.path.glob("global_step*/*_optim_states.pt")))
    then = "DeepSpeed" if parts else "FSDP" if (checkpoint.path / "optimizer.bin").exists() else None
    ways = {
        None: "one process, or with ACCELERATE=ddp",
        "FSDP": "ACCELERATE=fsdp2",
        "DeepSpeed": f"ACCELERATE=zero3 GPUS={parts}",
    }
    if then != sharded or (parts and parts != processes):
        raise UserError(
            f"{checkpoint.path}: its optimizer state is of {ways[then]}, and can be gone on with in that way alone; "
            "scoring and prediction need no more than one process"
        )


def check_resume(run: Path, recipe: Recipe) -> None:
    """Refuse to continue a run under a recipe that would make it another run.

    Raises:
        UserError: names every differing key, its two values, and the `RUN=` to use instead.
    """
    before = _flat(load_recipe(run / RECIPE).to_dict())
    now = _flat(recipe.to_dict())
    free = set(_FREE_ON_RESUME)
    if recipe.training.get("lr_scheduler_type", "linear") in _CONSTANT_SCHEDULES:
        free |= set(_LENGTH_KEYS)
    differing = [
        key
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and key not in free
        and not key.startswith(_FREE_PREFIXES)
        and key.partition(".")[0] not in free
    ]
    if differing:
        lines = [f"{key}: {_brief(before.get(key))} there, {_brief(now.get(key))} now" for key in differing]
        raise UserError(
            f"{run}: holds a run of another recipe:",
            *lines,
            f"give this run a folder of its own: RUN={run}-2 (--run {run}-2)",
        )


def check_unchanged(run: Path, now: dict[str, str]) -> None:
    """Refuse to continue a run whose training rows, base or tokenizer have changed.

    Args:
        run: the run folder.
        now: content hashes by `train`, `base` and `tokenizer`.

    Raises:
        UserError: names what has changed.
    """
    manifest = read_manifest(run)
    then = {
        "train": (manifest["data"]["train"]["path"], manifest["data"]["train"]["sha256"]),
        "base": (manifest["base"]["name"], manifest["base"]["sha256"]),
        "tokenizer": (f"the tokenizer of {manifest['base']['name']}", manifest["tokenizer_sha256"]),
    }
    changed = [name for key, (name, sha256) in then.items() if sha256 != now[key]]
    if changed:
        raise UserError(
            f"{', '.join(changed)}: changed since {run} began; put it back, or give this run a folder of its own: "
            f"RUN={run}-2 (--run {run}-2)"
        )


def check_writable(run: Path) -> None:
    """Refuse a run folder that cannot be made or written.

    Raises:
        UserError: says what is in the way.
    """
    folder = run
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"{run}: {folder} is a file; give a folder: RUN= (--run)")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{run}: {folder} cannot be written to; give another folder: RUN= (--run)")


def read_manifest(run: Path) -> dict[str, Any]:
    """The run's manifest; empty where there is none yet."""
    try:
        return json.loads((run / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def environment() -> dict[str, Any]:
    """Versions, Python and git commit, for the manifest."""
    return {
        "versions": {package: version(package) for package in PACKAGES},
        "python": ".".join(map(str, sys.version_info[:3])),
        "git_commit": _git_commit(),
    }


def portable(path: Path) -> str:
    """A path as results keep it: relative where it can be, else the name alone."""
    try:
        return path.resolve().relative_to(Path.cwd()).as_posix()
    except ValueError:
        return path.name


def data_facts(path: Path, rows: Sequence[Row]) -> dict[str, Any]:
    """What manifest, results and predictions say of a file of rows."""
    return {"path": portable(path), "sha256": file_sha256(path), "rows": len(rows)}


def is_other_file(stored: dict[str, Any], data: dict[str, Any], path: Path) -> bool:
    """Whether what is stored is of another file with the same name as `path`, rather than of this one, edited or not.

    Args:
        stored: `data_facts` of the stored one.
        data: `data_facts` of `path`.
        path: the file at hand.
    """
    # Of a file outside the working directory only the name is known, and names repeat.
    edited = stored["path"] == data["path"] and path.resolve().is_relative_to(Path.cwd())
    return not edited and stored["sha256"] != data["sha256"]


def check_disk(run: Path, needed: int) -> str:
    """One line on the disk that a run needs and has.

    Raises:
        UserError: there is less free than needed.
    """
    folder = run
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    line = f"disk: checkpoints take {gib(needed)}, {gib(free)} free"
    if needed > free:
        raise UserError(
            f"{run}: {line}; free some, raise training.save_steps, or set training.save_total_limit, or give RUN= on "
            "another disk"
        )
    return line


def gib(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"


def weights_sha256(files: dict[str, str]) -> str:
    """One hash over the checksums of weights and adapter configuration.

    Args:
        files: sha256 by file name, of a checkpoint's files; others than those are passed over.
    """
    parts = [(name, files[name]) for name in sorted(files) if _is_weight(name)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _is_weight(name: str) -> bool:
    return name.endswith(".safetensors") or name == ADAPTER_CONFIG


def _sizes_match(folder: Path, files: dict[str, Any]) -> bool:
    try:
        return all((folder / name).stat().st_size == entry["size"] for name, entry in files.items())
    except OSError:
        return False


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _git_commit() -> str | None:
    if "GIT_COMMIT" in os.environ:  # a copy without its history
        return os.environ["GIT_COMMIT"]
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
