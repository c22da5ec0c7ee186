"""Measure an optimizer step: seconds, memory and MFU of the recipe, of TRL in three settings, and of larger steps.

The base model has random weights of Gemma-2-2B's shape (with `--llama`, Llama-3-8B's) and the real tokenizer. Each
setting runs through `hw3 train`'s own code; TRL's settings use `speed: plain`, which is TRL's step in our trainer.

    python benchmarks/train_step.py --tokenizer DIR --data FILE [--full-run] [--llama]
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import re
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from benchmark_report import STEP_COLUMNS, describe_machine, read_previous_rows, write_report
from random_models import make_random_base
from training_logs import held_gib, read_loss_logs, seconds_per_step

from hw3.config.recipe import Recipe, load_recipe
from hw3.data.rows import read_rows
from hw3.data.sampler import StepSampler
from hw3.data.tokenization import Encoder
from hw3.modeling.loading import load_model_config, load_tokenizer
from hw3.runs.run import Run
from hw3.training.memory_estimate import GIB, WeightCounts, count_weights
from hw3.training.plan import plan_run
from hw3.training.step_strategy import CUDA_CONTEXT_BYTES
from hw3.training.time_estimate import StepTimings, extrapolate_layers, time_steps
from hw3.training.train import train
from hw3.training.trainer import CompletionTrainer

LOGGING_STEPS, SHORT_RUN_LOGGING_STEPS = 10, 5  # 10 as in the recipe; 5 in runs of fewer than 100 steps
# Kernels are recorded in PROFILED_STEPS steps, which begin PROFILE_STEPS_BEFORE_END before the end and are not timed.
PROFILE_STEPS_BEFORE_END, PROFILED_STEPS = 10, 6
COLUMNS = STEP_COLUMNS | {"mfu": "MFU"}


class Setting(NamedTuple):
    """What to measure.

    Attributes:
        name: The row's name in the report.
        overrides: Overrides of the recipe, separated by spaces.
        steps: Optimizer steps.
    """

    name: str
    overrides: str
    steps: int


TRL = "speed=plain"
TRL_DEFAULTS = f"{TRL} training.optim=adamw_torch_fused"
HAND_TUNED = (
    f"{TRL} training.per_device_train_batch_size=8 training.gradient_accumulation_steps=1 "
    "training.activation_checkpointing=false training.optim=adamw_torch_fused"
)
GEMMA = [
    Setting("speed: auto", "", 160),
    Setting("speed: lean", "speed=lean", 40),
    Setting("the course's script: 4 x 2, activation checkpointing, paged AdamW", TRL, 40),
    Setting("TRL's defaults: 4 x 2, activation checkpointing, fused AdamW", TRL_DEFAULTS, 40),
    Setting("TRL hand-tuned: 8 x 1, no activation checkpointing, fused AdamW", HAND_TUNED, 60),
    Setting("speed: auto, GPU limited to 8 GiB", "", 60),
    Setting("speed: auto, 16 rows per step", "training.gradient_accumulation_steps=4", 60),
    Setting("speed: auto, 32 rows per step", "training.gradient_accumulation_steps=8", 60),
    Setting("speed: auto, 64 rows per step", "training.gradient_accumulation_steps=16", 60),
]
LLAMA = [
    Setting("Llama-3-8B shape, speed: auto", "", 60),
    Setting("Llama-3-8B shape, TRL hand-tuned: 8 x 1, no activation checkpointing, fused AdamW", HAND_TUNED, 40),
    Setting("Llama-3-8B shape, the course's script: 1 x 8, activation checkpointing, paged AdamW", TRL, 30),
    Setting("Llama-3-8B shape, speed: lean", "speed=lean", 30),
    Setting("Llama-3-8B shape, TRL's defaults: 1 x 8, activation checkpointing, fused AdamW", TRL_DEFAULTS, 30),
]


def measure_matmul_tflops() -> float:
    """Return the TFLOP/s of a bfloat16 matrix product of size 8192, median of ten after three warm-ups."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(13):
        torch.cuda.synchronize()
        started = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * 8192**3 / statistics.median(times[3:]) / 1e12


