"""Estimate how long a run takes, by timing a few of its steps on small random base models.

The time of a step grows by the same amount with every decoder layer. So the real trainer runs a few of the run's own
steps on random base models of the same shape with one layer and with a few layers, and the time is extrapolated to all
layers. The steps use the run's strategy.

To compile the CUDA-graph step would take a minute, so it is not compiled here. Its graphs are timed uncompiled, their
matrix products are timed separately, and `COMPILED_FRACTION` is the share of the remaining time that compiling leaves.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from hw3.common.errors import RunError, first_line
from hw3.config.recipe import Recipe
from hw3.data.sampler import StepSampler
from hw3.data.tokenization import EncodedRow
from hw3.modeling.devices import describe_device
from hw3.modeling.loading import build_random_base, load_model_config
from hw3.training.batch_layout import BatchLayout
from hw3.training.callbacks import ProgressLineCallback
from hw3.training.gpu_timing import release_memory, time_matrix_products, time_on_gpu
from hw3.training.sft_arguments import build_sft_config
from hw3.training.step_strategy import StepStrategy
from hw3.training.train import build_trainer
from hw3.training.trainer import CompletionTrainer

# Numbers of decoder layers that are timed, by whether CUDA graphs are used. The CPU sets the pace of a step without
# them, and its times vary more than a GPU's, so they need a larger difference.
TIMED_LAYERS = {True: (1, 3), False: (1, 6)}
# Steps that are timed: evenly from the run's shortest rows to its longest, so that their mean is the run's.
TIMED_STEPS = 6
# Passes over these steps: one that loads every kernel, one timed by the clock, one timed by the GPU (CUDA graphs only).
PASSES = 3
# Share of the time outside of matrix products and optimizer that compiling leaves, from benchmarks/train_step.py.
COMPILED_FRACTION = 0.35
# Imports and compiling before the first step, by whether CUDA graphs are used.
SECONDS_BEFORE_FIRST_STEP = {True: 40, False: 10}


@dataclass(frozen=True)
class StepTimings:
    """Seconds per step, by number of decoder layers.

    Attributes:
        wall: measured by the clock; includes everything.
        graphs: CUDA-graph step only: forward, head and backward on the GPU, not compiled.
        optimizer: CUDA-graph step only: the optimizer's step on the GPU.
        products: CUDA-graph step only: matrix products (of one layer, of the head).
    """

    wall: dict[int, float]
    graphs: dict[int, float]
    optimizer: dict[int, float]
    products: tuple[float, float] = (0.0, 0.0)

    def seconds_per_step(self, layers: int) -> float:
        """Return the estimated seconds of a step with this number of layers."""
        if not self.graphs:
            return extrapolate_layers(self.wall, layers)
        products = self.products[0] * layers + self.products[1]
        rest = max(0.0, extrapolate_layers(self.graphs, layers) - products)
        gpu_seconds = products + COMPILED_FRACTION * rest + extrapolate_layers(self.optimizer, layers)
        # The GPU computes while the CPU prepares the next step; the slower of the two sets the pace.
        return max(gpu_seconds, min(self.wall.values()))


def extrapolate_layers(seconds_by_layers: dict[int, float], layers: int) -> float:
    """Extrapolate the times of two numbers of layers linearly to another number; more layers never take less."""
    (few, few_seconds), (more, more_seconds) = sorted(seconds_by_layers.items())
    return few_seconds + max(0.0, more_seconds - few_seconds) / (more - few) * (layers - few)


def representative_steps(rows: Sequence[EncodedRow], rows_per_step: int, seed: int) -> list[list[int]]:
    """Return `TIMED_STEPS` steps of the first epoch as row indices, evenly from the fewest tokens to the most."""
    lengths = [len(row) for row in rows]
    steps = StepSampler(lengths, rows_per_step, seed).steps_in_epoch(0)
    steps = sorted(steps, key=lambda step: sum(lengths[row] for row in step))
    return [steps[int((index + 0.5) * len(steps) / TIMED_STEPS)] for index in range(TIMED_STEPS)]


def time_steps(
    recipe: Recipe,
    strategy: StepStrategy,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[EncodedRow],
    device: torch.device,
) -> StepTimings:
    """Time some steps of a run on one device, whatever its number of processes.

    Args:
        recipe: the recipe.
        strategy: how steps are computed.
        tokenizer: the base model's tokenizer.
        rows: encoded training rows.
        device: device of the run.

    Raises:
        RunError: the CUDA-graph step does not work here.
    """
    layout = strategy.layout
    # The first process takes the longest rows of a step, and the others wait for it.
    own_rows = layout.rows_per_device * layout.accumulation
    steps = representative_steps(rows, recipe.rows_per_step, recipe.seed)
    timed_rows = [rows[row] for step in steps for row in step[:own_rows]]
    strategy = replace(strategy, layout=BatchLayout(1, layout.rows_per_device, layout.accumulation))
    output_tokens = round(sum(len(row.output_ids) for row in timed_rows) / TIMED_STEPS)
    wall, graphs, optimizer, products = {}, {}, {}, (0.0, 0.0)
    for layers in TIMED_LAYERS[strategy.cuda_graphs]:
        with tempfile.TemporaryDirectory() as folder, _uncompiled(strategy.cuda_graphs):
            trainer = _build_timed_trainer(recipe, strategy, tokenizer, timed_rows, device, layers, Path(folder))
            if strategy.cuda_graphs and (failure := trainer.capture()):
                raise RunError(f"the CUDA-graph step {failure}")
            trainer.train()
            wall[layers] = trainer.clock.seconds_per_step()
            if strategy.cuda_graphs:
                graphs[layers] = statistics.mean(trainer.graph_seconds)
                optimizer[layers] = statistics.mean(trainer.optimizer_seconds)
                assert isinstance(trainer.model, PeftModel), "the CUDA-graph step trains adapters"
                products = time_matrix_products(trainer.model, round(statistics.mean(trainer.tokens)), output_tokens)
            trainer.accelerator.free_memory()
            del trainer
            release_memory(device)
    return StepTimings(wall, graphs, optimizer, products)


def _uncompiled(cuda_graphs: bool) -> AbstractContextManager[Any]:
    """Return a context in which `torch.compile` compiles nothing, if CUDA graphs are used."""
    return torch.compiler.set_stance("force_eager") if cuda_graphs else contextlib.nullcontext()


def estimate_run_time(
    recipe: Recipe, strategy: StepStrategy, tokenizer: PreTrainedTokenizerBase, rows: list[EncodedRow], steps: int
) -> str:
    """Return a line on how long `steps` steps will take on this GPU, or on why this is not known.

    Args:
        recipe: the recipe.
        strategy: how steps are computed.
        tokenizer: the base model's tokenizer.
        rows: encoded training rows.
        steps: number of steps to train.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    layers = load_model_config(recipe.model).get_text_config().num_hidden_layers
    try:
        seconds = time_steps(recipe, strategy, tokenizer, rows, device).seconds_per_step(layers)
    except Exception as error:  # memory, driver or compiler: the rest of the check is useful without a time
        release_memory(device)
        return f"the time of the run is not known: {type(error).__name__}: {first_line(error)[:200]}"
    exchange = "" if strategy.layout.processes == 1 else ", communication between processes not included"
    return format_run_time(steps, seconds, describe_device(device), strategy.cuda_graphs) + exchange


