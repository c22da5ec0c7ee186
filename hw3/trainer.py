"""TRL's `SFTTrainer` with float32 adapters, rows fixed by the seed, and checkpoints that are whole or not there."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import trl.trainer.utils
from datasets import Dataset
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_pt_utils import nested_gather
from transformers.trainer_utils import SaveStrategy
from trl import SFTConfig, SFTTrainer

from hw3.collator import CompletionOnlyCollator
from hw3.encoding import EncodedRow
from hw3.errors import RunFailed
from hw3.model import lora_config
from hw3.recipe import Recipe, StepLayout
from hw3.run_folder import CHECKPOINTS_WITH_STATE, drop_old_state, mark_complete, rotate
from hw3.sampler import StepSampler

ACCUMULATED = "accumulated.json"


class NonFiniteLoss(RunFailed):
    """The loss became NaN or infinite; the message names the step and its rows."""


def sft_config(recipe: Recipe, layout: StepLayout, run: Path) -> SFTConfig:
    """The recipe's `training` section as an `SFTConfig`, with what the project decides.

    Raises:
        ValueError: the library refuses a combination of values.
    """
    given = {
        "lr_scheduler_type": "linear",
        "report_to": "tensorboard",
        "activation_checkpointing": False,
        "ddp_find_unused_parameters": False,
        **recipe.training,
    }
    if recipe.speed == "lean":
        given["activation_checkpointing"] = True
    config = SFTConfig(
        **given
        | {
            "output_dir": str(run),
            "per_device_train_batch_size": layout.rows_per_device,
            "gradient_accumulation_steps": layout.accumulation,
            "max_length": None,  # TRL would cut outputs, EOS included, and drop rows left without labels
            "eval_strategy": "no",
            "logging_nan_inf_filter": False,  # the default logs a NaN as 0.0
            "include_num_input_tokens_seen": "non_padding",
            "save_total_limit": None,  # by our own rotation: theirs goes by file times, and before a save is complete
        }
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


class CompletionTrainer(SFTTrainer):
    """Supervised fine-tuning on encoded rows.

    The loss is TRL's: cross-entropy summed over output tokens and EOS of a whole optimizer step, divided by their
    number, whatever the micro-batches and processes.

    Args:
        recipe: the run's recipe.
        config: from `sft_config`.
        layout: how a step's rows are shared out.
        model: the base, from `load_base`; adapters are added here.
        tokenizer: for its ids only; rows are encoded already.
        rows: encoded training rows.
    """

    def __init__(
        self,
        recipe: Recipe,
        config: SFTConfig,
        layout: StepLayout,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: list[EncodedRow],
    ) -> None:
        self.row_ids = [row.id for row in rows]
        self.sampler = StepSampler(
            [len(row) for row in rows], layout.processes * layout.rows_per_device * layout.accumulation, recipe.seed
        )
        if config.device.type == "cpu":
            # TRL's fused head takes every position on devices without Triton, twice the work of a CPU step; its
            # `compact` way, outputs only, is right on any device (trl 1.16, add_fused_lm_head).
            trl.trainer.utils._use_triton = lambda device: True
        # Adapters are initialized from the global generator, before the Trainer seeds it.
        set_seed(recipe.seed)
        super().__init__(
            model=model,
            args=config,
            train_dataset=Dataset.from_dict(
                {"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]}
            ),
            processing_class=tokenizer,
            peft_config=None if recipe.lora is None else lora_config(recipe.lora),
            data_collator=CompletionOnlyCollator(tokenizer.pad_token_id, tokenizer.eos_token_id),
        )
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                # TRL makes QLoRA adapters bfloat16, which loses updates under a few 1e-3 of a weight and, since PEFT
                # loads them back as float32, makes a resumed run another one.
                parameter.data = parameter.data.float()
        self.remove_callback(ProgressCallback)
        self.add_callback(ProgressLine())
        self.add_callback(CompleteCheckpoints(self, recipe.training.get("save_total_limit")))
        self.stop = StopOnSignal(self)
        self.add_callback(self.stop)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> StepSampler:
        return self.sampler

    def _run_epoch(self, *, epoch: int, **kwargs: Any) -> None:
        self.sampler.set_epoch(epoch)
        super()._run_epoch(epoch=epoch, **kwargs)

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, resume_from_checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        trained = super()._init_training_state(max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial)
        self._total_train_tokens = self.state.num_input_tokens_seen  # TRL's own count starts at 0 again
        self.state.compute_steps(self.args, max_steps)  # a resumed run may save and log at other steps
        return trained

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            step = self.state.global_step
            rows = ", ".join(self.row_ids[row] for row in self.sampler.rows_of(step))
            raise NonFiniteLoss(
                f"the loss of step {step + 1} is {loss.item()}; its rows: {rows}. Checkpoints written "
                "before are intact. A lower learning_rate or max_grad_norm, or float32, usually helps"
            )
        return loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # The run folder holds the tokenizer once; a checkpoint needs no 34 MB copy, pickled arguments or empty card.
        tokenizer, self.processing_class = self.processing_class, None
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.processing_class = tokenizer
        if self.args.should_save:
            for name in ("training_args.bin", "README.md"):
                (Path(output_dir or self.args.output_dir) / name).unlink(missing_ok=True)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        accumulated = {
            "loss": nested_gather(self._tr_loss, self.args.parallel_mode).mean().item(),
            "logged_at": self._globalstep_last_logged,
            "metrics": dict(self._metrics["train"]),
        }
        if self.args.should_save:
            path = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / ACCUMULATED
            path.write_text(json.dumps(accumulated), encoding="utf-8")

    def restore_accumulated(self, checkpoint: Path) -> None:
        """Take up sums that the checkpoint's run had not logged yet, so that the next log line is as without a stop."""
        accumulated = json.loads((checkpoint / ACCUMULATED).read_text(encoding="utf-8"))
        self._tr_loss += accumulated["loss"]
        self._globalstep_last_logged = accumulated["logged_at"]
        self._metrics["train"].update({key: list(values) for key, values in accumulated["metrics"].items()})

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL writes a card of its own into the run folder at every checkpoint; `hw3 export` writes ours."""


class CompleteCheckpoints(TrainerCallback):
    """Marks each checkpoint complete, last of all; then old optimizer state and old checkpoints may go."""

    def __init__(self, trainer: CompletionTrainer, keep: int | None) -> None:
        self.trainer = trainer
        self.keep = keep

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step:
            self.trainer.restore_accumulated(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.accelerator.wait_for_everyone()
        if args.should_save:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}", state.global_step)
            drop_old_state(Path(args.output_dir))
            if self.keep is not None:
                rotate(Path(args.output_dir), self.keep)


class StopOnSignal(TrainerCallback):
    """SIGINT and SIGTERM: finish the step, save, stop. A second one ends the process at once.

    Attributes:
        signal: the signal's number, once the run has stopped for it on every process; 0 otherwise.
    """

    def __init__(self, trainer: CompletionTrainer) -> None:
        self.trainer = trainer
        self.signal = 0
        self._received = 0

    def install(self) -> None:
        """Take over both signals for the length of training."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            os._exit(128 + number)
        self._received = number
        print("\nstopping after this step, with a complete checkpoint; once more stops at once", file=sys.stderr)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        received = self._received
        if args.world_size > 1:
            # A launcher may signal its processes at different steps; all must save the same one.
            flag = torch.tensor(received, device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            received = int(flag)
        if received:
            self.signal = received
            control.should_save = True
            control.should_training_stop = True


class ProgressLine(TrainerCallback):
    """Loss, learning rate and tokens a second: a bar on a terminal, a line a log elsewhere."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.began = 0.0
        self.tokens_before = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.began, self.tokens_before = time.monotonic(), state.num_input_tokens_seen
        if state.is_world_process_zero and sys.stderr.isatty() and not args.disable_tqdm:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None or "loss" not in logs:
            return
        rate = (state.num_input_tokens_seen - self.tokens_before) / (time.monotonic() - self.began)
        shown = f"loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2e}  {rate:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.set_postfix_str(shown)
        else:
            width = int(math.log10(max(state.max_steps, 1))) + 1
            print(f"step {state.global_step:>{width}}/{state.max_steps}  {shown}", flush=True)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()