class KernelProfile:
    """Record the kernels of some steps in the middle of training, as a context manager.

    Attributes:
        summary: After training: milliseconds per step by the clock and of all kernels, and the 25 longest kernels.
    """

    def __init__(self, first_step: int, steps: int) -> None:
        self.first_step, self.steps, self.summary = first_step, steps, {}

    def __enter__(self) -> KernelProfile:
        self._training_step = CompletionTrainer.training_step
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        started: dict[int, float] = {}

        def training_step(trainer: CompletionTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
            step = trainer.state.global_step
            is_first_micro_batch = step not in started
            if step in (self.first_step, self.first_step + self.steps) and is_first_micro_batch:
                torch.cuda.synchronize()
                started[step] = time.perf_counter()
                if step == self.first_step:
                    profiler.start()
                else:
                    profiler.stop()
                    self.summary = self._summarize(profiler, started[step] - started[self.first_step])
            return self._training_step(trainer, *args, **kwargs)

        CompletionTrainer.training_step = training_step
        return self

    def __exit__(self, *error: object) -> None:
        CompletionTrainer.training_step = self._training_step

    def _summarize(self, profiler: torch.profiler.profile, wall_seconds: float) -> dict[str, Any]:
        events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
        kernel_microseconds = sum(event.self_device_time_total for event in events)
        return {
            "milliseconds_profiled": round(wall_seconds * 1e3 / self.steps, 2),
            "milliseconds_of_kernels": round(kernel_microseconds / 1e3 / self.steps, 2),
            "kernels": [
                {
                    "kernel": event.key[:100],
                    "calls": round(event.count / self.steps, 1),
                    "milliseconds": round(event.self_device_time_total / 1e3 / self.steps, 3),
                }
                for event in events[:25]
            ],
        }


def read_compile_seconds() -> dict[str, float]:
    """Return and reset PyTorch's own record of where compilation took its time; stages contain each other."""
    metrics = torch._dynamo.utils.compilation_time_metrics
    seconds = {name: round(sum(times), 1) for name, times in metrics.items()}
    metrics.clear()
    return {name: value for name, value in sorted(seconds.items(), key=lambda item: -item[1]) if value >= 1}


@dataclass(frozen=True)
class Estimate:
    """The estimates of `hw3 check` before a run.

    Attributes:
        seconds_per_step: Of a step of the complete model.
        gib: Memory of a step.
        timings: The timings of smaller models that `seconds_per_step` is extrapolated from.
        duration_seconds: How long these timings took.
    """

    seconds_per_step: float
    gib: float
    timings: StepTimings
    duration_seconds: float


def estimate_step(recipe: Recipe, run: Path) -> Estimate:
    """Estimate a step as `hw3 check` does."""
    plan = plan_run(recipe, run, 1)
    started = time.monotonic()
    timings = time_steps(recipe, plan.strategy, plan.tokenizer, plan.rows, torch.device("cuda", 0))
    seconds = timings.seconds_per_step(load_model_config(recipe.model).num_hidden_layers)
    return Estimate(seconds, plan.strategy.memory.total / GIB, timings, time.monotonic() - started)


@contextlib.contextmanager
def limit_gpu_memory(setting: str) -> Iterator[None]:
    """Limit the GPU's memory if the setting's name asks for it: for PyTorch's allocator, and for `speed: auto`."""
    limit = re.search("GPU limited to ([0-9]+) GiB", setting)
    if limit is None:
        yield
        return
    limit_bytes = int(limit[1]) * GIB
    available = (limit_bytes - int(CUDA_CONTEXT_BYTES), limit_bytes)
    torch.cuda.set_per_process_memory_fraction(limit_bytes / torch.cuda.mem_get_info()[1])
    try:
        with mock.patch("hw3.training.plan.gpu_memory", return_value=available):
            yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def relative_error(estimated: float, measured: float) -> float:
    """Return the relative error of an estimate, negative if it is too low."""
    return round(estimated / measured - 1, 3)


def fit_compiled_fraction(timings: StepTimings, layers: int, measured: float) -> float | None:
    """Return the `COMPILED_FRACTION` of `time_estimate.py` that would estimate the measured seconds exactly.

    Returns:
        None without CUDA graphs, for which the constant is not used.
    """
    if not timings.graphs:
        return None
    products = timings.products[0] * layers + timings.products[1]
    rest = extrapolate_layers(timings.graphs, layers) - products
    return round((measured - products - extrapolate_layers(timings.optimizer, layers)) / rest, 3)


class StepWork(NamedTuple):
    """What a step computes, as the mean over some steps: tokens, output tokens, and the necessary FLOPs."""

    tokens: float
    output_tokens: float
    flops: float


def count_work(
    recipe: Recipe, first_step: int, last_step: int, weights: WeightCounts, trained_parameters: int
) -> StepWork:
    """Count the work of a step, as the mean over some steps of the run.

    Counted are two FLOPs per weight and token for each product. The linear layers have two products (forward, and the
    gradient of the inputs) for all tokens, adapters a third (the gradient of the weights). The output head has two
    products, for output tokens only.
    """
    encoder = Encoder(load_tokenizer(recipe.model), recipe.prompt)
    rows = [encoder.encode(row) for row in read_rows(Path(recipe.data.train))]
    steps = StepSampler([len(row) for row in rows], recipe.rows_per_step, recipe.seed).steps_in_epoch(0)
    steps = steps[first_step:last_step]
    tokens = statistics.mean(sum(len(rows[index]) for index in step) for step in steps)
    output_tokens = statistics.mean(sum(len(rows[index].output_ids) for index in step) for step in steps)
    config = load_model_config(recipe.model)
    head = config.vocab_size * config.hidden_size
    flops = tokens * (4 * weights.linear + 6 * trained_parameters) + output_tokens * 4 * head
    return StepWork(tokens, output_tokens, flops)


def measure(
    recipe_file: str, overrides: list[str], setting: Setting, run: Path, tflops: float, *, profiled: bool
) -> dict[str, Any]:
    """Estimate and train one setting; return one row of the report."""
    recipe, steps = load_recipe(Path(recipe_file), overrides), setting.steps
    estimate = estimate_step(recipe, run)
    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    started = time.monotonic()
    first_profiled = steps - PROFILE_STEPS_BEFORE_END if profiled else steps  # the last step's number is steps - 1
    with KernelProfile(first_profiled, PROFILED_STEPS) as profile:
        assert train(recipe, run) == 0
    seconds_total = time.monotonic() - started
    manifest, logs = Run(run).read_manifest(), read_loss_logs(run)
    logging_steps = recipe.training["logging_steps"]
    windows = seconds_per_step(logs[1 : (steps - PROFILE_STEPS_BEFORE_END) // logging_steps])
    config = load_model_config(recipe.model)
    weights = count_weights(config)
    work = count_work(recipe, 2 * logging_steps, steps, weights, manifest.parameters.trained)
    step_seconds = statistics.median(windows)
    session = manifest.sessions[-1].model_dump()
    return {
        "setting": setting.name,
        "overrides": " ".join(override for override in overrides if not override.startswith(("data.", "model."))),
        "speed": manifest.speed.model_dump(),
        "layout": manifest.layout.model_dump(),
        "steps": steps,
        "rows_per_step": recipe.rows_per_step,
        "tokens_per_step": round(work.tokens, 1),
        "output_tokens_per_step": round(work.output_tokens, 1),
        "seconds_per_step": round(step_seconds, 4),
        "seconds_per_step_range": [round(min(windows), 4), round(max(windows), 4)],
        "rows_per_second": round(recipe.rows_per_step / step_seconds, 1),
        "mfu": round(work.flops / step_seconds / tflops / 1e12, 3),
        "matmul_tflops": round(tflops, 1),
        "seconds_at_limit": round(work.flops / tflops / 1e12, 4),
        "peak_gib": session["peak_gib"],
        "peak_reserved_gib": session["peak_reserved_gib"],
        "seconds_capturing": session["seconds_capturing"],
        "seconds_total": round(seconds_total, 1),
        "compile_seconds": read_compile_seconds(),
        **compare_with_estimate(estimate, statistics.mean(windows), held_gib(session), config.num_hidden_layers),
        "profile": profile.summary,
        "losses": [round(entry["loss"], 5) for entry in logs],
        "grad_norms": [round(entry["grad_norm"], 5) for entry in logs],
        "parameters": asdict(weights),
    }


def compare_with_estimate(
    estimate: Estimate, measured_seconds: float, measured_gib: float, layers: int
) -> dict[str, Any]:
    """Return the fields of a row about the estimates of `hw3 check` and their errors."""
    fraction = fit_compiled_fraction(estimate.timings, layers, measured_seconds)
    return {
        "probe_seconds_per_step": round(estimate.seconds_per_step, 4),
        "probe_error": relative_error(estimate.seconds_per_step, measured_seconds),
        "probe_duration_seconds": round(estimate.duration_seconds, 1),
        "probe": asdict(estimate.timings) | {"compiled_fraction": fraction},
        "check_memory_gib": round(estimate.gib, 3),
        "held_gib": measured_gib,
        "check_memory_error": relative_error(estimate.gib, measured_gib),
    }


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("data/train.json"))
    parser.add_argument("--scratch", type=Path, default=Path("scratch/train_step"))
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--only", nargs="+", type=int, help="settings to measure, by number from 0")
    parser.add_argument("--name", help="name of the report, instead of the default")
    parser.add_argument("--append", action="store_true", help="keep the rows of the existing report (same machine)")
    parser.add_argument("--llama", action="store_true", help="Llama-3-8B's shape instead of Gemma-2-2B's")
    parser.add_argument(
        "--full-run", action="store_true", help="measure only the complete recipe: every step and checkpoint"
    )
    return parser.parse_args()


def main() -> int:
    """Measure every setting in this process, the CUDA-graph step first, and write the report after each."""
    arguments = parse_arguments()
    settings, shape = (LLAMA, "llama") if arguments.llama else (GEMMA, "gemma")
    recipe, base = f"recipes/{shape}/qlora.yaml", arguments.scratch / shape
    make_random_base(base, arguments.tokenizer, shape)
    tflops = measure_matmul_tflops()
    common = [f"model.pretrained_model_name_or_path={base}", f"data.train={arguments.data}"]
    common += ["data.eval=data/eval.json", "training.report_to=none"]
    if arguments.full_run:
        steps = load_recipe(Path(recipe), common).training["max_steps"]
        settings = [Setting("complete recipe, checkpoints included", "", steps)]
    default_name = "train_step" + "_llama" * arguments.llama + "_full_run" * arguments.full_run
    name = arguments.name or default_name
    rows = read_previous_rows(arguments.output, name) if arguments.append else {}
    for number, setting in enumerate(settings):
        if arguments.only and number not in arguments.only:
            continue
        run = arguments.scratch / f"{name}-{number}"
        shutil.rmtree(run, ignore_errors=True)
        logging_steps = LOGGING_STEPS if setting.steps >= 100 else SHORT_RUN_LOGGING_STEPS
        limits = [f"training.logging_steps={logging_steps}"]
        if not arguments.full_run:
            limits += [f"training.max_steps={setting.steps}", f"training.save_steps={setting.steps}"]
        with limit_gpu_memory(setting.name):
            overrides = [*common, *limits, *setting.overrides.split()]
            row = measure(recipe, overrides, setting, run, tflops, profiled=not arguments.full_run)
        rows[setting.name] = row
        print(json.dumps({key: row[key] for key in (*COLUMNS, "seconds_capturing")}), flush=True)
        shutil.rmtree(run)
        machine = describe_machine() | {"matmul_tflops": round(tflops, 1)}
        write_report(arguments.output, name, machine, list(rows.values()), COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
