"""Output-only perplexity of saved checkpoints on one GPU: the course's loop, ours, and a sweep of 35 checkpoints.

Random weights of Gemma-2-2B's shape with LoRA r 64 on every linear layer; figures of time and memory do not depend on
what the weights are.

    python benchmarks/evaluation.py --tokenizer DIR --data FILE      # the real vocabulary; rows to score
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
from bases import make_base
from gpu_recipe import RECIPE
from launching import sweep
from peft import get_peft_model
from report import machine, write_report

from hw3.common.atomic_io import write_atomically
from hw3.config.recipe import Recipe, load_recipe
from hw3.data.rows import read_rows
from hw3.data.tokenization import EncodedRow, Encoder
from hw3.evaluation.batch_size import GPU_TOKENS_PER_BATCH
from hw3.evaluation.perplexity import score_rows
from hw3.modeling.adapter_io import read_adapter
from hw3.modeling.adapter_slot import AdapterSlot, lora_config
from hw3.modeling.loading import load_base, load_tokenizer
from hw3.modeling.quantization import dequantize
from hw3.runs.checkpoints import complete_checkpoints, mark_complete

CHECKPOINTS = 35
COURSE_ROWS = 25


def make_checkpoints(recipe: Recipe, run: Path, count: int = CHECKPOINTS) -> None:
    """Complete checkpoints with random adapters, in the form that training leaves."""
    model = get_peft_model(load_base(recipe, torch.device("cuda", 0)), lora_config(recipe.lora))
    for number in range(1, count + 1):
        torch.manual_seed(number)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter, dtype=torch.float32) * 0.01
        folder = run / f"checkpoint-{number * 100}"
        model.save_pretrained(folder)
        write_atomically(folder / "trainer_state.json", json.dumps({"log_history": []}))
        mark_complete(folder, number * 100)


def make_run(run: Path, tokenizer: Path, data: dict[str, Path], count: int = CHECKPOINTS) -> Recipe:
    """A run of the Gemma recipe with random checkpoints, on random weights beside it; what made it is let go of.

    Args:
        run: the folder to make.
        tokenizer: for `make_base`.
        data: files by their key in the recipe's `data` section.
        count: checkpoints to make.

    Returns:
        Its recipe.
    """
    base = run.with_name("gemma-2-2b-random")
    make_base(base, tokenizer)
    overrides = [f"model.pretrained_model_name_or_path={base}", *(f"data.{key}={path}" for key, path in data.items())]
    recipe = load_recipe(Path(RECIPE), overrides)
    write_atomically(run / "recipe.yaml", recipe.to_yaml())
    make_checkpoints(recipe, run, count)
    release()
    return recipe


@torch.no_grad()
def course_loop(model: torch.nn.Module, rows: list[EncodedRow]) -> list[float]:
    """The course's metric as its text says: one row at a time, full logits, float32 cross-entropy."""
    perplexities = []
    for row in rows:
        ids = torch.tensor([row.input_ids], device="cuda")
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        start = len(row.prompt_ids)
        nll = torch.nn.functional.cross_entropy(logits[0, start - 1 : -1].float(), ids[0, start:])
        perplexities.append(math.exp(nll.item()) if nll.item() < 709 else math.inf)
    return perplexities


