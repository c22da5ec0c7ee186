"""TRL's `SFTTrainer` with float32 adapters, rows fixed by the seed, and checkpoints that are whole or not there."""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import trl.trainer.utils
from accelerate.utils import send_to_device as move_to_device
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

from hw3.captured_step import SUMS, CapturedStep
from hw3.collator import CompletionOnlyCollator
from hw3.encoding import IGNORE_INDEX, EncodedRow
from hw3.errors import RunFailed
from hw3.model import lora_config
from hw3.processes import rank, world_size
from hw3.recipe import Recipe
from hw3.run_folder import CHECKPOINTS_WITH_STATE, drop_old_state, mark_complete, rotate
from hw3.sampler import StepSampler
from hw3.speed import HEADROOM, Speed, sharded_by

ACCUMULATED = "accumulated.json"
# Seconds that a process waits for another one. One that dies is noticed at once, by its connections or by the launcher;
# this is for one that hangs, and must be longer than anything that only one does or that one may do sooner: writing a
# checkpoint, reading the base from a slow disk, compiling. The library's own half an hour is longer than anyone waits.
TIMEOUT = 600
# Seconds that a launcher gives its processes after a signal, and of these to say what is wrong.
LAUNCHER_PATIENCE, LAST_WORDS = 30, 5
# How far loss and gradient of the captured step may be from TRL's on the first batch, relative; rounding in bfloat16
# alone makes 1e-4 and 0.03. The adapters are drawn anew for it, with this standard deviation.
PROBE_LOSS, PROBE_GRADIENT, PROBE_STD = 0.005, 0.15, 0.02


class NonFiniteLoss(RunFailed):
    """The loss became NaN or infinite; the message names the step and its rows."""


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
    if world_size() > 1 and given.get("use_cpu") and not torch.distributed.is_initialized():
        # transformers 5.23 hands `ddp_timeout` on for GPUs alone (training_args.py, _setup_devices).
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=given["ddp_timeout"]))
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


