"""What training does around its steps: complete checkpoints, a clean stop on signals, a line of progress."""

from __future__ import annotations

import math
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
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hw3.common.distributed import rank, world_size
from hw3.runs.checkpoints import drop_old_state, mark_complete, rotate

if TYPE_CHECKING:
    from hw3.training.trainer import CompletionTrainer


# Seconds that a launcher gives its processes after a signal, and of these to say what is wrong.
LAUNCHER_PATIENCE, LAST_WORDS = 30, 5


class CompleteCheckpoints(TrainerCallback):
    """Marks each checkpoint complete, last of all; then old optimizer state and old checkpoints may go.

    Checksums of a gigabyte take as long as twenty captured steps, so this is done beside training, for one checkpoint
    at a time. Killed meanwhile, that checkpoint is not complete and the one before it still is.
    """

    def __init__(self, trainer: CompletionTrainer, keep: int | None) -> None:
        self.trainer = trainer
        self.keep = keep
        self._thread = ThreadPoolExecutor(1)
        self._under_way: Future[None] | None = None
        self._left: list[Callable[[], None]] = []

    def before_completing(self, work: Callable[[], None]) -> None:
        """Leave a piece of the next checkpoint's writing to the thread."""
        self._left.append(work)

    def wait(self) -> None:
        """Until the last checkpoint is complete.

        Raises:
            OSError, RuntimeError: it could not be written.
        """
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step:
            self.trainer.restore_accumulated(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._under_way is not None and self._under_way.done():
            self.wait()  # a full disk is known at once

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.accelerator.wait_for_everyone()
        if args.should_save:
            left, self._left = self._left, []
            self._under_way = self._thread.submit(self._complete, Path(args.output_dir), state.global_step, left)

    def _complete(self, run: Path, step: int, left: list[Callable[[], None]]) -> None:
        for work in left:
            work()
        mark_complete(run / f"checkpoint-{step}", step)
        drop_old_state(run)
        if self.keep is not None:
            rotate(run, self.keep)


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


class PeakMemory(TrainerCallback):
    """The most memory that PyTorch has had on this process's GPU: while all was loaded and made, and in the steps.

    Activations of the captured step are allocated while it is made alone. Its replays use the same memory again, which
    PyTorch counts as reserved, but no longer as allocated.

    Attributes:
        before: (allocated, reserved) bytes until training began, sharding included.
    """

    def __init__(self) -> None:
        self.before = (0, 0)

    @staticmethod
    def now() -> tuple[int, int]:
        """(allocated, reserved) bytes since training began."""
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.device.type == "cuda":
            self.before = self.now()
            torch.cuda.reset_peak_memory_stats()


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
