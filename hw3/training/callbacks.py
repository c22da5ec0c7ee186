"""Trainer callbacks: complete checkpoints, signals, peak memory, a progress line."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hw3.common.distributed import get_rank, get_world_size
from hw3.common.progress import ProgressLine
from hw3.common.signals import SAVE_SIGNAL, STOP_SIGNALS
from hw3.runs.checkpoints import check_finite_weights, mark_complete, prune_checkpoints, prune_optimizer_state

# torchrun's default time between a signal to its processes and their kill; TORCH_ELASTIC_SHUTDOWN_TIMEOUT changes it.
LAUNCHER_GRACE_SECONDS = 30
# How long before that kill a process reports that its step has not ended.
REPORT_BEFORE_KILL_SECONDS = 5

logger = logging.getLogger(__name__)


class CheckpointCompletionCallback(TrainerCallback):
    """Mark each checkpoint complete after its last file, then delete old optimizer state and old checkpoints.

    The checksums of a gigabyte take as long as twenty CUDA-graph steps. They are computed in a thread beside training,
    for one checkpoint at a time. If the run is killed meanwhile, that checkpoint is incomplete and the one before it is
    still complete.

    Args:
        save_total_limit: number of checkpoints to keep; None for all.

    Attributes:
        best_step: step of the best checkpoint so far, which is kept as well; None while none has a score.
    """

    def __init__(self, save_total_limit: int | None) -> None:
        self.save_total_limit = save_total_limit
        self.best_step: int | None = None
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        self._deferred_writes: list[Callable[[], None]] = []

    def defer_write(self, write: Callable[[], None]) -> None:
        """Let the thread write a part of the next checkpoint, before it marks the checkpoint complete."""
        self._deferred_writes.append(write)

    def wait(self) -> None:
        """Wait until the last checkpoint is complete.

        Raises:
            OSError, RuntimeError: the checkpoint could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Raise the thread's error, such as a full disk, as soon as there is one."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start to complete the checkpoint once all processes have written their files."""
        PartialState().wait_for_everyone()
        if args.should_save:
            writes, self._deferred_writes = self._deferred_writes, []
            assert args.output_dir is not None, "`build_sft_config` sets the run folder"
            self._pending = self._thread.submit(self._complete, Path(args.output_dir), state.global_step, writes)

    def _complete(self, run_dir: Path, step: int, writes: list[Callable[[], None]]) -> None:
        for write in writes:
            write()
        check_finite_weights(run_dir / f"checkpoint-{step}", step)
        mark_complete(run_dir / f"checkpoint-{step}", step)
        prune_optimizer_state(run_dir)
        if self.save_total_limit is not None:
            prune_checkpoints(run_dir, self.save_total_limit, self.best_step)


class SignalCallback(TrainerCallback):
    """On a signal finish the step and save; then stop, or continue after SIGUSR2.

    Clusters send SIGTERM, SIGHUP or SIGUSR1 before they end a job. A second signal to stop ends the process at once.

    Attributes:
        signal: number of the signal for which the run has stopped on every process; 0 if it has not.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._received = 0
        self._should_save = False
        self._training_ended = threading.Event()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals inside the block."""
        handlers = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        handlers[SAVE_SIGNAL] = signal.signal(SAVE_SIGNAL, self._handle)
        if launched := get_world_size() > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            signal.set_wakeup_fd(writer)
            threading.Thread(target=self._report_before_kill, args=(reader,), daemon=True).start()
        try:
            yield
        finally:
            self._training_ended.set()
            if launched:
                signal.set_wakeup_fd(-1)
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == SAVE_SIGNAL:
            self._should_save = True
            return
        if self._received:
            os._exit(128 + number)
        self._received = number
        logger.warning("stopping after this step, with a complete checkpoint; a second signal stops at once")

    def _report_before_kill(self, signals: int) -> None:
        """Report why the step has not ended, shortly before the launcher kills this process.

        The main thread cannot report it: it may be waiting in a collective for a process that has ended.

        Args:
            signals: file descriptor that receives a signal's number even while the main thread is blocked.
        """
        os.read(signals, 1)
        grace = int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", LAUNCHER_GRACE_SECONDS))
        seconds = grace - REPORT_BEFORE_KILL_SECONDS
        if not self._training_ended.wait(seconds):
            print(
                f"hw3, process {get_rank()} of {get_world_size()}: received a signal to stop, and the step has not "
                f"ended in {seconds} s. Another process has ended or hangs, or steps and checkpoints take longer than "
                "the launcher waits (TORCH_ELASTIC_SHUTDOWN_TIMEOUT, in seconds). Complete checkpoints are intact; run "
                "the same command to resume from the last one",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Create the process group in which processes exchange the signals they received."""
        if args.world_size > 1:
            self._cpu_group = torch.distributed.new_group(backend="gloo")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save, and stop or continue, if any process has received a signal."""
        received, should_save = self._received, self._should_save
        if args.world_size > 1:
            # A launcher may signal its processes at different steps, but all must save the same step. The numbers are
            # reduced on the CPU: reading them from the GPU would wait for the GPU's step.
            flags = torch.tensor([received, should_save])
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group=self._cpu_group)
            received, should_save = flags.tolist()
        if should_save:
            self._should_save = False
            control.should_save = True
            logger.info(f"{SAVE_SIGNAL.name}: saving step {state.global_step}, then continuing")
        if received:
            self.signal = received
            control.should_save = True
            control.should_training_stop = True


