"""Seconds, memory and MFU of an optimizer step: the recipe as it runs, TRL in three settings, and larger steps.

Random weights of Gemma-2-2B's shape (and of Llama-3-8B's, with `--llama`), the real vocabulary, rows as given. Every
setting is trained by `hw3 train`'s own code; those of TRL by `speed: plain`, which is TRL's step under our trainer.

    python benchmarks/train_step.py --tokenizer DIR --data FILE [--whole] [--llama]
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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from bases import make_base
from logs import held_gib, logs_of, seconds_per_step
from report import STEP_COLUMNS, kept_rows, machine, write_report

import hw3.training.plan
import hw3.training.train
from hw3.config.recipe import Recipe, load_recipe
from hw3.data.rows import read_rows
from hw3.data.sampler import StepSampler
from hw3.data.tokenization import Encoder
from hw3.modeling.loading import load_config, load_tokenizer
from hw3.runs.run_dir import read_manifest
from hw3.training.memory_estimate import GIB, weight_counts
from hw3.training.plan import plan_run
from hw3.training.step_strategy import CONTEXT
from hw3.training.time_estimate import Timing, in_all, probe
from hw3.training.train import train
from hw3.training.trainer import CompletionTrainer

LOGGED = 10  # steps between two times, as in the recipe; 5 in short runs
PROFILED = (10, 6)  # steps from the end where kernels are recorded, and how many; those are not timed
PLAIN = "speed=plain"
TUNED = (
    "training.per_device_train_batch_size=8 training.gradient_accumulation_steps=1 "
    "training.activation_checkpointing=false training.optim=adamw_torch_fused"
)
# Name, overrides of the recipe, steps.
GEMMA = [
    ("speed: auto", "", 160),
    ("speed: lean", "speed=lean", 40),
    ("as the course's script: 4 x 2, activation checkpointing, paged AdamW", PLAIN, 40),
    ("TRL's defaults: 4 x 2, activation checkpointing, fused AdamW", f"{PLAIN} training.optim=adamw_torch_fused", 40),
    ("TRL tuned by hand: 8 x 1, activations kept, fused AdamW", f"{PLAIN} {TUNED}", 60),
    ("speed: auto, on a card of 8 GiB", "", 60),
    ("speed: auto, 16 rows a step", "training.gradient_accumulation_steps=4", 60),
    ("speed: auto, 32 rows a step", "training.gradient_accumulation_steps=8", 60),
    ("speed: auto, 64 rows a step", "training.gradient_accumulation_steps=16", 60),
]
LLAMA = [
    ("Llama-3-8B shape, speed: auto", "", 60),
    ("Llama-3-8B shape, TRL tuned by hand: 8 x 1, activations kept, fused AdamW", f"{PLAIN} {TUNED}", 40),
    ("Llama-3-8B shape, as the course's script: 1 x 8, activation checkpointing, paged AdamW", PLAIN, 30),
    ("Llama-3-8B shape, speed: lean", "speed=lean", 30),
    (
        "Llama-3-8B shape, TRL's defaults: 1 x 8, activation checkpointing, fused AdamW",
        f"{PLAIN} training.optim=adamw_torch_fused",
        30,
    ),
]


def matmul_tflops() -> float:
    """What the machine's bfloat16 matrix product reaches: 8192 cubed, median of ten."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(13):
        torch.cuda.synchronize()
        began = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * 8192**3 / statistics.median(times[3:]) / 1e12