def as_states_of(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """An AdamW's saved state in the words of another AdamW with float32 states; unchanged where they agree.

    Args:
        optimizer: the one that will load it: PyTorch's or bitsandbytes'.
        state: what the other one's `state_dict` returned.
    """
    # bitsandbytes wraps its tensors once more when saving.
    flat = {
        key: {**values, **values.get("__bnb_optimizer_quant_state__", {})} for key, values in state["state"].items()
    }
    saved = next(iter(flat.values()), {})
    to_bnb = type(getattr(optimizer, "optimizer", optimizer)).__module__.startswith("bitsandbytes")
    if ("state1" in saved) == to_bnb or "qmap1" in saved:
        return state
    words = {"state1": "exp_avg", "state2": "exp_avg_sq"}
    if not to_bnb:
        words = {old: new for new, old in words.items()}
    states = {
        key: {
            "step": int(values["step"]) if to_bnb else torch.tensor(float(values["step"])),
            **{new: values[old] for new, old in words.items()},
        }
        for key, values in flat.items()
    }
    groups = [
        {**{name: value for name, value in group.items() if name != "params"}, "params": old["params"], "lr": old["lr"]}
        for group, old in zip(optimizer.param_groups, state["param_groups"], strict=True)
    ]
    return {"state": states, "param_groups": groups}


def _step_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """What `CapturedStep.add` takes of a batch."""
    names = ("input_ids", "attention_mask", "output_positions", "output_ids", "outputs_per_row")
    return {name: batch[name] for name in names}


class CompletionTrainer(SFTTrainer):
    """Supervised fine-tuning on encoded rows.

    The loss is TRL's: cross-entropy summed over output tokens and EOS of a whole optimizer step, divided by their
    number, whatever the micro-batches and processes.

    Args:
        recipe: the run's recipe.
        config: from `sft_config`.
        speed: how a step is made; `capture` makes good on `captured`.
        model: the base, from `load_base`; adapters are added here.
        tokenizer: for its ids only; rows are encoded already.
        rows: encoded training rows.
    """

    def __init__(
        self,
        recipe: Recipe,
        config: SFTConfig,
        speed: Speed,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: list[EncodedRow],
    ) -> None:
        self.row_ids = [row.id for row in rows]
        self.speed = speed
        self.captured_step: CapturedStep | None = None
        layout = speed.layout
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
            data_collator=CompletionOnlyCollator(
                tokenizer.pad_token_id, tokenizer.eos_token_id, speed.widths, outputs=speed.captured
            ),
        )
        # TRL makes QLoRA adapters bfloat16, which loses updates under a few 1e-3 of a weight and, since PEFT loads them
        # back as float32, makes a resumed run another one. FSDP2 shards parameters of one dtype alone.
        dtype = self.model.dtype if sharded_by() == "FSDP" else torch.float32
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        self.remove_callback(ProgressCallback)
        self.add_callback(ProgressLine())
        self.add_callback(CompleteCheckpoints(self, recipe.training.get("save_total_limit")))
        self.stop = StopOnSignal(self)
        self.add_callback(self.stop)
        self.seconds_capturing = 0.0
        self._counted_parameters: int | None = None
        self._unread: deque[tuple[int, str, torch.Tensor, torch.cuda.Event]] = deque()

    def capture(self) -> str | None:
        """Capture the step, and run the first step's rows both ways.

        Returns:
            None if both agree and memory is left; else why TRL's own step must be taken, with a new trainer.
        """
        try:
            problem = self._capture()
        except Exception as error:  # a compiler, a driver or memory that fails here is no reason to fail the run
            logging.getLogger(__name__).debug("capturing the step failed", exc_info=True)
            problem = f"failed here: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
        if self.args.world_size > 1:
            # All processes take the same way.
            problems: list[str | None] = [None] * self.args.world_size
            torch.distributed.all_gather_object(problems, problem)
            problem = next((found for found in problems if found is not None), None)
        if problem is not None:
            self.captured_step = None
        return problem

    def _capture(self) -> str | None:
        device, per_process = self.args.device, self.speed.layout.rows_per_device
        first = self.args.process_index * per_process
        rows = [self.train_dataset[row] for row in self.sampler.steps(0)[0]]
        tokens = sum(label != IGNORE_INDEX for row in rows for label in row["labels"])
        own = rows[first : first + per_process]
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        saved = [parameter.detach().clone() for parameter in trained]
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            # The B of a new adapter is zero, and nothing would come through it.
            for parameter in trained:
                parameter.data.normal_(std=PROBE_STD)
            try:
                loss, gradient = self._plain_sums(own, tokens)
                began = time.monotonic()
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", category=UserWarning, module="torch._inductor")
                    step = CapturedStep(self.model, per_process, self.speed.widths)
                    step.begin()
                    batch = move_to_device(self.data_collator(own), device)
                    step.add(**_step_inputs(batch), tokens=torch.tensor(tokens, device=device))
                ours = step.buffer[-SUMS].item()
                self.seconds_capturing = time.monotonic() - began
            finally:
                for parameter, before in zip(trained, saved, strict=True):
                    parameter.data.copy_(before)
                    parameter.grad = None
        if not abs(ours - loss) <= (PROBE_LOSS if not self._drops_out() else 0.05) * loss:
            return f"has a loss of {ours:.5f} in the first step, not {loss:.5f}"
        if self._drops_out():
            # Other draws: the gradient's size is all that can be compared.
            apart, bound = abs(step.buffer[:-SUMS].norm() / gradient.norm() - 1).item(), 0.5
        else:
            apart, bound = ((step.buffer[:-SUMS] - gradient).norm() / gradient.norm()).item(), PROBE_GRADIENT
        if not apart <= bound:
            return f"has a gradient in the first step that is {apart:.1%} from TRL's"
        if (problem := self._short_of_memory()) is not None:
            return problem
        self.captured_step = step
        return None

    def _drops_out(self) -> bool:
        dropout = any(isinstance(module, torch.nn.Dropout) and module.p for module in self.model.modules())
        return dropout or bool(getattr(self.model.config, "attention_dropout", 0))

    def _plain_sums(self, rows: list[dict[str, Any]], tokens: int) -> tuple[float, torch.Tensor]:
        """Loss of rows by TRL's forward, and its gradient end to end; two rows at a time to spare memory.

        No collective: a process that fails here must not leave the others waiting.
        """
        collate = CompletionOnlyCollator(self.data_collator.pad_id, self.data_collator.eos_id)
        device, loss, dtype = self.args.device, 0.0, self.model.dtype
        self.model.train()
        for at in range(0, len(rows), 2):
            batch = move_to_device(collate(rows[at : at + 2]), device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                outputs = self.model(**batch, use_cache=False, fused_lm_head=True)
            part = -outputs.log_probs.sum() / tokens
            part.backward()
            loss += part.item()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        gradient = torch.cat([parameter.grad.flatten() for parameter in trained])
        for parameter in trained:
            parameter.grad = None
        torch.cuda.empty_cache()
        return loss, gradient

    def _short_of_memory(self) -> str | None:
        """Whether the captured graphs leave less than they must, the optimizer's states to come counted in."""
        device = self.args.device
        free, total = torch.cuda.mem_get_info(device)
        # What the graphs' own pool holds, nothing else can use.
        reusable = sum(
            segment["total_size"] - segment["allocated_size"]
            for segment in torch.cuda.memory_snapshot()
            if segment["device"] == device.index and tuple(segment["segment_pool_id"]) == (0, 0)
        )
        left = free + reusable - self.speed.memory.optimizer
        if left >= HEADROOM * total:
            return None
        return f"would leave {left / 2**30:.1f} of {total / 2**30:.1f} GiB free, less than {HEADROOM:.0%}"

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

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.captured_step is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
            self._check_finite(self.state.global_step, loss)
            return loss
        self.captured_step.begin()
        self.captured_step.add(**_step_inputs(inputs), tokens=num_items_in_batch)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(self.captured_step.buffer)
        loss, entropy, hits = self.captured_step.buffer[-SUMS:].clone().unbind()
        metrics = self._metrics["train"]
        metrics["entropy"].append(entropy / num_items_in_batch)
        metrics["mean_token_accuracy"].append(hits / num_items_in_batch)
        self._total_train_tokens += self._tokens_of(self.state.global_step)
        metrics["num_tokens"] = [self._total_train_tokens]
        self._check_finite_later(loss, "loss")
        return loss

    def _check_finite(self, step: int, value: torch.Tensor, name: str = "loss") -> None:
        """
        Raises:
            NonFiniteLoss: the loss, or gradient norm, of this step, counted from 0, is NaN or infinite.
        """
        if not torch.isfinite(value):
            rows = ", ".join(self.row_ids[row] for row in self.sampler.rows_of(step))
            raise NonFiniteLoss(
                f"the {name} of step {step + 1} is {value.item()}; its rows: {rows}. Checkpoints written "
                "before are intact. A lower learning_rate or max_grad_norm, or float32, usually helps"
            )

    def _check_finite_later(self, value: torch.Tensor, name: str) -> None:
        """Look at the numbers that have come back from the device, and do not wait for those that have not."""
        copy = torch.empty((), pin_memory=True)
        copy.copy_(value, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._unread.append((self.state.global_step, name, copy, event))
        while self._unread and self._unread[0][3].query():
            step, name, copy, _ = self._unread.popleft()
            self._check_finite(step, copy, name)

    def _read_all(self) -> None:
        """Wait for every number that is still on the device."""
        while self._unread:
            step, name, copy, event = self._unread.popleft()
            event.synchronize()
            self._check_finite(step, copy, name)
        for key, values in self._metrics["train"].items():
            if values and isinstance(values[-1], torch.Tensor):
                tensors = [value for value in values if isinstance(value, torch.Tensor)]
                numbers = iter(torch.stack(tensors).tolist())
                self._metrics["train"][key] = [
                    next(numbers) if isinstance(value, torch.Tensor) else value for value in values
                ]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._read_all()
        super().log(logs, start_time)

    def _tokens_of(self, step: int) -> int:
        return sum(self.sampler.lengths[row] for row in self.sampler.rows_of(step))

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        if self.captured_step is None:
            super()._track_num_input_tokens(inputs)
        else:
            # The same count as the Trainer's, which waits for the device to tell it.
            self.state.num_input_tokens_seen += self._tokens_of(self.state.global_step)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # As `PreTrainedModel.floating_point_ops`, which counts all parameters anew at every step.
        if self._counted_parameters is None:
            self._counted_parameters = self.accelerator.unwrap_model(self.model).num_parameters(exclude_embeddings=True)
        return 6 * inputs["input_ids"].numel() * self._counted_parameters

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        if self.captured_step is None:
            return super()._clip_grad_norm(model)
        # As `clip_grad_norm_`, on one tensor instead of hundreds.
        gradients = self.captured_step.buffer[:-SUMS]
        norm = torch.linalg.vector_norm(gradients)
        gradients.mul_((self.args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        self._check_finite_later(norm, "gradient norm")
        return norm

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # A run may be resumed under another `speed`, whose AdamW names its states in other words.
        load = self.optimizer.load_state_dict
        self.optimizer.load_state_dict = lambda state: load(as_states_of(self.optimizer, state))
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        finally:
            self.optimizer.load_state_dict = load

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
        self._read_all()
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
        self._ended = threading.Event()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Take over both signals for the length of training."""
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        if launched := world_size() > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            signal.set_wakeup_fd(writer)
            threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
        try:
            yield
        finally:
            self._ended.set()
            if launched:
                signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            os._exit(128 + number)
        self._received = number
        print("\nstopping after this step, with a complete checkpoint; once more stops at once", file=sys.stderr)

    def _watch(self, signals: int) -> None:
        """Speak before the launcher kills this process, which may be waiting, deaf to signals, for one that is gone.

        Args:
            signals: file descriptor from which a signal's number is read, whatever Python is doing.
        """
        os.read(signals, 1)
        seconds = int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", LAUNCHER_PATIENCE)) - LAST_WORDS
        if not self._ended.wait(seconds):
            print(
                f"hw3, process {rank()} of {world_size()}: told to stop, and the step has not ended in {seconds} s: "
                "another process has ended or hangs, or steps and checkpoints take longer than the launcher waits "
                "(TORCH_ELASTIC_SHUTDOWN_TIMEOUT, in seconds). Checkpoints that were complete before are intact: the "
                "same command goes on from the last",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.world_size > 1:
            self._cpus = torch.distributed.new_group(backend="gloo")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        received = self._received
        if args.world_size > 1:
            # A launcher may signal its processes at different steps; all must save the same one. Over the CPUs: a look
            # at a number on the GPU would wait for its step.
            flag = torch.tensor(received)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self._cpus)
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