class PeakMemoryCallback(TrainerCallback):
    """Record the peak memory of PyTorch on this process's GPU, before training and during its steps.

    Activations of the CUDA-graph step are allocated only during its capture. Its replays use the same memory, which
    PyTorch counts as reserved but no longer as allocated.

    Attributes:
        before_training: (allocated, reserved) bytes at the peak until training began, sharding included.
    """

    def __init__(self) -> None:
        self.before_training = (0, 0)

    @staticmethod
    def read() -> tuple[int, int]:
        """Return (allocated, reserved) bytes at the peak since training began."""
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Record the peak of loading, and start to measure that of the steps."""
        if args.device.type == "cuda":
            self.before_training = self.read()
            torch.cuda.reset_peak_memory_stats()


class ProgressLineCallback(TrainerCallback):
    """Show loss, learning rate, tokens per second and the time left: live on a terminal, else in one line per log.

    The loss is the last one that was logged, because reading the present one would wait for the GPU. Tokens per second
    are those of the steps since the log before. The clock starts after the first step, which compiles kernels.
    """

    def __init__(self) -> None:
        self._line: ProgressLine | None = None
        self._last_log: tuple[float, int] | None = None  # time, and tokens seen until then
        self._numbers: list[str] = []  # of the last log
        self._score = ""

    def set_score(self, score: str, seconds: float) -> None:
        """Show the score of the last checkpoint from the next log on, on a terminal at once.

        Args:
            score: the text to show.
            seconds: how long training has waited for it.
        """
        self._score = score
        if self._last_log is not None:
            self._last_log = (self._last_log[0] + seconds, self._last_log[1])
        self._show_numbers()

    def _show_numbers(self) -> None:
        if self._line is not None:
            self._line.set_details(", ".join(filter(None, (*self._numbers, self._score))))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open the line."""
        if state.is_world_process_zero:
            is_live = not args.disable_tqdm
            self._line = ProgressLine("train", state.max_steps, "steps", initial=state.global_step, is_live=is_live)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Count the step."""
        if self._line is None:
            return
        self._line.advance()
        if self._last_log is None:
            self._last_log = (time.monotonic(), state.num_input_tokens_seen)
            self._line.restart_clock()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Show the latest numbers."""
        if self._line is None or self._last_log is None or logs is None or "loss" not in logs:
            return
        numbers = [f"loss {logs['loss']:.4f}", f"lr {logs['learning_rate']:.2e}"]
        now, tokens = time.monotonic(), state.num_input_tokens_seen
        last_time, last_tokens = self._last_log
        if tokens > last_tokens:
            numbers.append(f"{(tokens - last_tokens) / (now - last_time):,.0f} tokens/s")
        self._last_log = (now, tokens)
        self._numbers = numbers
        self._show_numbers()
        if not self._line.is_live:
            width = len(str(state.max_steps))
            logger.info(f"step {state.global_step:>{width}}/{state.max_steps}, {self._line.describe()}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the line."""
        if self._line is not None:
            self._line.close()
