"""Measure the memory per GPU of each strategy, on random base models of 2B, 8B and 27B, and compare with `hw3 check`.

Each case runs `hw3 train` for six steps of eight rows. The rows are the file's longest, so that one step is as wide as
the widest step of a run, which is what `hw3 check` estimates. A case that fails or times out is a row of the report
with the reason. Base models are saved in 4 bits, stored as bfloat16 as sharding requires, so that one GPU makes the
largest in a minute. Memory is measured per process by PyTorch's allocator. Cases may therefore share the GPUs, and
several processes of one case may share one GPU (`launching.py`).

    python benchmarks/memory.py [--only 2b-1gpu-auto '27b-*'] [--parallel 6] [--data FILE] [--tokenizer DIR]
    python benchmarks/memory.py --list
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmark_report import describe_machine, format_table, read_previous_rows, write_report
from launching import CommandError, read_run, train
from random_models import load_shape_config, make_quantized_base
from training_logs import held_gib
from transformers import AutoTokenizer

from hw3.common.atomic_io import write_atomically, write_json
from hw3.config.recipe import load_recipe
from hw3.data.rows import read_rows
from hw3.data.sampler import StepSampler
from hw3.data.tokenization import EncodedRow, Encoder, count_tokens
from hw3.modeling.loading import count_parameters, load_model_config, load_tokenizer
from hw3.training.batch_layout import divide_batch
from hw3.training.memory_estimate import GIB, MEMORY_PARTS
from hw3.training.sharding import sharding_from_file
from hw3.training.step_strategy import StepStrategy, Workload, choose_step_strategy

STEPS, ROWS = 6, 48
STORAGE_DTYPE = "bfloat16"
STORAGE = f"quantization.bnb_4bit_quant_storage={STORAGE_DTYPE}"
BATCH = ["training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=2"]
RECIPES = {"2b": "recipes/gemma/qlora.yaml", "8b": "recipes/llama/qlora.yaml", "27b": "recipes/gemma/qlora.yaml"}
SHAPES = {"2b": "gemma", "8b": "llama", "27b": "gemma-27b"}  # names in shapes.json
KEEP_ACTIVATIONS = "training.activation_checkpointing=false"
CHECKPOINT_ACTIVATIONS = "training.activation_checkpointing=true"
# By name: the accelerate file, None for one GPU; overrides.
STRATEGIES: dict[str, tuple[str | None, list[str]]] = {
    "1gpu-auto": (None, ["speed=auto"]),
    "1gpu-plain": (None, ["speed=plain"]),
    "1gpu-lean": (None, ["speed=lean"]),
    "ddp": ("ddp", ["speed=auto"]),
    "fsdp2": ("fsdp2", ["speed=auto", KEEP_ACTIVATIONS]),
    "fsdp2-checkpointing": ("fsdp2", ["speed=auto", CHECKPOINT_ACTIVATIONS]),
    "zero3": ("zero3", ["speed=auto", KEEP_ACTIVATIONS]),
    "zero3-checkpointing": ("zero3", ["speed=auto", CHECKPOINT_ACTIVATIONS]),
}
COLUMNS = {
    "setting": "setting",
    "gpus": "processes",
    "held_gib": "GiB per process, steps",
    "peak_steps_reserved_gib": "reserved",
    "peak_gib": "peak, loading included",
    "estimate_gib": "hw3 check",
    "estimate_error": "error",
    "failed": "failed",
}


class Case(NamedTuple):
    """A shape, a strategy and a number of processes."""

    shape: str
    strategy: str
    processes: int


CASES = {
    f"{shape}-{strategy}" + (f"-{processes}" if accelerate else ""): Case(shape, strategy, processes)
    for shape in SHAPES
    for strategy, (accelerate, _) in STRATEGIES.items()
    for processes in ((2, 4) if accelerate else (1,))
}


def write_longest_rows(data: Path, output: Path, count: int) -> Path:
    """Write a file's longest rows; as many as all steps take, so that the longest of all is in one of the steps."""
    rows = json.loads(data.read_text(encoding="utf-8"))
    rows.sort(key=lambda row: len(row["instruction"]) + len(row["output"]), reverse=True)
    output.write_text(json.dumps(rows[:count], ensure_ascii=False), encoding="utf-8")
    return output


