"""Check, train, score and predict on a GPU that is limited to 8, 12, 16 and 24 GiB, with every recipe.

A process limits itself: PyTorch cannot allocate more than the limit less CUDA's context, and `torch.cuda.mem_get_info`
reports a GPU of that size. Then it runs `hw3 check`, six steps of `hw3 train` on the file's longest rows, `hw3 eval` of
the base model and one checkpoint on the longest rows, and `hw3 predict` of these. Base models have random weights of
the real shape, in bfloat16 as published; that of `recipes/tiny` is its own. Several cases may run at once, so the
seconds per step are upper bounds.

    python benchmarks/small_gpus.py [--only 'llama-*'] [--data FILE] [--tokenizer gemma=DIR smollm2=DIR]
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import gc
import io
import json
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmark_report import describe_machine, read_previous_rows, write_report
from memory import write_longest_rows
from random_models import make_random_base
from training_logs import held_gib, read_loss_logs, seconds_per_step

from hw3.cli import main as hw3
from hw3.runs.run import Run
from hw3.training.memory_estimate import GIB
from hw3.training.step_strategy import CUDA_CONTEXT_BYTES

LIMITS_GIB = (8, 12, 16, 24)
STEPS, TRAINING_ROWS, SCORED_ROWS = 6, 48, 8
RECIPES = ("llama", "qwen", "gemma", "smollm2", "tiny")  # the slowest first
# Most memory of a GPU without a limit that a case takes, in GiB, to decide which cases run at once.
MOST_GIB = {"llama": 24, "qwen": 20, "gemma": 14, "smollm2": 8, "tiny": 4}
GPU_SETTINGS = [  # for recipes/tiny, which is for CPUs
    "training.use_cpu=false",
    "training.bf16=true",
    "model.dtype=bfloat16",
    "quantization.bnb_4bit_compute_dtype=bfloat16",
]
COLUMNS = {
    "setting": "recipe, GPU",
    "check": "`hw3 check`",
    "train": "`hw3 train`",
    "step": "step",
    "estimate_gib": "estimated GiB",
    "held_gib": "GiB, steps",
    "peak_gib": "peak, loading included",
    "peak_reserved_gib": "reserved",
    "seconds_per_step": "s/step",
    "eval": "`hw3 eval`",
    "predict": "`hw3 predict`",
}


class Case(NamedTuple):
    """A recipe and the memory of the GPU in GiB."""

    recipe: str
    limit_gib: int


CASES = {f"{recipe}-{limit}": Case(recipe, limit) for recipe in RECIPES for limit in LIMITS_GIB}


def limit_gpu(limit_bytes: int) -> None:
    """Let this process see and use a GPU with `limit_bytes` of memory, of which CUDA's context takes a part."""
    usable = limit_bytes - int(CUDA_CONTEXT_BYTES)
    torch.cuda.set_per_process_memory_fraction(usable / torch.cuda.mem_get_info()[1])
    torch.cuda.mem_get_info = lambda device=None: (usable - torch.cuda.memory_reserved(device), limit_bytes)


def run_command(*arguments: str | Path) -> dict[str, Any]:
    """Run `hw3` in this process; return its exit status, output, seconds and peak memory in GiB."""
    torch._dynamo.reset()  # compiled layers refer to the model
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held_before, output, started = torch.cuda.memory_reserved(), io.StringIO(), time.monotonic()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = hw3([str(argument) for argument in arguments])
    return {
        "command": arguments[0],
        "status": status,
        "output": output.getvalue(),
        "seconds": round(time.monotonic() - started, 1),
        "held_before_gib": round(held_before / GIB, 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2),
    }


def describe_outcome(result: dict[str, Any]) -> str:
    """Return how a command ended: `fits`, `refused` with a message, or `failed` with anything else.

    Training that had to choose another step, or smaller micro-batches, does not fit as `hw3 check` reports.
    """
    if result["status"] == 0:
        smaller = "; continuing with" in result["output"] or result["output"].count("speed auto:") > 1
        return "fits in another way" if smaller and result["command"] == "train" else "fits"
    is_explained = "out of memory" in result["output"] and "Traceback" not in result["output"]
    return "refused" if is_explained else "failed"


