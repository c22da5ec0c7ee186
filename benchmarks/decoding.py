"""Answers with a captured step and without one: seconds, tokens a second, the same answers.

Random weights of Gemma-2-2B's shape with a random adapter, which end no answer: every row takes all its tokens.

    python benchmarks/decoding.py --tokenizer DIR --data FILE
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from evaluation import make_run
from report import machine, write_report

from hw3.data.rows import read_rows
from hw3.data.tokenization import EncodedRow
from hw3.generation.batch_generate import Answer, generate
from hw3.generation.generator import Answerer

ROWS, NEW_TOKENS, REPEATS = (1, 16, 64, 256, 1024), 64, 3


def answers(answerer: Answerer, rows: list[EncodedRow], tokens: int) -> tuple[float, list[Answer]]:
    """Seconds that answers of so many tokens take, and the answers."""
    found: dict[int, Answer] = {}
    config = answerer.generation
    torch.cuda.synchronize()
    began = time.perf_counter()
    generate(answerer.model, rows, limits=[tokens] * len(rows), config=config, on_answer=found.__setitem__)
    return time.perf_counter() - began, [found[place] for place in range(len(rows))]


def measure(answerer: Answerer, rows: list[EncodedRow], captured: bool) -> tuple[dict[str, Any], list[Answer]]:
    """One row of the report, and the answers."""
    times, prompts = [], []
    with mock.patch("hw3.generation.decoder.can_capture", return_value=captured):
        for _ in range(REPEATS if captured else 1):
            prompts.append(answers(answerer, rows, 1)[0])
            torch.cuda.reset_peak_memory_stats()
            seconds, found = answers(answerer, rows, NEW_TOKENS)
            times.append(seconds)
    seconds = statistics.median(times)
    return {
        "setting": f"{len(rows)} rows, {'the captured step' if captured else 'every kernel on its own'}",
        "rows": len(rows),
        "seconds": round(seconds, 3),
        "seconds_all": [round(one, 3) for one in times],
        "seconds_of_prompts": round(min(prompts), 3),
        "milliseconds_per_token": round((seconds - min(prompts)) / (NEW_TOKENS - 1) * 1e3, 2),
        "tokens_per_second": round(sum(len(answer.ids) + answer.finished for answer in found) / seconds),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
    }, found


def main() -> int:
    """Measure batches of several sizes, and write the report after each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="rows to answer; the first of them")
    parser.add_argument("--packed", action="store_true", help="4-bit weights stay packed")
    parser.add_argument("--scratch", type=Path, default=Path("scratch/gpu_recipe"))
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    arguments = parser.parse_args()
    run = arguments.scratch / "decoding"
    make_run(run, arguments.tokenizer, {"train": arguments.data}, 1)
    answerer = Answerer.of(run, [], "last", 0, anyway=True)
    answerer.content["dequantized"] &= not arguments.packed
    rows = [answerer.encoder.encode(row) for row in read_rows(arguments.data)[: max(ROWS)]]
    answers(answerer, rows[:2], 4)
    report: list[dict[str, Any]] = []
    for count, captured in itertools.product(ROWS, (True, False)):
        row, found = measure(answerer, rows[:count], captured)
        if captured:
            of_captured = found
        else:
            row["same_answers"] = sum(one == other for one, other in zip(found, of_captured, strict=True))
        report.append(row)
        print(row, flush=True)
        write_report(arguments.out, "decoding" + "_packed" * arguments.packed, machine(), report, COLUMNS)
    return 0


COLUMNS = {
    "setting": "setting",
    "seconds": f"s, {NEW_TOKENS} tokens a row",
    "seconds_of_prompts": "s, prompts",
    "milliseconds_per_token": "ms a token of all rows",
    "tokens_per_second": "tokens/s",
    "peak_gib": "peak GiB",
    "same_answers": "rows answered the same",
}


if __name__ == "__main__":
    sys.exit(main())
