"""Measure output-only perplexity on one GPU: the course's loop, this project, and a sweep of 35 checkpoints.

The base model has random weights of Gemma-2-2B's shape, the adapters LoRA r 64 on every linear layer. Time and memory
do not depend on the values of the weights.

    python benchmarks/evaluation.py --tokenizer DIR --data FILE      # Gemma's tokenizer; rows to score
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmark_report import describe_machine, write_report
from gpu_recipe import RECIPE
from launching import sweep
from peft import get_peft_model
from random_models import make_random_base

from hw3.common.atomic_io import write_atomically
from hw3.config.recipe import Recipe, load_recipe
from hw3.data.rows import read_rows
from hw3.data.tokenization import EncodedRow, Encoder
from hw3.evaluation.batch_size import GPU_TOKENS_PER_BATCH
from hw3.evaluation.perplexity import score_rows
from hw3.modeling.adapter_io import read_adapter
from hw3.modeling.adapter_slot import AdapterSlot, build_lora_config
from hw3.modeling.loading import load_base_model, load_tokenizer
from hw3.modeling.quantization import dequantize
from hw3.runs.checkpoints import find_complete_checkpoints, mark_complete

CHECKPOINTS = 35
COURSE_LOOP_ROWS = 25
REPEATS = 5
COLUMNS = {
    "setting": "setting",
    "seconds_per_checkpoint": "s per checkpoint",
    "seconds_sweep": "s, sweep",
    "peak_gib": "peak GiB",
}


def make_random_checkpoints(recipe: Recipe, run: Path, count: int = CHECKPOINTS) -> None:
    """Write complete checkpoints with random adapters, in the form that training writes."""
    model = get_peft_model(load_base_model(recipe, torch.device("cuda", 0)), build_lora_config(recipe.lora))
    for number in range(1, count + 1):
        torch.manual_seed(number)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter, dtype=torch.float32) * 0.01
        folder = run / f"checkpoint-{number * 100}"
        model.save_pretrained(folder)
        write_atomically(folder / "trainer_state.json", json.dumps({"log_history": []}))
        mark_complete(folder, number * 100)


def make_random_run(run: Path, tokenizer: Path, data: dict[str, Path], count: int = CHECKPOINTS) -> Recipe:
    """Write a run of the Gemma recipe with random checkpoints and its random base model, then free the GPU's memory.

    Args:
        run: The run folder to write; the base model is written beside it.
        tokenizer: As in `make_random_base`.
        data: Files by their key in the recipe's `data` section.
        count: The number of checkpoints.

    Returns:
        The run's recipe.
    """
    base = run.with_name("gemma-2-2b-random")
    make_random_base(base, tokenizer)
    overrides = [f"model.pretrained_model_name_or_path={base}", *(f"data.{key}={path}" for key, path in data.items())]
    recipe = load_recipe(Path(RECIPE), overrides)
    write_atomically(run / "recipe.yaml", recipe.to_yaml())
    make_random_checkpoints(recipe, run, count)
    free_gpu_memory()
    return recipe


@torch.no_grad()
def score_as_the_course(model: torch.nn.Module, rows: list[EncodedRow]) -> list[float]:
    """Return perplexities as the course's text defines them: one row at a time, full logits, float32 cross-entropy."""
    perplexities = []
    for row in rows:
        ids = torch.tensor([row.input_ids], device="cuda")
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        start = len(row.prompt_ids)
        nll = torch.nn.functional.cross_entropy(logits[0, start - 1 : -1].float(), ids[0, start:])
        perplexities.append(math.exp(nll.item()) if nll.item() < 709 else math.inf)  # exp(709) is float64's limit
    return perplexities


