"""Measure generation with and without CUDA graphs: seconds, tokens per second, and whether the outputs are equal.

The base model has random weights of Gemma-2-2B's shape and a random adapter. It never ends an output, and so every row
takes all its tokens.

    python benchmarks/decoding.py --tokenizer DIR --data FILE [--keep-4bit]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from benchmark_report import describe_machine, write_report
from evaluation import make_random_run

from hw3.data.rows import read_rows
from hw3.data.tokenization import EncodedRow
from hw3.generation.batch_generate import Generation, generate
from hw3.generation.generator import RunGenerator
from hw3.runs.run import Run

BATCH_SIZES, NEW_TOKENS, REPEATS = (1, 16, 64, 256, 1024), 64, 3
COLUMNS = {
    "setting": "setting",
    "seconds": f"s, {NEW_TOKENS} tokens per row",
    "seconds_of_prompts": "s, prompts",
    "milliseconds_per_token": "ms per token of all rows",
    "tokens_per_second": "tokens/s",
    "peak_gib": "peak GiB",
    "equal_outputs": "rows with equal outputs",
}


def time_generation(generator: RunGenerator, rows: list[EncodedRow], new_tokens: int) -> tuple[float, list[Generation]]:
    """Generate `new_tokens` tokens for each row; return the seconds and the generations."""
    generations: dict[int, Generation] = {}
    generation_config = generator.generation_config
    torch.cuda.synchronize()
    started = time.perf_counter()
    generate(
        generator.model,
        rows,
        max_new_tokens=[new_tokens] * len(rows),
        generation_config=generation_config,
        on_generation=generations.__setitem__,
    )
    return time.perf_counter() - started, [generations[index] for index in range(len(rows))]


def measure(
    generator: RunGenerator, rows: list[EncodedRow], *, use_cuda_graphs: bool
) -> tuple[dict[str, Any], list[Generation]]:
    """Generate for some rows; return one row of the report, and the generations."""
    times, prompt_times = [], []
    with mock.patch("hw3.generation.decoder.can_capture", return_value=use_cuda_graphs):
        for _ in range(REPEATS if use_cuda_graphs else 1):
            prompt_times.append(time_generation(generator, rows, 1)[0])
            torch.cuda.reset_peak_memory_stats()
            seconds, generations = time_generation(generator, rows, NEW_TOKENS)
            times.append(seconds)
    seconds, prompt_seconds = statistics.median(times), min(prompt_times)
    count = "1 row" if len(rows) == 1 else f"{len(rows)} rows"
    tokens = sum(len(generation.token_ids) + generation.finished for generation in generations)
    return {
        "setting": f"{count}, {'with' if use_cuda_graphs else 'without'} CUDA graphs",
        "rows": len(rows),
        "seconds": round(seconds, 3),
        "seconds_all": [round(repetition, 3) for repetition in times],
        "seconds_of_prompts": round(prompt_seconds, 3),
        "milliseconds_per_token": round((seconds - prompt_seconds) / (NEW_TOKENS - 1) * 1e3, 2),
        "tokens_per_second": round(tokens / seconds),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
    }, generations


def main() -> int:
    """Measure batches of several sizes, and write the report after each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument(
        "--data", type=Path, required=True, help=f"rows to translate; at most {max(BATCH_SIZES)} are used"
    )
    parser.add_argument("--keep-4bit", action="store_true", help="do not dequantize the 4-bit weights")
    parser.add_argument("--scratch", type=Path, default=Path("scratch/gpu_recipe"))
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    arguments = parser.parse_args()
    run = arguments.scratch / "decoding"
    make_random_run(run, arguments.tokenizer, {"train": arguments.data}, 1)
    generator = RunGenerator.open(Run(run), "last", allow_mismatch=True)
    if arguments.keep_4bit:
        generator = replace(generator, identity=replace(generator.identity, dequantized=False))
    rows = [generator.encoder.encode(row) for row in read_rows(arguments.data)[: max(BATCH_SIZES)]]
    time_generation(generator, rows[:2], 4)  # warm-up
    name = "decoding_4bit" if arguments.keep_4bit else "decoding"
    report: list[dict[str, Any]] = []
    for batch_size in BATCH_SIZES:
        with_graphs, expected = measure(generator, rows[:batch_size], use_cuda_graphs=True)
        without_graphs, generations = measure(generator, rows[:batch_size], use_cuda_graphs=False)
        without_graphs["equal_outputs"] = sum(a == b for a, b in zip(generations, expected, strict=True))
        report += [with_graphs, without_graphs]
        print(with_graphs, without_graphs, sep="\n", flush=True)
        write_report(arguments.output, name, describe_machine(), report, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