def case_overrides(case: Case, base: Path, data_overrides: list[str]) -> list[str]:
    """Return a case's overrides of its recipe."""
    _, overrides = STRATEGIES[case.strategy]
    return [f"model.pretrained_model_name_or_path={base}", *data_overrides, *BATCH, *overrides, STORAGE]


def measure(
    name: str, base: Path, data_overrides: list[str], run: Path, timeout_seconds: float, gpu: int
) -> dict[str, Any]:
    """Estimate and train one case; return one row of the report, with the reason if the case failed."""
    case = CASES[name]
    accelerate, _ = STRATEGIES[case.strategy]
    overrides = case_overrides(case, base, data_overrides)
    row: dict[str, Any] = {"setting": name, "shape": case.shape, "strategy": case.strategy, "gpus": case.processes}
    row |= {"rows": ROWS, "estimate": estimate(case, overrides)}
    limits = [f"training.max_steps={STEPS}", f"training.save_steps={STEPS}", "training.logging_steps=1"]
    try:
        train(
            RECIPES[case.shape],
            [*overrides, *limits, "training.report_to=none"],
            run,
            processes=case.processes,
            accelerate=accelerate or "ddp",
            timeout_seconds=timeout_seconds,
            environment={"CUDA_VISIBLE_DEVICES": str(gpu)} if case.processes == 1 else None,
        )
    except CommandError as error:
        return row | {"failed": str(error)}
    measured = {key: value for key, value in read_run(run, warmup_entries=2).items() if not key.startswith("seconds")}
    shutil.rmtree(run)
    return row | measured


@functools.cache
def _load_config_and_rows(recipe_file: str, base: str, data: str) -> tuple[Any, list[EncodedRow]]:
    """Load a base model's configuration, and encode the rows that a run trains on."""
    recipe = load_recipe(Path(recipe_file), [f"model.pretrained_model_name_or_path={base}", f"data.train={data}"])
    encoder = Encoder(load_tokenizer(recipe.model), recipe.prompt)
    rows = [encoder.encode(row) for row in read_rows(Path(data))]
    return load_model_config(recipe.model), [row for row in rows if len(row) <= recipe.data.max_length]


def estimate(case: Case, overrides: list[str]) -> dict[str, Any]:
    """Return the estimate of `hw3 check` for a GPU that is large enough: GiB of a step, in total and by part.

    The CUDA-graph step has capacity for the file's longest row. TRL's step needs memory only for the rows of its steps.
    """
    recipe_file, (accelerate, _) = RECIPES[case.shape], STRATEGIES[case.strategy]
    recipe = load_recipe(Path(recipe_file), overrides)
    config, rows = _load_config_and_rows(recipe_file, recipe.model.pretrained_model_name_or_path, recipe.data.train)
    sampler = StepSampler([len(row) for row in rows], recipe.rows_per_step, recipe.seed)
    trained_rows = [rows[index] for step in sampler.steps_in_epoch(0)[:STEPS] for index in step]
    sharding = None if accelerate is None else sharding_from_file(Path(f"accelerate_configs/{accelerate}.yaml"))

    def choose(rows: list[EncodedRow]) -> StepStrategy:
        layout, (trained_parameters, _) = divide_batch(recipe, case.processes), count_parameters(recipe, config)
        workload = Workload(recipe, layout, config, trained_parameters, count_tokens(rows), sharding)
        return choose_step_strategy(workload, torch.device("cuda"), None)

    strategy = choose(rows)
    strategy = strategy if strategy.cuda_graphs else choose(trained_rows)
    parts = {part: round(getattr(strategy.memory, part) / GIB, 2) for part in MEMORY_PARTS}
    return {"gib": round(strategy.memory.total / GIB, 2), **parts, "cuda_graphs": strategy.cuda_graphs}


