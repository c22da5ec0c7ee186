"""A recipe's `training` section as TRL's arguments, and what follows from them: steps, disk, an AdamW's saved state."""

from __future__ import annotations

import datetime
import math
from pathlib import Path

from transformers.trainer_utils import SaveStrategy
from trl import SFTConfig

from hw3.common.distributed import connect, world_size
from hw3.config.recipe import Recipe
from hw3.runs.checkpoints import CHECKPOINTS_WITH_STATE
from hw3.training.step_strategy import Speed

# Seconds that a process waits for another one. One that dies is noticed at once, by its connections or by the launcher;
# this is for one that hangs, and must be longer than anything that only one does or that one may do sooner: writing a
# checkpoint, reading the base from a slow disk, compiling. The library's own half an hour is longer than anyone waits.
TIMEOUT = 600


def sft_config(recipe: Recipe, speed: Speed, run: Path) -> SFTConfig:
    """The recipe's `training` section as an `SFTConfig`, with what `speed` and the project decide.

    Raises:
        ValueError: the library refuses a combination of values.
    """
    given = {
        "lr_scheduler_type": "linear",
        "report_to": "tensorboard",
        "ddp_find_unused_parameters": False,
        "ddp_timeout": TIMEOUT,
        **recipe.training,
    }
    if world_size() > 1 and given.get("use_cpu"):
        # transformers 5.23 hands `ddp_timeout` on for GPUs alone (training_args.py, _setup_devices).
        connect(datetime.timedelta(seconds=given["ddp_timeout"]))
    config = SFTConfig(
        **given
        | {
            "output_dir": str(run),
            "per_device_train_batch_size": speed.layout.rows_per_device,
            "gradient_accumulation_steps": speed.layout.accumulation,
            "activation_checkpointing": speed.activation_checkpointing,
            "optim": speed.optim,
            "max_length": None,  # TRL would cut outputs, EOS included, and drop rows left without labels
            "eval_strategy": "no",
            "logging_nan_inf_filter": False,  # the default logs a NaN as 0.0
            "include_num_input_tokens_seen": "non_padding",
            "save_total_limit": None,  # by our own rotation: theirs goes by file times, and before a save is complete
        }
        # The next batch travels while the GPU works.
        | ({} if given.get("use_cpu") else {"accelerator_config": {"non_blocking": True}})
    )
    if config.n_gpu > 1:
        # One process, one GPU: the Trainer would wrap the model in DataParallel, which TRL refuses.
        config._n_gpu = 1
    return config


def total_steps(config: SFTConfig, rows: int, rows_per_step: int) -> int:
    """Optimizer steps of a run over `rows` encoded rows."""
    if config.max_steps > 0:
        return config.max_steps
    return math.ceil(config.num_train_epochs * (rows // rows_per_step))


def disk_needed(config: SFTConfig, limit: int | None, trained: int, steps: int, steps_per_epoch: int) -> int:
    """Bytes that the checkpoints of a run take.

    Args:
        config: the run's arguments.
        limit: checkpoints to keep; None for all.
        trained: trained parameters, saved as float32.
        steps: optimizer steps still to go.
        steps_per_epoch: optimizer steps of one pass.
    """
    every = steps_per_epoch if config.save_strategy == SaveStrategy.EPOCH else config.save_steps
    checkpoints = math.ceil(steps / every if every >= 1 else 1 / every)
    if limit is not None:
        checkpoints = min(checkpoints, limit + 1)
    state = 2 if "8bit" in config.optim else 8  # Adam's two moments
    # The newest checkpoint is written before the oldest lets go of its optimizer state.
    return trained * (4 * checkpoints + state * min(checkpoints, CHECKPOINTS_WITH_STATE + 1))
