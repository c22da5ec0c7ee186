"""Build TRL's `SFTConfig` from a recipe, and compute what follows from it: number of steps, disk space."""

from __future__ import annotations

import datetime
import math
from pathlib import Path

from transformers.trainer_utils import SaveStrategy
from trl import SFTConfig

from hw3.common.distributed import ensure_process_group, get_world_size
from hw3.config.recipe import Recipe
from hw3.runs.checkpoints import CHECKPOINTS_WITH_OPTIMIZER_STATE
from hw3.training.step_strategy import StepStrategy

# How long a process waits for another one. A process that dies is noticed at once, by its connections or by the
# launcher; the timeout is for one that hangs. It must be longer than anything that only one process does, or that one
# may do sooner: writing a checkpoint, reading the base model from a slow disk, compiling. PyTorch's default is 1800 s.
PROCESS_TIMEOUT_SECONDS = 600


def build_sft_config(recipe: Recipe, strategy: StepStrategy, run_dir: Path) -> SFTConfig:
    """Build an `SFTConfig` from the recipe's `training` section and from what `strategy` and the project decide.

    Args:
        recipe: the recipe.
        strategy: how steps are computed.
        run_dir: the run folder.

    Raises:
        ValueError: transformers or TRL refuses a combination of values.
    """
    arguments = {
        "lr_scheduler_type": "linear",
        "report_to": "tensorboard",
        "ddp_find_unused_parameters": False,
        "ddp_timeout": PROCESS_TIMEOUT_SECONDS,
        **recipe.training,
    }
    use_cpu = bool(arguments.get("use_cpu"))
    if get_world_size() > 1 and use_cpu:
        # transformers 5.23 passes `ddp_timeout` on only for GPUs (training_args.py, _setup_devices).
        ensure_process_group(datetime.timedelta(seconds=arguments["ddp_timeout"]))
    arguments |= {
        "output_dir": str(run_dir),
        "per_device_train_batch_size": strategy.layout.rows_per_device,
        "gradient_accumulation_steps": strategy.layout.accumulation,
        "activation_checkpointing": strategy.activation_checkpointing,
        "optim": strategy.optim,
        "max_length": None,  # TRL would cut outputs, EOS included, and drop rows that have no labels left
        "eval_strategy": "no",
        "logging_nan_inf_filter": False,  # transformers' default logs a NaN as 0.0
        "include_num_input_tokens_seen": "non_padding",
        # The Trainer deletes checkpoints by file time, and before a save is complete: `prune_checkpoints` does it.
        "save_total_limit": None,
    }
    if not use_cpu:
        arguments["accelerator_config"] = {"non_blocking": True}  # copy the next batch while the GPU computes
    config = SFTConfig(**arguments)
    if config.n_gpu > 1:
        # One process uses one GPU. The Trainer would wrap the model in DataParallel, which TRL refuses.
        config._n_gpu = 1
    return config


def count_optimizer_steps(config: SFTConfig, rows: int, rows_per_step: int) -> int:
    """Return the number of optimizer steps of a run over `rows` training rows."""
    if config.max_steps > 0:
        return config.max_steps
    return math.ceil(config.num_train_epochs * (rows // rows_per_step))


def estimate_checkpoint_bytes(
    config: SFTConfig, save_total_limit: int | None, trained_parameters: int, steps: int, steps_per_epoch: int
) -> int:
    """Return the bytes of disk space that the checkpoints of a run need at most.

    Args:
        config: the run's arguments.
        save_total_limit: number of checkpoints to keep; None for all.
        trained_parameters: number of trained parameters, which are saved as float32.
        steps: optimizer steps that remain.
        steps_per_epoch: optimizer steps of one epoch.
    """
    save_steps = steps_per_epoch if config.save_strategy == SaveStrategy.EPOCH else config.save_steps
    checkpoints = math.ceil(steps / save_steps if save_steps >= 1 else 1 / save_steps)
    if save_total_limit is not None:
        checkpoints = min(checkpoints, save_total_limit + 1)
    state_bytes = 2 if "8bit" in config.optim else 8  # Adam's two moments, per parameter
    # The newest checkpoint is written before the optimizer state of the oldest is deleted.
    return trained_parameters * (4 * checkpoints + state_bytes * min(checkpoints, CHECKPOINTS_WITH_OPTIMIZER_STATE + 1))