def seconds(work: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Median and extremes of a piece of GPU work, in seconds."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return {"median": round(statistics.median(times), 4), "min": round(min(times), 4), "max": round(max(times), 4)}


def peak_of(work: Callable[[], Any]) -> float:
    """Peak GPU memory of a piece of work, in GiB."""
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return round(torch.cuda.max_memory_allocated() / 2**30, 2)


def score(
    model: Any, rows: list[EncodedRow], reuse: bool = True, budget: int = GPU_TOKENS_PER_BATCH
) -> Callable[[], Any]:
    """Our scorer, ready to be timed."""
    return lambda: score_rows(model, rows, tokens_per_batch=budget, reuse_prefix=reuse)


def measure_sweep(run: Path, scratch: Path) -> list[dict[str, Any]]:
    """`hw3 eval` of the base and every checkpoint, in a process of its own, and where its time goes."""
    report = sweep(run, scratch / "sweep.json")
    parts, began, over = report["parts"], report["began"], report["over"]
    parts["the rest of the command: rows, prompts, the picture"] = report["ended"] - began - sum(parts.values())
    parts["ending Python"] = over - report["ended"]
    rows = [(f"sweep: base and {CHECKPOINTS} checkpoints, the whole process", over - began)]
    rows += [(f"sweep, of which {part}", seconds) for part, seconds in parts.items()]
    rows += [(f"sweep, {part}, in a thread beside all this", seconds) for part, seconds in report["beside"].items()]
    return [{"setting": setting, "seconds_sweep": round(seconds, 2)} for setting, seconds in rows]


def measure_packed(recipe: Recipe, rows: list[EncodedRow], adapter: Path) -> list[dict[str, Any]]:
    """The course's loop, and ours with the base left in NF4."""
    model = load_base(recipe, torch.device("cuda", 0)).eval()
    AdapterSlot(model).load(adapter)
    course_loop(model, rows[:3])
    timed = seconds(lambda: course_loop(model, rows[:COURSE_ROWS]), 2)
    course = {
        "setting": f"the course's loop, NF4, one row at a time ({COURSE_ROWS} rows, scaled to {len(rows)})",
        "seconds_per_checkpoint": round(timed["median"] * len(rows) / COURSE_ROWS, 2),
        "peak_gib": peak_of(lambda: course_loop(model, rows[:COURSE_ROWS])),
    }
    return [course, row_of("ours, NF4 kept packed", score(model, rows))]


def measure_plain(recipe: Recipe, shots: dict[int, list[EncodedRow]], adapters: list[Path]) -> list[dict[str, Any]]:
    """Ours with the base dequantized once, and where the rest of the time goes."""
    began = time.perf_counter()
    model = load_base(recipe, torch.device("cuda", 0)).eval()
    loaded = time.perf_counter() - began
    began = time.perf_counter()
    model = dequantize(model)
    dequantized = time.perf_counter() - began
    slot = AdapterSlot(model)
    slot.load(adapters[0])
    score(model, shots[0])()
    found = []
    for number, rows in shots.items():
        for reuse in (True, False):
            prefix = "prefix reused" if reuse else "prefix computed each time"
            found.append(
                row_of(f"ours, dequantized once, {number} worked examples, {prefix}", score(model, rows, reuse))
            )
    for budget in (1024, 2048, 8192):
        setting = f"ours, dequantized once, 0 worked examples, {budget} tokens a batch"
        found.append(row_of(setting, score(model, shots[0], True, budget)))
    found[0]["kernels"] = kernels(score(model, shots[0]))
    files, folders = [read_adapter(folder, pinned=True) for folder in adapters[:5]], iter(adapters[5:])
    reading = seconds(lambda: read_adapter(next(folders), pinned=True), 5)["median"]
    found.append({"setting": "reading and hashing one adapter, in a thread", "seconds_per_checkpoint": reading})
    swaps = iter(files)
    putting = seconds(lambda: slot.put(next(swaps)), 5)["median"]
    found.append({"setting": "putting it into the base", "seconds_per_checkpoint": putting})
    found.append({"setting": "loading the base (NF4)", "seconds_per_checkpoint": round(loaded, 2)})
    found.append({"setting": "dequantizing it", "seconds_per_checkpoint": round(dequantized, 2)})
    return found


def row_of(setting: str, work: Callable[[], Any]) -> dict[str, Any]:
    """One row of the report."""
    work()
    timed = seconds(work, 5)
    return {
        "setting": setting,
        "seconds_per_checkpoint": timed["median"],
        "spread": [timed["min"], timed["max"]],
        "peak_gib": peak_of(work),
    }


def release() -> None:
    """Let go of models that nothing names any more."""
    gc.collect()
    torch.cuda.empty_cache()


def kernels(work: Callable[[], Any]) -> list[dict[str, Any]]:
    """Where the GPU's time goes in a piece of work: kernels by their share."""
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
    """Prepare, measure, sweep, write the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, default=Path("scratch/gpu_recipe"))
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    arguments = parser.parse_args()
    run = arguments.scratch / "sweep"
    recipe = make_run(run, arguments.tokenizer, {"eval": arguments.data})
    whole = measure_sweep(run, arguments.scratch)
    write_report(arguments.out, "evaluation", machine(), whole, COLUMNS)
    encoder = Encoder(load_tokenizer(recipe.model), recipe.prompt)
    raw, adapters = read_rows(arguments.data), [checkpoint.path for checkpoint in complete_checkpoints(run)]
    shots = {number: [encoder.encode(row, recipe.prompt.examples[:number]) for row in raw] for number in (0, 4)}
    rows = measure_packed(recipe, shots[0], adapters[0])
    write_report(arguments.out, "evaluation", machine(), rows + whole, COLUMNS)
    release()
    rows += measure_plain(recipe, shots, adapters)
    write_report(arguments.out, "evaluation", machine(), rows + whole, COLUMNS)
    print((arguments.out / "evaluation.md").read_text())
    return 0


COLUMNS = {
    "setting": "setting",
    "seconds_per_checkpoint": "s a checkpoint",
    "seconds_sweep": "s, sweep",
    "peak_gib": "peak GiB",
}


if __name__ == "__main__":
    sys.exit(main())
