"""Measure how much of a resume and of a sweep is spent on checksums, on one GPU and Gemma-2-2B's shape.

A run of 40 steps is stopped after 20 and resumed, which is the least that a resumed run can do; a sweep scores the base
model and 35 checkpoints. In both, every function of `hw3` that hashes is timed. Checksums of checkpoints and data files
protect them from damage. The hash of the base model identifies it. Hashing in a background thread takes no time of its
own unless another thread waits for it.

    python benchmarks/checksums.py --tokenizer DIR --data FILE      # Gemma's tokenizer; rows to score
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import pkgutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmark_report import describe_machine, write_report
from evaluation import CHECKPOINTS, make_random_run
from gpu_recipe import RECIPE
from launching import launch, train

import hw3
from hw3.cli import main as run_hw3
from hw3.modeling import adapter_io

STEPS = 20  # of each session
BASE_MODULE = "hw3.modeling.fingerprint"  # hashes the files of the base model
COLUMNS = {
    "setting": "setting",
    "seconds_total": "s, complete process",
    "seconds_waiting": "s, main thread: checksums, and waiting for adapters",
    "share": "share",
    "seconds_hashing": "s, hashing in all threads",
    "seconds_base": "s, hashing the base model",
}


class HashTimer:
    """Times of hashing.

    Attributes:
        intervals: (module, whether the main thread hashed, start, end) of each hash.
    """

    def __init__(self) -> None:
        self.intervals: list[tuple[str, bool, float, float]] = []

    def timed(self, hash_data: Callable[..., Any], module: str) -> Callable[..., Any]:
        """Wrap a function that hashes, so that its calls are recorded."""

        def run(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return hash_data(*arguments, **options)
            finally:
                is_main = threading.current_thread() is threading.main_thread()
                self.intervals.append((module, is_main, start, time.perf_counter()))

        return run

    def install(self) -> None:
        """Time every function that hashes, in all modules of `hw3`, and the main thread's wait for adapters."""
        for found in pkgutil.walk_packages(hw3.__path__, "hw3."):
            if found.name.endswith("__main__"):
                continue
            module = importlib.import_module(found.name)
            if module.__name__ != "hw3.common.hashing" and hasattr(module, "file_sha256"):
                module.file_sha256 = self.timed(module.file_sha256, module.__name__)
            if module.__name__ != "hw3.common.hashing" and getattr(module, "hashlib", None) is hashlib:
                module.hashlib = SimpleNamespace(sha256=self.timed(hashlib.sha256, module.__name__))
        adapter_io.AdapterPrefetcher.get = self.timed(adapter_io.AdapterPrefetcher.get, adapter_io.__name__)

    def seconds(self, *, of_base: bool, main_only: bool) -> float:
        """Return the seconds in which at least one of the chosen threads hashed.

        Args:
            of_base: hashing of the base model; otherwise of all other files.
            main_only: count the main thread only.
        """
        chosen = sorted(
            (start, end)
            for module, is_main, start, end in self.intervals
            if (module == BASE_MODULE) == of_base and (is_main or not main_only)
        )
        total, last_end = 0.0, 0.0
        for start, end in chosen:
            total += max(0.0, end - max(start, last_end))
            last_end = max(last_end, end)
        return total


def run_timed(report: Path, arguments: list[str]) -> int:
    """Run `hw3` in this process, and write the seconds of hashing; return the exit status."""
    timer = HashTimer()
    timer.install()
    status = run_hw3(arguments)
    seconds = {
        "seconds_waiting": timer.seconds(of_base=False, main_only=True),
        "seconds_hashing": timer.seconds(of_base=False, main_only=False),
        "seconds_base": timer.seconds(of_base=True, main_only=False),
    }
    report.write_text(json.dumps(seconds), encoding="utf-8")
    return status


def measure(setting: str, scratch: Path, arguments: list[str]) -> dict[str, Any]:
    """Run a command in a process of its own; return one row of the report."""
    report = scratch / "checksums.json"
    started = time.monotonic()
    launch([__file__, "--run-timed", str(report), *arguments], scratch / "checksums.log", processes=1)
    total = time.monotonic() - started
    seconds = json.loads(report.read_text(encoding="utf-8"))
    row = {"setting": setting, "seconds_total": round(total, 1)}
    row |= {name: round(value, 2) for name, value in seconds.items()}
    return row | {"share": f"{seconds['seconds_waiting'] / total:.1%}"}


def main() -> int:
    """Measure a resume and a sweep, and write the report."""
    if sys.argv[1:2] == ["--run-timed"]:
        return run_timed(Path(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoints", type=int, default=CHECKPOINTS)
    parser.add_argument("--scratch", type=Path, default=Path("scratch/gpu_recipe"))
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    arguments = parser.parse_args()
    sweep_run, resumed_run = arguments.scratch / "sweep", arguments.scratch / "resumed"
    make_random_run(sweep_run, arguments.tokenizer, {"eval": arguments.data}, arguments.checkpoints)
    overrides = [f"model.pretrained_model_name_or_path={arguments.scratch / 'gemma-2-2b-random'}"]
    overrides += ["data.train=data/train.json", f"data.eval={arguments.data}", "training.report_to=none"]
    overrides += [f"training.save_steps={STEPS}", "training.logging_steps=5"]
    train(RECIPE, [*overrides, f"training.max_steps={STEPS}"], resumed_run, processes=1)
    resume = ["train", RECIPE, "--run", str(resumed_run), *overrides, f"training.max_steps={2 * STEPS}"]
    settings = {
        f"resume after {STEPS} steps, for {STEPS} more": resume,
        f"sweep of the base model and {arguments.checkpoints} checkpoints": ["eval", str(sweep_run)],
    }
    rows = [measure(setting, arguments.scratch, command) for setting, command in settings.items()]
    write_report(arguments.output, "checksums", describe_machine(), rows, COLUMNS)
    print((arguments.output / "checksums.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