def add_error(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with the relative error of the estimate, compared with the steps' memory including CUDA graphs."""
    if "failed" in row:
        return row
    held, estimated = held_gib(row), row["estimate"]["gib"]
    return row | {"held_gib": held, "estimate_gib": estimated, "estimate_error": f"{estimated / held - 1:+.0%}"}


def make_bases(shapes: list[str], arguments: argparse.Namespace) -> None:
    """Make the base models that do not exist yet, each in a separate process, which frees its memory at the end."""
    started = []
    for number, shape in enumerate(shape for shape in shapes if not (arguments.scratch / shape).exists()):
        options = ["--make", shape, "--tokenizer", str(arguments.tokenizer), "--scratch", str(arguments.scratch)]
        gpu = {"CUDA_VISIBLE_DEVICES": str(number % torch.cuda.device_count())}
        started.append(subprocess.Popen([sys.executable, __file__, *options], env=os.environ | gpu))
    if sum(process.wait() != 0 for process in started):
        raise SystemExit("a base model could not be made; its process printed the reason")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="CASE", help="names, or patterns of names")
    parser.add_argument("--list", action="store_true", help="print the names and exit")
    parser.add_argument("--estimates", action="store_true", help="measure nothing; update the estimates of hw3 check")
    parser.add_argument("--parallel", type=int, default=1, help="number of cases that share the GPUs")
    parser.add_argument("--tokenizer", type=Path, default=Path("data/tiny"))
    parser.add_argument("--timeout", type=float, default=150, help="the longest time of a case, in seconds")
    parser.add_argument("--data", type=Path, default=Path("data/train.json"))
    parser.add_argument("--scratch", type=Path, default=Path("scratch/memory"))
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--make", choices=SHAPES, nargs="+", help="make these shapes' base models and exit")
    return parser.parse_args()


def main() -> int:
    """Measure each case and write the report after each."""
    arguments = parse_arguments()
    chosen = [name for name in CASES if any(fnmatch.fnmatchcase(name, pattern) for pattern in arguments.only)]
    if arguments.list:
        print("\n".join(chosen))
        return 0
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    if arguments.estimates:
        update_estimates(arguments)
        return 0
    if arguments.make and len(arguments.make) == 1:
        (shape,) = arguments.make
        config = load_shape_config(SHAPES[shape])
        make_quantized_base(arguments.scratch / shape, config, arguments.tokenizer, STORAGE_DTYPE, "cuda")
        return 0
    make_bases(arguments.make or list(dict.fromkeys(CASES[name].shape for name in chosen)), arguments)
    if not arguments.make:
        measure_all(chosen, arguments)
    return 0


def measure_all(chosen: list[str], arguments: argparse.Namespace) -> None:
    """Measure cases, the largest first, and write the report after each."""
    rows = read_previous_rows(arguments.output, "memory")
    data_overrides = select_rows(arguments, ROWS)
    with ThreadPoolExecutor(arguments.parallel) as threads:
        started = [
            threads.submit(
                measure,
                name,
                arguments.scratch / CASES[name].shape,
                data_overrides,
                arguments.scratch / f"run-{name}",
                arguments.timeout,
                number % torch.cuda.device_count(),
            )
            for number, name in enumerate(reversed(chosen))
        ]
        for finished in as_completed(started):
            row = add_error(finished.result())
            rows[row["setting"]] = row
            print(json.dumps({key: row[key] for key in COLUMNS if key in row}), flush=True)
            measured = [rows[name] for name in CASES if name in rows]
            write_report(arguments.output, "memory", describe_machine(), measured, COLUMNS)


def select_rows(arguments: argparse.Namespace, count: int) -> list[str]:
    """Write the rows to train on; return the overrides that name them."""
    file = write_longest_rows(arguments.data, arguments.scratch / f"rows-{count}.json", count)
    return [f"data.train={file}", "data.eval=data/eval.json", "data.too_long=drop"]


def update_estimates(arguments: argparse.Namespace) -> None:
    """Replace the estimates in the existing report; a base model's configuration is enough for that."""
    file = arguments.output / "memory.json"
    report = json.loads(file.read_text(encoding="utf-8"))
    for row in report["rows"]:
        case = CASES[row["setting"]]
        base = arguments.scratch / f"{case.shape}-config"
        load_shape_config(SHAPES[case.shape]).save_pretrained(base)
        AutoTokenizer.from_pretrained(arguments.tokenizer).save_pretrained(base)
        row["estimate"] = estimate(case, case_overrides(case, base, select_rows(arguments, row["rows"])))
        row |= add_error(row)
    write_json(file, report)
    write_atomically(file.with_suffix(".md"), format_table(report))


if __name__ == "__main__":
    sys.exit(main())
