"""Check that a run may be resumed, or used, under a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hw3.common.errors import UserError
from hw3.config.recipe import Recipe, load_recipe
from hw3.runs.checkpoints import Checkpoint, complete_checkpoints
from hw3.runs.run_dir import RECIPE, read_manifest

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