def read_check(result: dict[str, Any]) -> dict[str, Any]:
    """Return what `hw3 check` reports about `speed: auto`: whether the run fits, and the memory of a step in GiB."""
    output = result["output"]
    if result["status"] != 0:
        return {"check": describe_outcome(result)}
    size, unit = re.search(r"^auto +([\d.]+) (\w+)", output, re.MULTILINE).groups()
    gib = float(size) / (1024 if unit == "MiB" else 1)
    fits = "This is more than the free memory" not in output
    without_headroom = "It fits, but leaves only" in output
    verdict = "does not fit" if not fits else "fits barely" if without_headroom else "fits"
    time_line = next((line for line in output.splitlines() if "the time of the run is not known" in line), None)
    return {"check": verdict, "estimate_gib": round(gib, 2), "time_not_known": time_line}


def read_training(run: Path) -> dict[str, Any]:
    """Return the strategy, memory and seconds per step of a finished run."""
    manifest = Run(run).read_manifest()
    assert manifest is not None
    speed, layout, session = manifest.speed, manifest.layout, manifest.sessions[-1]
    step = "CUDA graphs" if speed.cuda_graphs else "TRL's"
    weights = "bfloat16" if speed.dequantized or manifest.quantization is None else "4-bit"
    tokens = f", {speed.tokens_per_replay} tokens" if speed.cuda_graphs else f", {layout.rows_per_device} rows"
    return {
        "step": f"{step}, {weights}{tokens}",
        "speed": speed.model_dump(),
        "layout": layout.model_dump(),
        "peak_gib": session.peak_gib,
        "peak_reserved_gib": session.peak_reserved_gib,
        "peak_steps_gib": session.peak_steps_gib,
        "graphs_gib": session.graphs_gib,
        "held_gib": held_gib(session.model_dump()),
        "seconds_per_step": round(statistics.median(seconds_per_step(read_loss_logs(run)[2:])), 4),
    }


def measure(name: str, scratch: Path) -> dict[str, Any]:
    """Run all commands of a case in this process, which is then limited; return one row of the report."""
    recipe, limit_gib = CASES[name]
    limit_gpu(limit_gib * GIB)
    run, file = scratch / f"run-{name}", f"recipes/{recipe}/qlora.yaml"
    shutil.rmtree(run, ignore_errors=True)
    base = [] if recipe == "tiny" else [f"model.pretrained_model_name_or_path={scratch / recipe}"]
    overrides = [*base, *(GPU_SETTINGS if recipe == "tiny" else [])]
    overrides += [f"data.train={scratch / 'train.json'}", f"data.eval={scratch / 'eval.json'}", "data.too_long=drop"]
    overrides += [f"training.max_steps={STEPS}", f"training.save_steps={STEPS}", "training.logging_steps=1"]
    overrides += ["training.report_to=none"]
    results = {
        "check": run_command("check", file, "--run", run, *overrides),
        "train": run_command("train", file, "--run", run, *overrides),
    }
    row: dict[str, Any] = {"setting": f"`{recipe}`, {limit_gib} GiB", "recipe": recipe, "limit_gib": limit_gib}
    row |= read_check(results["check"])
    if results["train"]["status"] == 0:
        row |= read_training(run)
        data, new_tokens = scratch / "eval.json", "generation.max_new_tokens=64"
        results["eval"] = run_command("eval", run)
        results["predict"] = run_command("predict", run, data, new_tokens, "--checkpoint", f"checkpoint-{STEPS}")
    for command, result in results.items():
        if command != "check":
            outcome = describe_outcome(result)
            row[command] = outcome if command == "train" else f"{outcome}, {result['peak_gib']:.1f} GiB"
        output = result.pop("output")
        if result["status"] != 0:
            result["message"] = output[-600:]
        elif command == "train":
            result["choices"] = [
                line for line in output.splitlines() if "speed auto:" in line or "out of memory" in line
            ]
    shutil.rmtree(run, ignore_errors=True)
    return row | {"commands": results}


