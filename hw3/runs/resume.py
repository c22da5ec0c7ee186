"""Check whether a run may be resumed, or its checkpoints used, under a recipe."""

from __future__ import annotations

import json
from typing import Any

from hw3.common.errors import UserError
from hw3.config.recipe import Recipe
from hw3.runs.checkpoints import Checkpoint
from hw3.runs.run import Run

# Sections and keys that may change on resume, because they affect neither the rows nor the weights.
_CHANGEABLE_KEYS = (
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
_CHANGEABLE_PREFIXES = ("training.save_", "training.logging_", "training.dataloader_")
# Under a constant schedule the length of a run does not affect the steps before its end.
_LENGTH_KEYS = ("training.max_steps", "training.num_train_epochs")
_CONSTANT_SCHEDULES = ("constant", "constant_with_warmup")
_MAX_VALUE_CHARACTERS = 60


def check_trained_as(run: Run, recipe: Recipe) -> None:
    """Refuse to use checkpoints under another prompt, base model or quantization than they were trained with.

    Raises:
        UserError: names what changed in the run's recipe since training.
    """
    manifest = run.read_manifest()
    if manifest is None or not run.complete_checkpoints():
        return
    quantization = None if recipe.quantization is None else recipe.quantization.model_dump()
    values = {
        "prompt": (manifest.prompt_sha256, recipe.prompt.sha256),
        "quantization": (manifest.quantization, quantization),
        "base": (manifest.base.name, recipe.model.pretrained_model_name_or_path),
    }
    changed = [key for key, (trained, current) in values.items() if trained != current]
    if changed:
        raise UserError(
            f"{run.recipe_path}: {', '.join(changed)} changed since the checkpoints were trained, so their scores and "
            "predictions would mean something else. Restore the recipe, or continue with --allow-mismatch"
        )


def check_optimizer_state(checkpoint: Checkpoint, sharding: str | None, processes: int) -> None:
    """Refuse to resume with another sharding than the optimizer state was saved with.

    The libraries would start with a new optimizer state and report nothing.

    Args:
        checkpoint: the checkpoint to resume from.
        sharding: what shards the model now: `FSDP`, `DeepSpeed` or None.
        processes: number of processes now.

    Raises:
        UserError: names the way in which the state was saved.
    """
    partitions = len(list(checkpoint.path.glob("global_step*/*_optim_states.pt")))
    saved = "DeepSpeed" if partitions else "FSDP" if (checkpoint.path / "optimizer.bin").exists() else None
    launch = {
        None: "one process, or with ACCELERATE=ddp",
        "FSDP": "ACCELERATE=fsdp2",
        "DeepSpeed": f"ACCELERATE=zero3 GPUS={partitions}",
    }
    if saved != sharding or (partitions and partitions != processes):
        raise UserError(
            f"{checkpoint.path}: the optimizer state was saved with {launch[saved]}; resume in the same way. Scoring "
            "and prediction work with one process"
        )


def check_same_recipe(run: Run, recipe: Recipe) -> None:
    """Refuse to resume a run under a recipe that would train something else.

    Raises:
        UserError: names every differing key, both values, and the `RUN=` to use instead.
    """
    before = _flatten(run.load_recipe().to_dict())
    now = _flatten(recipe.to_dict())
    changeable = set(_CHANGEABLE_KEYS)
    if recipe.training.get("lr_scheduler_type", "linear") in _CONSTANT_SCHEDULES:
        changeable |= set(_LENGTH_KEYS)
    differing = [
        key
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and key not in changeable
        and not key.startswith(_CHANGEABLE_PREFIXES)
        and key.partition(".")[0] not in changeable
    ]
    if differing:
        lines = [f"{key}: {_shorten(before.get(key))} in the folder, {_shorten(now.get(key))} now" for key in differing]
        raise UserError(
            f"{run}: the folder holds a run of another recipe:",
            *lines,
            f"use another folder for this run: RUN={run}-2 (--run {run}-2)",
        )


def check_same_content(run: Run, content: dict[str, str]) -> None:
    """Refuse to resume a run whose training rows, base model or tokenizer have changed.

    Args:
        run: the run.
        content: current hashes by `train`, `base` and `tokenizer`.

    Raises:
        UserError: names what changed.
    """
    manifest = run.read_manifest()
    assert manifest is not None, "a run with complete checkpoints has a manifest"
    train, base = manifest.data["train"], manifest.base
    recorded = {
        "train": (train.path, train.sha256),
        "base": (base.name, base.sha256),
        "tokenizer": (f"the tokenizer of {base.name}", manifest.tokenizer_sha256),
    }
    changed = [name for key, (name, sha256) in recorded.items() if sha256 != content[key]]
    if changed:
        raise UserError(
            f"{', '.join(changed)}: changed since {run} began; restore it, or use another folder for this run: "
            f"RUN={run}-2 (--run {run}-2)"
        )


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_VALUE_CHARACTERS else text[: _MAX_VALUE_CHARACTERS - 3] + "..."
