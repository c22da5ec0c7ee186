"""Measure where the time of a training step goes: a table of the GPU's kernels in groups, and of its idle time.

The recipe runs through `hw3 train`'s own code. Some replayed steps near the end are recorded by PyTorch's profiler,
which makes them a little slower; the seconds per step come from the steps before.

    python benchmarks/step_kernels.py --base data/smollm2 --data FILE [--recipe FILE] [--steps N]
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmark_report import describe_machine, write_report
from train_step import (
    PROFILE_STEPS_BEFORE_END,
    PROFILED_STEPS,
    KernelProfile,
    StepWork,
    count_work,
    measure_matmul_tflops,
)
from training_logs import read_loss_logs, seconds_per_step

from hw3.config.recipe import load_recipe
from hw3.modeling.loading import load_model_config
from hw3.runs.run import Run
from hw3.training.memory_estimate import count_weights
from hw3.training.train import train

LOGGING_STEPS = 5
# A longer gap is no delay between kernels of one graph: the GPU waits for the CPU.
MAX_GRAPH_GAP_MICROSECONDS = 10
MAX_LISTED = 25
# The first group whose pattern occurs in a kernel's name, in any case.
GROUPS = {
    "norms, activations, RoPE, and sums: compiled by Inductor": "^triton_",
    "attention": "flash|fmha|sdpa|attention",
    "matrix products": "gemm|gemv|cutlass|nvjet|xmma|splitk|cublas",
    "optimizer, clipping, copies of the adapters": "multi_tensor_apply|adam|norm",
    "other copies and fills": "memcpy|memset|copy|fill|catarray",
    "other kernels": "",
}
COLUMNS = {"group": "", "kernels": "kernels per step", "milliseconds": "ms per step", "share": "share"}


class Kernel(NamedTuple):
    """One execution of a kernel, or one copy: its name, and start and end in microseconds."""

    name: str
    start: float
    end: float


def find_group(name: str) -> str:
    """Return the group of a kernel."""
    return next(group for group, pattern in GROUPS.items() if re.search(pattern, name, re.IGNORECASE))


def read_kernels(profiler: torch.profiler.profile) -> list[Kernel]:
    """Return what the GPU executed, in order."""
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [Kernel(event.name, event.time_range.start, event.time_range.end) for event in events]
    return sorted(kernels, key=lambda kernel: kernel.start)


def summarize_kernels(kernels: Sequence[Kernel], wall_seconds: float, steps: int) -> list[dict[str, Any]]:
    """Return the rows of the table: the complete step, each group of kernels, and idle time.

    Args:
        kernels: Of all recorded steps, in order.
        wall_seconds: Time of these steps by the clock.
        steps: Their number.

    Returns:
        Rows with the fields of `COLUMNS`. The first one also has the longest kernels and the longest gaps.
    """
    calls, busy, names = Counter[str](), Counter[str](), Counter[str]()
    gaps: Counter[str] = Counter()
    graph_gaps = cpu_gaps = 0.0
    end = kernels[0].start if kernels else 0.0
    previous = ""
    for kernel in kernels:
        gap = max(0.0, kernel.start - end)
        if gap > MAX_GRAPH_GAP_MICROSECONDS:
            cpu_gaps += gap
            gaps[f"{previous[:60]} -> {kernel.name[:60]}"] += gap
        else:
            graph_gaps += gap
        # The part that overlaps an earlier kernel is not counted again, so that groups and gaps add up.
        duration = max(0.0, kernel.end - max(kernel.start, end))
        calls[find_group(kernel.name)] += 1
        busy[find_group(kernel.name)] += duration
        names[kernel.name] += duration
        end, previous = max(end, kernel.end), kernel.name
    wall = wall_seconds * 1e6

    def row(group: str, count: int | None, microseconds: float) -> dict[str, Any]:
        return {
            "group": group,
            "kernels": "" if count is None else round(count / steps, 1),
            "milliseconds": round(microseconds / 1e3 / steps, 2),
            "share": f"{microseconds / wall:.1%}",
        }

    counts = Counter(kernel.name for kernel in kernels)
    details = {
        "longest_kernels": [
            {"kernel": name[:100], "calls": counts[name] / steps, "milliseconds": round(time / 1e3 / steps, 3)}
            for name, time in names.most_common(MAX_LISTED)
        ],
        "longest_gaps": [
            {"between": name, "milliseconds": round(time / 1e3 / steps, 3)}
            for name, time in gaps.most_common(MAX_LISTED)
        ],
    }
    waiting = wall - sum(busy.values()) - graph_gaps
    return [
        row("a step", len(kernels), wall) | details,
        *(row(group, calls[group], busy[group]) for group in GROUPS if calls[group]),
        row(f"idle up to {MAX_GRAPH_GAP_MICROSECONDS} µs, between kernels", None, graph_gaps),
        row("idle longer, waiting for the CPU", None, waiting),
    ]


class GroupedKernelProfile(KernelProfile):
    """Record the kernels of some steps; `summary["rows"]` has the rows of the table."""

    def _summarize(self, profiler: torch.profiler.profile, wall_seconds: float) -> dict[str, Any]:
        return {"rows": summarize_kernels(read_kernels(profiler), wall_seconds, self.steps)}


def measure(recipe_file: Path, overrides: list[str], run: Path, steps: int) -> list[dict[str, Any]]:
    """Train and return the rows of the report."""
    tflops = measure_matmul_tflops()
    limits = [f"training.max_steps={steps}", f"training.save_steps={steps}", f"training.logging_steps={LOGGING_STEPS}"]
    recipe = load_recipe(recipe_file, [*overrides, *limits, "training.report_to=none"])
    shutil.rmtree(run, ignore_errors=True)
    with GroupedKernelProfile(steps - PROFILE_STEPS_BEFORE_END, PROFILED_STEPS) as profile:
        assert train(recipe, run) == 0
    manifest, logs = Run(run).read_manifest(), read_loss_logs(run)
    seconds = statistics.median(seconds_per_step(logs[1 : (steps - PROFILE_STEPS_BEFORE_END) // LOGGING_STEPS]))
    weights = count_weights(load_model_config(recipe.model))
    work: StepWork = count_work(recipe, 2 * LOGGING_STEPS, steps, weights, manifest.parameters.trained)
    rows = profile.summary["rows"]
    rows[0] |= {
        "recipe": str(recipe_file),
        "speed": manifest.speed.model_dump(),
        "layout": manifest.layout.model_dump(),
        "rows_per_step": recipe.rows_per_step,
        "tokens_per_step": round(work.tokens, 1),
        "seconds_per_step_without_profiler": round(seconds, 5),
        "seconds_at_limit": round(work.flops / tflops / 1e12, 5),
        "matmul_tflops": round(tflops, 1),
        "seconds_capturing": manifest.sessions[-1].model_dump().get("seconds_capturing"),
    }
    return rows


def main() -> int:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/smollm2/qlora.yaml"))
    parser.add_argument("--base", help="folder of the base model, instead of the recipe's")
    parser.add_argument("--data", type=Path, default=Path("data/train.json"), help="rows to train on")
    parser.add_argument("--steps", type=int, default=120, help="40 or more")
    parser.add_argument("--scratch", type=Path, default=Path("scratch/step_kernels"))
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--name", default="step_kernels", help="name of the report")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes of the recipe")
    arguments = parser.parse_args()
    overrides = [f"data.train={arguments.data}", "data.eval=data/eval.json", *arguments.overrides]
    if arguments.base:
        overrides.append(f"model.pretrained_model_name_or_path={arguments.base}")
    rows = measure(arguments.recipe, overrides, arguments.scratch / arguments.name, arguments.steps)
    write_report(arguments.output, arguments.name, describe_machine(), rows, COLUMNS)
    print(json.dumps(rows[0] | {"longest_kernels": rows[0]["longest_kernels"][:8]}))
    print((arguments.output / f"{arguments.name}.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