class Capacity:
    """GPU memory that cases share.

    Args:
        gib: the memory.
    """

    def __init__(self, gib: float) -> None:
        self._free, self._changed = gib, threading.Condition()

    @contextlib.contextmanager
    def taken(self, gib: float) -> Any:
        """Wait for `gib` of free memory, and take it inside the block."""
        with self._changed:
            self._changed.wait_for(lambda: self._free >= gib)
            self._free -= gib
        try:
            yield
        finally:
            with self._changed:
                self._free += gib
                self._changed.notify_all()


def run_case(name: str, arguments: argparse.Namespace, capacity: Capacity) -> dict[str, Any]:
    """Run a case in a process of its own; return its row."""
    recipe, limit_gib = CASES[name]
    output = arguments.scratch / f"{name}.json"
    output.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--case", name, "--scratch", str(arguments.scratch)]
    with (
        capacity.taken(min(limit_gib, MOST_GIB[recipe]) + CUDA_CONTEXT_BYTES / GIB),
        (arguments.scratch / f"{name}.log").open("w", encoding="utf-8") as log,
    ):
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    if output.exists():
        return json.loads(output.read_text(encoding="utf-8"))
    text = (arguments.scratch / f"{name}.log").read_text(encoding="utf-8")
    failed = {"setting": f"`{recipe}`, {limit_gib} GiB", "recipe": recipe, "limit_gib": limit_gib}
    return failed | {"train": "failed", "status": status, "message": text[-600:]}


def make_inputs(arguments: argparse.Namespace, recipes: list[str]) -> None:
    """Write the rows, and the base models that do not exist yet, each in a process that frees its memory."""
    write_longest_rows(arguments.data, arguments.scratch / "train.json", TRAINING_ROWS)
    write_longest_rows(arguments.data, arguments.scratch / "eval.json", SCORED_ROWS)
    started = []
    for recipe in recipes:
        if recipe != "tiny" and not (arguments.scratch / recipe / "config.json").exists():
            options = ["--make", recipe, "--scratch", str(arguments.scratch), "--tokenizer", *arguments.tokenizer]
            started.append(subprocess.Popen([sys.executable, __file__, *options]))
    if sum(process.wait() != 0 for process in started):
        raise SystemExit("a base model could not be made; its process printed the reason")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="CASE", help="names, or patterns of names")
    parser.add_argument("--data", type=Path, default=Path("data/train.json"))
    parser.add_argument("--tokenizer", nargs="+", default=[], metavar="RECIPE=DIR", help="default: that of data/tiny")
    parser.add_argument("--scratch", type=Path, default=Path("scratch/small_gpus"))
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--make", choices=RECIPES, help=argparse.SUPPRESS)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run each case and write the report after each."""
    arguments = parse_arguments()
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    if arguments.make:
        tokenizers = dict(pair.split("=", 1) for pair in arguments.tokenizer)
        tokenizer = Path(tokenizers.get(arguments.make, "data/tiny"))
        make_random_base(arguments.scratch / arguments.make, tokenizer, arguments.make)
        return 0
    if arguments.case:
        row = measure(arguments.case, arguments.scratch)
        (arguments.scratch / f"{arguments.case}.json").write_text(json.dumps(row), encoding="utf-8")
        return 0
    chosen = [name for name in CASES if any(fnmatch.fnmatchcase(name, pattern) for pattern in arguments.only)]
    make_inputs(arguments, list(dict.fromkeys(CASES[name].recipe for name in chosen)))
    rows = read_previous_rows(arguments.output, "small_gpus")
    capacity = Capacity(torch.cuda.mem_get_info()[0] / GIB - 2)
    with ThreadPoolExecutor(len(chosen)) as threads:
        started = [threads.submit(run_case, name, arguments, capacity) for name in chosen]
        for finished in as_completed(started):
            row = finished.result()
            rows[row["setting"]] = row
            print(json.dumps({key: row[key] for key in COLUMNS if key in row}), flush=True)
            settings = [f"`{recipe}`, {limit} GiB" for recipe in reversed(RECIPES) for limit in LIMITS_GIB]
            measured = [rows[setting] for setting in settings if setting in rows]
            write_report(arguments.output, "small_gpus", describe_machine(), measured, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