def time_gpu_work(work: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Return the median, shortest and longest seconds of some GPU work."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return {"median": round(statistics.median(times), 4), "min": round(min(times), 4), "max": round(max(times), 4)}


def measure_peak_gib(work: Callable[[], Any]) -> float:
    """Return the peak of allocated GPU memory during some work, in GiB."""
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return round(torch.cuda.max_memory_allocated() / 2**30, 2)


def scoring(
    model: Any, rows: list[EncodedRow], reuse_prefix: bool = True, tokens_per_batch: int = GPU_TOKENS_PER_BATCH
) -> Callable[[], Any]:
    """Return this project's scoring of some rows as a function without arguments."""
    return lambda: score_rows(model, rows, tokens_per_batch=tokens_per_batch, reuse_prefix=reuse_prefix)


def measure_sweep(run: Path, scratch: Path) -> list[dict[str, Any]]:
    """Run `hw3 eval` on all checkpoints; return the seconds of the complete process and of its parts."""
    report = sweep(run, scratch / "sweep.json")
    parts, started, finished = report["parts"], report["started"], report["finished"]
    parts["the rest: reading rows, prompts, plotting"] = report["ended"] - started - sum(parts.values())
    parts["exiting Python"] = finished - report["ended"]
    rows = [(f"sweep of the base model and {CHECKPOINTS} checkpoints, complete process", finished - started)]
    rows += [(f"sweep, of which {part}", seconds) for part, seconds in parts.items()]
    rows += [(f"sweep, in a background thread: {part}", seconds) for part, seconds in report["background"].items()]
    return [{"setting": setting, "seconds_sweep": round(seconds, 2)} for setting, seconds in rows]


def measure_4bit(recipe: Recipe, rows: list[EncodedRow], adapter: Path) -> list[dict[str, Any]]:
    """Measure the course's loop and this project on the 4-bit base model."""
    model = load_base_model(recipe, torch.device("cuda", 0)).eval()
    AdapterSlot(model).load(adapter)
    score_as_the_course(model, rows[:3])  # warm-up
    seconds = time_gpu_work(lambda: score_as_the_course(model, rows[:COURSE_LOOP_ROWS]), 2)
    course = {
        "setting": f"the course's loop: 4-bit, one row at a time ({COURSE_LOOP_ROWS} rows, scaled to {len(rows)})",
        "seconds_per_checkpoint": round(seconds["median"] * len(rows) / COURSE_LOOP_ROWS, 2),
        "peak_gib": measure_peak_gib(lambda: score_as_the_course(model, rows[:COURSE_LOOP_ROWS])),
    }
    return [course, measure_work("this project, 4-bit", scoring(model, rows))]


def measure_dequantized(
    recipe: Recipe, rows_by_shots: dict[int, list[EncodedRow]], adapters: list[Path]
) -> list[dict[str, Any]]:
    """Measure this project on the dequantized base model, and the time of loading the base model and the adapters."""
    started = time.perf_counter()
    model = load_base_model(recipe, torch.device("cuda", 0)).eval()
    seconds_loading = time.perf_counter() - started
    started = time.perf_counter()
    model = dequantize(model)
    seconds_dequantizing = time.perf_counter() - started
    slot = AdapterSlot(model)
    slot.load(adapters[0])
    scoring(model, rows_by_shots[0])()  # warm-up
    report = []
    for shots, rows in rows_by_shots.items():
        setting = f"this project, dequantized, {shots} few-shot examples"
        report.append(measure_work(f"{setting}, prefix reused", scoring(model, rows)))
        report.append(measure_work(f"{setting}, prefix computed for every row", scoring(model, rows, False)))
    for tokens in (1024, 2048, 8192):
        setting = f"this project, dequantized, 0 few-shot examples, {tokens} tokens per batch"
        report.append(measure_work(setting, scoring(model, rows_by_shots[0], tokens_per_batch=tokens)))
    report[0]["kernels"] = profile_kernels(scoring(model, rows_by_shots[0]))
    loaded, folders = [read_adapter(folder, pin_memory=True) for folder in adapters[:REPEATS]], iter(adapters[REPEATS:])
    seconds_reading = time_gpu_work(lambda: read_adapter(next(folders), pin_memory=True), REPEATS)["median"]
    next_adapter = iter(loaded)
    seconds_copying = time_gpu_work(lambda: slot.set(next(next_adapter)), REPEATS)["median"]
    times = {
        "reading and hashing one adapter, in a background thread": seconds_reading,
        "copying one adapter into the base model": seconds_copying,
        "loading the base model in 4 bits": round(seconds_loading, 2),
        "dequantizing the base model": round(seconds_dequantizing, 2),
    }
    return report + [{"setting": setting, "seconds_per_checkpoint": seconds} for setting, seconds in times.items()]


def measure_work(setting: str, work: Callable[[], Any]) -> dict[str, Any]:
    """Time some work after a warm-up and measure its memory; return one row of the report."""
    work()
    seconds = time_gpu_work(work, REPEATS)
    return {
        "setting": setting,
        "seconds_per_checkpoint": seconds["median"],
        "spread": [seconds["min"], seconds["max"]],
        "peak_gib": measure_peak_gib(work),
    }


def free_gpu_memory() -> None:
    """Free the memory of models that are no longer referenced."""
    gc.collect()
    torch.cuda.empty_cache()


def profile_kernels(work: Callable[[], Any]) -> list[dict[str, Any]]:
    """Return the 20 kernels that take the most GPU time in some work, with their share of it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events)
    return [
        {
            "kernel": event.key[:100],
            "calls": event.count,
            "milliseconds": round(event.self_device_time_total / 1000, 2),
            "share": round(event.self_device_time_total / total, 3),
        }
        for event in events[:20]
    ]


def main() -> int:
    """Make the run, measure the sweep and each setting, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, default=Path("scratch/gpu_recipe"))
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    arguments = parser.parse_args()
    run = arguments.scratch / "sweep"
    recipe = make_random_run(run, arguments.tokenizer, {"eval": arguments.data})
    sweep_rows = measure_sweep(run, arguments.scratch)
    write_report(arguments.output, "evaluation", describe_machine(), sweep_rows, COLUMNS)
    encoder = Encoder(load_tokenizer(recipe.model), recipe.prompt)
    data, adapters = read_rows(arguments.data), [checkpoint.path for checkpoint in find_complete_checkpoints(run)]
    rows_by_shots = {shots: [encoder.encode(row, recipe.prompt.examples[:shots]) for row in data] for shots in (0, 4)}
    rows = measure_4bit(recipe, rows_by_shots[0], adapters[0])
    write_report(arguments.output, "evaluation", describe_machine(), rows + sweep_rows, COLUMNS)
    free_gpu_memory()
    rows += measure_dequantized(recipe, rows_by_shots, adapters)
    write_report(arguments.output, "evaluation", describe_machine(), rows + sweep_rows, COLUMNS)
    print((arguments.output / "evaluation.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