class Profile:
    """Kernels of some steps in the middle of training, and how much of their time the GPU worked."""

    def __init__(self, first: int, steps: int) -> None:
        self.first, self.steps, self.table = first, steps, {}

    def __enter__(self) -> Profile:
        self.original = CompletionTrainer.training_step
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        began: dict[int, float] = {}

        def training_step(trainer: CompletionTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
            step = trainer.state.global_step
            if step in (self.first, self.first + self.steps) and step not in began:  # its first micro-batch
                torch.cuda.synchronize()
                began[step] = time.perf_counter()
                if step == self.first:
                    profiler.start()
                else:
                    profiler.stop()
                    self.table = self.summary(profiler.key_averages(), began[step] - began[self.first])
            return self.original(trainer, *args, **kwargs)

        CompletionTrainer.training_step = training_step
        return self

    def __exit__(self, *error: object) -> None:
        CompletionTrainer.training_step = self.original

    def summary(self, events: Any, wall: float) -> dict[str, Any]:
        """Milliseconds a step, the 25 longest kernels by name."""
        events = sorted(events, key=lambda event: -event.self_device_time_total)
        busy = sum(event.self_device_time_total for event in events)
        return {
            "milliseconds_profiled": round(wall * 1e3 / self.steps, 2),
            "milliseconds_of_kernels": round(busy / 1e3 / self.steps, 2),
            "kernels": [
                {
                    "kernel": event.key[:100],
                    "calls": round(event.count / self.steps, 1),
                    "milliseconds": round(event.self_device_time_total / 1e3 / self.steps, 3),
                }
                for event in events[:25]
            ],
        }


def compile_seconds() -> dict[str, float]:
    """Where compilation took its time, by PyTorch's own account; stages contain each other."""
    found = {name: round(sum(times), 1) for name, times in torch._dynamo.utils.compilation_time_metrics.items()}
    torch._dynamo.utils.compilation_time_metrics.clear()
    return {name: seconds for name, seconds in sorted(found.items(), key=lambda item: -item[1]) if seconds >= 1}


def what_check_tells(recipe: Recipe, run: Path) -> tuple[float, float, Timing, float]:
    """A step as `hw3 check` tells it beforehand: (seconds, GiB, the timings of the former, seconds that they took)."""
    plan = plan_run(recipe, run, 1)
    began = time.monotonic()
    timing = probe(recipe, plan.speed, plan.tokenizer, plan.rows, torch.device("cuda", 0))
    seconds = timing.seconds_per_step(load_config(recipe.model).num_hidden_layers)
    return seconds, plan.speed.memory.total / GIB, timing, time.monotonic() - began


@contextlib.contextmanager
def card_of(title: str) -> Iterator[None]:
    """As on a smaller card, where the title says so: no more memory can be had, and `speed: auto` knows it."""
    size = re.search("on a card of ([0-9]+) GiB", title)
    if size is None:
        yield
        return
    whole, real = torch.cuda.mem_get_info()[1], hw3.training.plan.least_memory
    held = int(size[1]) * GIB
    torch.cuda.set_per_process_memory_fraction(held / whole)
    for module in (hw3.training.plan, hw3.training.train):
        module.least_memory = lambda recipe, device: (held - int(CONTEXT), held)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        for module in (hw3.training.plan, hw3.training.train):
            module.least_memory = real


def error(told: float, measured: float) -> float:
    """Relative, signed: below 0 where less was told than was measured."""
    return round(told / measured - 1, 3)


def left_by_compiling(timing: Timing, layers: int, measured: float) -> float | None:
    """What `time_estimate.FUSED` would have to be for the probe to tell what was measured; None for TRL's own step."""
    if not timing.graphs:
        return None
    products = timing.products[0] * layers + timing.products[1]
    rest = in_all(timing.graphs, layers) - products
    return round((measured - products - in_all(timing.optimizer, layers)) / rest, 3)


def measure(
    recipe_path: str, overrides: list[str], name: str, steps: int, run: Path, tflops: float, profiled: bool
) -> dict[str, Any]:
    """Train under one setting; returns one row of the report."""
    recipe = load_recipe(Path(recipe_path), overrides)
    told, told_gib, timing, probing = what_check_tells(recipe, run)
    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    began = time.monotonic()
    with Profile(steps - PROFILED[0] if profiled else steps, PROFILED[1]) as profile:
        assert train(recipe, run) == 0
    seconds = time.monotonic() - began
    manifest = read_manifest(run)
    logs, logged = logs_of(run), recipe.training["logging_steps"]
    windows = seconds_per_step(logs[1 : (steps - PROFILED[0]) // logged])
    step = statistics.median(windows)
    # Rows as the sampler grouped them; the linear layers forward and backward by activations, adapters by weights as
    # well, the head on output positions.
    encoder = Encoder(load_tokenizer(recipe.model), recipe.prompt)
    rows = [encoder.encode(row) for row in read_rows(Path(recipe.data.train))]
    drawn = StepSampler([len(row) for row in rows], recipe.rows_per_step, recipe.seed).steps(0)[2 * logged : steps]
    tokens = statistics.mean(sum(len(rows[row]) for row in taken) for taken in drawn)
    outputs = statistics.mean(sum(len(rows[row].output_ids) for row in taken) for taken in drawn)
    config = load_config(recipe.model)
    linear, other = weight_counts(config)
    head = config.vocab_size * config.hidden_size
    flops = tokens * (4 * linear + 6 * manifest["parameters"]["trained"]) + outputs * 4 * head
    session = manifest["sessions"][-1]
    return {
        "setting": name,
        "overrides": " ".join(override for override in overrides if not override.startswith(("data.", "model."))),
        "speed": manifest["speed"],
        "layout": manifest["layout"],
        "steps": steps,
        "rows_per_step": recipe.rows_per_step,
        "tokens_per_step": round(tokens, 1),
        "output_tokens_per_step": round(outputs, 1),
        "seconds_per_step": round(step, 4),
        "seconds_per_step_range": [round(min(windows), 4), round(max(windows), 4)],
        "rows_per_second": round(recipe.rows_per_step / step, 1),
        "mfu": round(flops / step / tflops / 1e12, 3),
        "matmul_tflops": round(tflops, 1),
        "seconds_at_limit": round(flops / tflops / 1e12, 4),
        "peak_gib": session["peak_gib"],
        "peak_reserved_gib": session["peak_reserved_gib"],
        "seconds_capturing": session["seconds_capturing"],
        "seconds_whole": round(seconds, 1),
        "compile_seconds": compile_seconds(),
        "probe_seconds_per_step": round(told, 4),
        "probe_error": error(told, statistics.mean(windows)),
        "probe_took_seconds": round(probing, 1),
        "probe": asdict(timing)
        | {"fused": left_by_compiling(timing, config.num_hidden_layers, statistics.mean(windows))},
        "check_memory_gib": round(told_gib, 3),
        "held_gib": held_gib(session),
        "check_memory_error": error(told_gib, held_gib(session)),
        "profile": profile.table,
        "losses": [round(log["loss"], 5) for log in logs],
        "grad_norms": [round(log["grad_norm"], 5) for log in logs],
        "parameters": {"linear": linear, "other": other},
    }


def main() -> int:
    """Measure every setting in one process, the captured step first, and write the report after each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("data/train.json"))
    parser.add_argument("--scratch", type=Path, default=Path("scratch/train_step"))
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--only", nargs="+", type=int, help="settings to measure, by number from 0")
    parser.add_argument("--name", help="of the report, instead of its own")
    parser.add_argument("--go-on", action="store_true", help="add to the report that is there, of the same machine")
    parser.add_argument("--llama", action="store_true", help="Llama-3-8B's shape instead of Gemma-2-2B's")
    parser.add_argument(
        "--whole", action="store_true", help="the recipe from end to end instead: every step, every checkpoint"
    )
    arguments = parser.parse_args()
    settings, shape = (LLAMA, "llama") if arguments.llama else (GEMMA, "gemma")
    recipe, base = f"recipes/{shape}/qlora.yaml", arguments.scratch / shape
    make_base(base, arguments.tokenizer, shape)
    tflops = matmul_tflops()
    given = [f"model.pretrained_model_name_or_path={base}", f"data.train={arguments.data}"]
    given += ["data.eval=data/eval.json", "training.report_to=none"]
    if arguments.whole:
        steps = load_recipe(Path(recipe), given).training["max_steps"]
        settings = [("the whole recipe, checkpoints included", "", steps)]
    name = "train_step" + ("_llama" if arguments.llama else "") + ("_whole" if arguments.whole else "")
    name = arguments.name or name
    rows = kept_rows(arguments.out, name) if arguments.go_on else {}
    for number, (title, overrides, steps) in enumerate(settings):
        if arguments.only and number not in arguments.only:
            continue
        run = arguments.scratch / f"{name}-{number}"
        shutil.rmtree(run, ignore_errors=True)
        limits = [f"training.logging_steps={LOGGED if steps >= 100 else LOGGED // 2}"]
        if not arguments.whole:
            limits += [f"training.max_steps={steps}", f"training.save_steps={steps}"]
        with card_of(title):
            overridden = [*given, *limits, *overrides.split()]
            rows[title] = measure(recipe, overridden, title, steps, run, tflops, profiled=not arguments.whole)
        print(json.dumps({key: rows[title][key] for key in (*COLUMNS, "seconds_capturing")}), flush=True)
        shutil.rmtree(run)
        where = machine() | {"matmul_tflops": round(tflops, 1)}
        write_report(arguments.out, name, where, list(rows.values()), columns=COLUMNS)
    return 0


COLUMNS = STEP_COLUMNS | {"mfu": "MFU"}


if __name__ == "__main__":
    sys.exit(main())
