"""Measure how much CPU time a command takes to report a mistake, and write the table in `docs/benchmarks/`.

    python tools/time_mistakes.py [--before CHECKOUT] [--output DIR]

CPU time is that of the process and the system together, and depends little on what else the machine does.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from benchmark_report import describe_machine, write_report

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPE = "recipes/tiny/qlora.yaml"
REPEATS = 3
MISTAKES = {
    "unknown key": ["train", RECIPE, "training.lr=1e-4"],
    "wrong type": ["train", RECIPE, "lora.r=four"],
    "value out of range": ["train", RECIPE, "training.gradient_accumulation_steps=0"],
    "unknown choice": ["check", RECIPE, "model.dtype=int8"],
    "missing recipe": ["train", "recipes/tiny/none.yaml"],
    "missing prompt file": ["check", RECIPE, "prompt=none.yaml"],
    "missing data file": ["train", RECIPE, "data.eval=none.json"],
    "eval of an unknown run": ["eval", "outputs/none"],
    "predict with an unknown run": ["predict", "outputs/none", "data/eval.json"],
    "pack with a missing input file": ["pack", "outputs/none", "--input", "none.json"],
}


def measure_cpu_seconds(checkout: Path, arguments: list[str]) -> float:
    """Run `hw3` of a checkout with a mistake; return the CPU seconds of the process.

    Raises:
        RuntimeError: the command does not end with status 2.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "hw3", *arguments],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 2:
        raise RuntimeError(f"hw3 {' '.join(arguments)}: status {done.returncode}, expected 2\n{done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure all mistakes, print a table, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="an earlier version, to compare with")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "docs/benchmarks", metavar="DIR")
    arguments = parser.parse_args()
    checkouts = {"cpu_seconds": REPOSITORY}
    if arguments.before is not None:
        checkouts = {"cpu_seconds_before": arguments.before.resolve(), **checkouts}
    rows = []
    for setting, command in MISTAKES.items():
        row: dict[str, str | float] = {"setting": setting, "command": f"hw3 {' '.join(command)}"}
        for field, checkout in checkouts.items():
            seconds = [measure_cpu_seconds(checkout, command) for _ in range(REPEATS)]
            row[field] = round(statistics.median(seconds), 2)
        rows.append(row)
        print("  ".join(str(value) for value in row.values()), flush=True)
    headings = {"cpu_seconds_before": "CPU s, earlier version", "cpu_seconds": "CPU s"}
    columns = {"setting": "mistake", "command": "command"} | {field: headings[field] for field in checkouts}
    write_report(arguments.output, "mistakes", describe_machine(), rows, columns)


if __name__ == "__main__":
    main()