def format_run_time(steps: int, seconds_per_step: float, gpu: str, cuda_graphs: bool) -> str:
    """Return a line with a run's time, which includes what precedes its first step."""
    before = SECONDS_BEFORE_FIRST_STEP[cuda_graphs]
    few, more = TIMED_LAYERS[cuda_graphs]
    return (
        f"about {format_duration(before + steps * seconds_per_step)} on {gpu}: {steps} steps of "
        f"{seconds_per_step:.2g} s each, extrapolated from {few} and {more} layers; the first step starts after about "
        f"{before} s"
    )


def format_duration(seconds: float) -> str:
    """Return a duration as `50 s`, `12 min` or `1 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


class _StepClock(TrainerCallback):
    """Record when each step ended."""

    def __init__(self) -> None:
        self._step_ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._step_ends.append(time.perf_counter())

    def seconds_per_step(self) -> float:
        """Return the mean seconds per step of the second pass."""
        return (self._step_ends[2 * TIMED_STEPS - 1] - self._step_ends[TIMED_STEPS - 1]) / TIMED_STEPS


class _TimedTrainer(CompletionTrainer):
    """A trainer that shows nothing, and times the GPU's work in the CUDA-graph steps of the last pass."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.clock = _StepClock()
        self.tokens: list[int] = []
        self.graph_seconds: list[float] = []
        self.optimizer_seconds: list[float] = []
        for callback in (ProgressLineCallback, PrinterCallback):
            self.remove_callback(callback)
        self.add_callback(self.clock)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        step = super().training_step
        loss = step(model, inputs, num_items_in_batch)
        if self.cuda_graph_step is not None and self.state.global_step >= (PASSES - 1) * TIMED_STEPS:
            self.tokens.append(inputs["input_ids"].numel())
            self.graph_seconds.append(time_on_gpu(lambda: step(model, inputs, num_items_in_batch)))
            self.optimizer_seconds.append(time_on_gpu(self.optimizer.step))
        return loss


def _build_timed_trainer(
    recipe: Recipe,
    strategy: StepStrategy,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[EncodedRow],
    device: torch.device,
    layers: int,
    folder: Path,
) -> _TimedTrainer:
    """Build the run's trainer on a few of its rows and layers; it writes, logs and reports nothing."""
    settings = {
        "max_steps": TIMED_STEPS * (PASSES if strategy.cuda_graphs else PASSES - 1),
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    recipe = replace(recipe, training={**recipe.training, **settings})
    config = build_sft_config(recipe, strategy, folder)
    model = build_random_base(recipe, load_model_config(recipe.model), layers, device, dequantized=strategy.dequantized)
    trainer = build_trainer(recipe, config, strategy, model, tokenizer, rows, _TimedTrainer)
    assert isinstance(trainer, _TimedTrainer), "`build_trainer` builds the class that it is given"
    return trainer
