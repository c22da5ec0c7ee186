"""Compare float16 products with float32 and bfloat16: losses, scores, predictions, time and memory of one GPU.

The models are SmolLM2-135M-Instruct and random ones with the layers' sizes of Gemma-2-2B, Llama-3-8B and Qwen3-4B. The
random Gemma-2 has hidden states above the largest float16 number. In the float16 settings PyTorch reports a GPU without
bfloat16, `model.dtype: auto` chooses the dtype, and a tensor in bfloat16 is an error. Each setting trains in its own
process, all at the same time; while the steps of one are timed, the others wait. What is finished after `--seconds` is
reported.

    python benchmarks/float16.py --smollm2 DIR --tokenizer DIR [--models smollm2 gemma] [--layers gemma=26]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NO_BF16 = "model.dtype=auto"
FLOAT32 = "training.bf16=false model.dtype=float32 quantization.bnb_4bit_compute_dtype=float32"
PLAIN = "speed=plain training.activation_checkpointing=false"
REFERENCE = "float32, TRL's step"
SETTINGS = {
    REFERENCE: f"{FLOAT32} {PLAIN}",
    "bfloat16, TRL's step": PLAIN,
    "bfloat16": "speed=auto",
    "float16, TRL's step": f"{NO_BF16} {PLAIN}",
    "float16": f"{NO_BF16} speed=auto",
}
LAYERS = {"gemma": 4, "llama": 2, "qwen": 3}  # of the random models
TRAIN_ROWS, SCORED_ROWS = 160, 64
MAX_CHARACTERS = 120  # of a row, so that few lengths are captured
COLUMNS = {
    "model": "model",
    "setting": "setting",
    "loss_largest": "largest relative difference of a loss",
    "largest_score_difference": "largest difference of a row's score, nats",
    "equal_tokens": "equal tokens of predictions",
    "seconds_per_step": "s/step",
    "peak_gib": "peak GiB",
}


def write_rows(folder: Path) -> dict[str, Path]:
    """Write short rows of `data/`; return the files by key of the recipe."""
    files = {}
    for key, count in (("train", TRAIN_ROWS), ("eval", SCORED_ROWS)):
        rows = json.loads(Path(f"data/{key}.json").read_text(encoding="utf-8"))
        short = [row for row in rows if len(row["instruction"]) + len(row["output"]) <= MAX_CHARACTERS][:count]
        files[key] = folder / f"{key}.json"
        files[key].write_text(json.dumps(short, ensure_ascii=False), encoding="utf-8")
    return files


def run_job(arguments: dict[str, Any], barrier: Any, lock: Any) -> None:
    """Run a job in this process, which imports PyTorch only now, while the others do."""
    from float16_worker import Job
    from float16_worker import run_job as run

    run(Job(**arguments), barrier, lock)


def compare(result: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Return how losses, scores and predictions differ from the reference's."""
    pairs = list(zip(result["losses"], reference["losses"], strict=True))
    differences = {"loss_largest": round(max(abs(loss / expected - 1) for loss, expected in pairs), 6)}
    if "nlls" in result and "nlls" in reference:
        nlls = list(zip(result["nlls"], reference["nlls"], strict=True))
        rows = list(zip(result["tokens"], reference["tokens"], strict=True))
        equal = sum(a == b for tokens, expected in rows for a, b in zip(tokens, expected, strict=False))
        differences |= {
            "largest_score_difference": round(max(abs(nll - expected) for nll, expected in nlls), 5),
            "rows_with_equal_predictions": sum(tokens == expected for tokens, expected in rows),
            "equal_tokens": f"{equal / sum(len(expected) for _, expected in rows):.1%}",
        }
    return differences


def list_jobs(arguments: argparse.Namespace, layers: dict[str, int]) -> list[dict[str, Any]]:
    """Return the fields of each process's job."""
    scratch, files, jobs = arguments.scratch, write_rows(arguments.scratch), []
    for model in arguments.models:
        for setting in arguments.settings:
            jobs.append(
                {
                    "model": model,
                    "overrides": SETTINGS[setting],
                    "base": scratch / f"{model}-base" if model in layers else arguments.smollm2,
                    "layers": layers.get(model, 0),
                    "tokenizer": arguments.tokenizer if model == "gemma" else arguments.smollm2,
                    "files": files,
                    "folder": scratch / f"{model}-{list(SETTINGS).index(setting)}",
                    "reference": scratch / f"{model}-0",
                    "forbids_bf16": setting.startswith("float16"),
                    "scores": "TRL" in setting,
                }
            )
    return jobs


def write_results(arguments: argparse.Namespace, layers: dict[str, int]) -> None:
    """Write the report with the results so far."""
    from benchmark_report import describe_machine, read_previous_rows, write_report

    rows = read_previous_rows(arguments.output, "float16", "model")
    for model in arguments.models:
        name = f"{model}, {layers[model]} layers" if model in layers else model
        rows |= {(row["setting"], row["model"]): row for row in read_results(arguments, model, name)}
    if rows:
        write_report(arguments.output, "float16", describe_machine(), list(rows.values()), COLUMNS)


def main() -> int:
    """Run every setting in a process of its own, and write the report from time to time."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--smollm2", type=Path, required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of Gemma-2's tokenizer")
    parser.add_argument("--models", nargs="+", default=["smollm2", *LAYERS], choices=["smollm2", *LAYERS])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--layers", nargs="+", default=[], metavar="MODEL=N", help="layers of a random model")
    parser.add_argument("--seconds", type=float, default=600, help="when to end processes that are not finished")
    parser.add_argument("--scratch", type=Path, default=Path("scratch/float16"))
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    layers = LAYERS | {name: int(count) for name, count in (text.split("=") for text in arguments.layers)}
    shutil.rmtree(arguments.scratch, ignore_errors=True)
    arguments.scratch.mkdir(parents=True)
    jobs = list_jobs(arguments, layers)
    context = multiprocessing.get_context("spawn")
    barrier, lock = context.Barrier(len(jobs)), context.Lock()
    processes = [context.Process(target=run_job, args=(job, barrier, lock)) for job in jobs]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        time.sleep(5)
        write_results(arguments, layers)
    for process in processes:
        process.kill()
        process.join()
    write_results(arguments, layers)
    print((arguments.output / "float16.md").read_text(encoding="utf-8"))
    return int(any(process.exitcode for process in processes))


def read_results(arguments: argparse.Namespace, model: str, name: str) -> Iterator[dict[str, Any]]:
    """Yield a row of the report for each setting that has a result."""
    results = {}
    for number, setting in enumerate(SETTINGS):
        file = arguments.scratch / f"{model}-{number}" / "result.json"
        if setting in arguments.settings and file.exists():
            results[setting] = json.loads(file.read_text(encoding="utf-8"))
    for setting, result in results.items():
        difference = compare(result, results[REFERENCE]) if REFERENCE in results else {}
        details = {key: value for key, value in result.items() if key not in ("nlls", "tokens")}
        yield {"model": name, "setting": setting, **difference, **details}


if __name__ == "__main__":
    sys.exit(main())
