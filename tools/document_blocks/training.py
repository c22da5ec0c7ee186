"""Blocks about training: the speed of an optimizer step, several GPUs, memory."""

from __future__ import annotations

import itertools
import statistics

from document_blocks.sources import (
    REPOSITORY,
    Report,
    Row,
    describe_measurement,
    find_row,
    format_table,
    read_report,
)
from hw3.training.datasheet_estimate import T4

STEP_HEADINGS = ("s per step", "rows/s", "peak GiB", "MFU")


def train_step() -> str:
    """Seconds and memory of an optimizer step, and how they compare."""
    first, later, llama = (read_report(f"train_step{name}") for name in ("", "_later", "_llama"))
    return "\n".join(
        [
            _format_steps("8 rows per step, all in one run", first),
            "",
            "In later runs, on other such machines:",
            "",
            _format_steps("", later),
            "",
            "Llama-3-8B's shape, 8 rows per step (`--llama`), on several such machines:",
            "",
            _format_steps("", llama),
            "",
            _describe_step_measurement(first, later, llama),
            "",
            *_compare_with_trl(first, later, llama),
            *_compare_with_unsloth(first, llama),
            *_describe_preparation(first, later, llama),
            *_describe_complete_run(),
        ]
    )


def _format_steps(heading: str, report: Report) -> str:
    rows = [
        (
            row["setting"].removeprefix("Llama-3-8B shape, "),
            f"{row['seconds_per_step']:.4f}",
            f"{row['rows_per_second']:.0f}",
            f"{row['peak_gib']:.1f}",
            f"{row['mfu']:.1%}",
        )
        for row in report["rows"]
    ]
    return format_table([heading, *STEP_HEADINGS], rows)


def _describe_step_measurement(first: Report, later: Report, llama: Report) -> str:
    machine, versions = first["machine"], first["versions"]
    slowest, *_, fastest = sorted(
        row.get("matmul_tflops", report["machine"]["matmul_tflops"])
        for report in (first, later, llama)
        for row in report["rows"]
    )
    reserved = find_row(later, "speed: auto")["peak_reserved_gib"]
    return (
        f"One {machine['gpu']}, torch {versions['torch']}, trl {versions['trl']}; random weights, the course's rows. "
        f"MFU is relative to a bfloat16 matrix product on the same machine, which reached {slowest:.0f} to "
        f"{fastest:.0f} TFLOP/s. Peak is the peak of the memory that PyTorch allocated. PyTorch reserves more: "
        f"{reserved:.1f} GiB for `auto`, the memory of the CUDA graphs included. The peaks of the larger steps include "
        "memory that earlier runs of the same process still held."
    )


def _compare_with_trl(first: Report, later: Report, llama: Report) -> list[str]:
    def speedup(report: Report, setting: str) -> float:
        return find_row(report, setting)["seconds_per_step"] / find_row(report, "speed: auto")["seconds_per_step"]

    def seconds(report: Report, setting: str) -> str:
        return f"{find_row(report, setting)['seconds_per_step']:.2f} s"

    script = "the course's script"
    return [
        f"- `auto` is {speedup(first, 'TRL hand-tuned'):.1f} times as fast as hand-tuned TRL, and "
        f"{speedup(llama, 'TRL hand-tuned'):.1f} times as fast on Llama-3-8B's shape. On that shape it is "
        f"{speedup(llama, script):.0f} times as fast as the course's settings on the same machine. It is "
        f"{speedup(llama, 'lean'):.0f} times as fast as `lean` and {speedup(llama, 'defaults'):.0f} times as fast as "
        "TRL's defaults on another machine. The CPU limits the speed of all settings except `auto`, and the machines' "
        "CPUs differ.",
        "- `lean` is TRL's step with the script's settings, and takes about as long: "
        f"{seconds(first, 'lean')} against {seconds(first, script)} in the first run, "
        f"{seconds(later, 'lean')} against {seconds(later, script)} in the later one.",
    ]


def _compare_with_unsloth(first: Report, llama: Report) -> list[str]:
    gemma_unsloth, llama_unsloth = (read_report(f"unsloth_step{name}") for name in ("", "_llama"))
    defaults, hand_tuned = find_row(gemma_unsloth, "defaults"), find_row(gemma_unsloth, "hand-tuned")
    llama_defaults, llama_hand_tuned = find_row(llama_unsloth, "defaults"), find_row(llama_unsloth, "hand-tuned")
    speedup = hand_tuned["seconds_per_step"] / find_row(first, "speed: auto")["seconds_per_step"]
    llama_speedup = llama_hand_tuned["seconds_per_step"] / find_row(llama, "speed: auto")["seconds_per_step"]
    earlier = min(read_report("unsloth_step_earlier")["rows"], key=lambda row: row["seconds_per_step"])
    return [
        f"- Unsloth {hand_tuned['versions']['unsloth']} was measured with the same rows and base model on another such "
        f"machine: {_seconds_and_memory(defaults)} with its defaults, {_seconds_and_memory(hand_tuned)} hand-tuned; "
        f"`auto` is {speedup:.1f} times as fast. On Llama-3-8B's shape: {_seconds_and_memory(llama_defaults)}, and "
        f"{_seconds_and_memory(llama_hand_tuned)}; `auto` is {llama_speedup:.1f} times as fast. Unsloth's compiler was "
        f"off (`benchmarks/unsloth_step.py`). An earlier script measured {earlier['seconds_per_step']:.3f} s on "
        "Gemma's shape (`docs/benchmarks/unsloth_step_earlier.json`).",
    ]


def _describe_preparation(first: Report, later: Report, llama: Report) -> list[str]:
    capturing = find_row(first, "speed: auto")["seconds_capturing"]
    estimated = [row for report in (first, later, llama) for row in report["rows"]]
    errors = [abs(row["probe_error"]) for row in estimated]
    # Steps without CUDA graphs were first timed with 1 and 3 layers, and later with 1 and 6.
    with_more_layers = [row for row in estimated if not row["speed"]["cuda_graphs"] and "3" not in row["probe"]["wall"]]
    later_errors = [abs(row["probe_error"]) for row in with_more_layers]
    return [
        f"- Before the first step, compiling and capturing take {capturing:.0f} s.",
        f"- `hw3 check` estimated the seconds per step within {max(errors):.0%}, half of them within "
        f"{statistics.median(errors):.0%}. Since steps without CUDA graphs are timed with more layers, their "
        f"estimates are within {max(later_errors):.0%} ({len(later_errors)} runs). Memory: "
        "[several-gpus.md](several-gpus.md#memory).",
    ]


def _describe_complete_run() -> list[str]:
    (run,) = read_report("train_step_full_run")["rows"]
    report = read_report("cuda_graph_equivalence")
    difference = {row["run"]: row["loss_mean"] for row in report["relative_differences"]}
    return [
        f"- The complete recipe, {run['steps']:,} steps with a checkpoint every 100, takes "
        f"{run['seconds_total']:.0f} s (`--full-run`).",
        f"- On the small model, the losses of {report['steps']} steps with CUDA graphs differ from TRL's by "
        f"{difference['CUDA graphs']:.2%} on average. TRL's own runs in two batch layouts differ by "
        f"{difference['TRL, 2 x 4']:.2%} (`benchmarks/cuda_graph_equivalence.py`).",
    ]


def _seconds_and_memory(row: Row) -> str:
    return f"{row['seconds_per_step']:.3f} s and {row['peak_gib']:.1f} GiB"


def scaling() -> str:
    """Rows per second on one GPU and on several."""
    report = read_report("scaling")
    rows = [
        (
            row["setting"],
            f"{row['rows_per_second']:.0f}",
            f"{row['speedup']:.2f}" if "speedup" in row else "",
            f"{row['peak_gib']:.1f}",
        )
        for row in report["rows"]
    ]
    table = format_table(["", "rows/s", "speedup", "peak GiB per GPU"], rows)
    return f"{table}\n\nUp to {describe_measurement(report)}; Gemma-2-2B's shape, `ddp`, the unchanged recipe."


def memory() -> str:
    """Memory per GPU of each strategy: measured, and as `hw3 check` estimates it."""
    report = read_report("memory")
    rows = []
    for row in report["rows"]:
        measured = ["failed", "", ""]
        if "failed" not in row:
            estimate = f"{row['estimate_gib']:.1f} ({row['estimate_error']})"
            measured = [f"{row['held_gib']:.1f}", f"{row['peak_gib']:.1f}", estimate]
        rows.append([f"{row['shape'].upper()} {row['strategy']}", row["gpus"], *measured])
    headings = ["", "processes", "GiB per process, steps", "peak allocated by PyTorch", "estimate of `hw3 check`"]
    about = (
        f"{describe_measurement(report)}; random 4-bit base models, eight long rows per step; the estimate is for "
        "these rows. 2B and 27B are Gemma-2's shapes, 8B is Llama-3's. `checkpointing` recomputes activations; the "
        "other `fsdp2` and `zero3` runs keep them. The first column includes the memory of the CUDA graphs. The second "
        "does not, but it includes loading. Each process has one GPU, except that four processes share two."
    )
    return f"{format_table(headings, rows)}\n\n{about}"


def multi_gpu_equivalence() -> str:
    """Runs on several GPUs compared with a run on one."""
    report = read_report("multi_gpu_equivalence")
    fields = ("loss_first_step", "loss_mean", "loss_largest", "score")
    rows = [
        [row["setting"], *("*not run*" if "failed" in row else f"{row[field]:.2%}" for field in fields)]
        for row in report["rows"][1:]
    ]
    steps = len(report["rows"][0]["losses"])
    about = (
        f"{describe_measurement(report)}; {steps} steps of the tiny recipe in bfloat16, relative differences from "
        "TRL's step on one GPU. The first line shows the effect of rounding. Scores are of the last checkpoint, on one "
        "GPU. Four processes share two GPUs, as two machines of two."
    )
    headings = ["", *(report["columns"][field] for field in fields)]
    return f"{format_table(headings, rows)}\n\n{about}"


def small_gpus() -> str:
    """Memory and seconds of each recipe's commands on GPUs of limited memory, beside what `hw3 check` reported."""
    report = read_report("small_gpus")
    rows = report["rows"]
    table = []
    for (recipe, *cells), group in itertools.groupby(rows, _describe_small_gpu):
        cases = list(group)
        limits = " to ".join(str(limit) for limit in dict.fromkeys(cases[at]["limit_gib"] for at in (0, -1)))
        seconds = min(case["seconds_per_step"] for case in cases)
        table.append((recipe, f"{limits} GiB", *cells, f"{seconds:.2g}"))
    error = max(abs(row["estimate_gib"] - row["held_gib"]) for row in rows)
    headings = ["recipe", "GPU", "`hw3 check`", "`hw3 train`", "`hw3 eval`", "`hw3 predict`", "step", "s per step"]
    as_checked = sum(row["check"].startswith("fits") == (row["train"] == "fits") for row in rows)
    return "\n".join(
        [
            format_table(headings, table),
            "",
            f"{describe_measurement(report)}; random weights of the real shapes, eight of the longest rows per step. "
            "Training is measured without loading, the other commands with it. The seconds are upper bounds, because "
            "several runs shared the GPU and the CPU.",
            "",
            f"{as_checked} of {len(rows)} runs did what `hw3 check` reported. Its estimates differ from the measured "
            f"memory by at most {error:.1f} GiB.",
        ]
    )


def _describe_small_gpu(row: Row) -> tuple[str, ...]:
    return (
        f"`{row['recipe']}`",
        f"{row['check']}, {row['estimate_gib']:.1f} GiB",
        f"{row['train']}, {row['held_gib']:.1f} GiB",
        row["eval"],
        row["predict"],
        row["step"].replace(" 1 rows", " one row"),
    )


def checksums() -> str:
    """Share of a resume and of a sweep that is spent on checksums."""
    if not (REPOSITORY / "docs/benchmarks/checksums.json").exists():
        return "Not measured yet."
    report = read_report("checksums")
    rows = [tuple(row[field] for field in report["columns"]) for row in report["rows"]]
    return f"{format_table(report['columns'].values(), rows)}\n\n{describe_measurement(report)}."


def t4_computed() -> str:
    """Time and memory of the recipes on a T4, computed from its data sheet."""
    report = read_report("t4_computed")
    rows = [
        (
            row["setting"],
            f"{row['steps']:,}",
            f"{row['seconds_per_step']:.2f}",
            f"{row['float32_seconds_per_step']:.2f}",
            f"{row['minutes']:.0f}",
            f"{row['gib']:.1f}",
            row["strategy"],
        )
        for row in report["rows"]
    ]
    headings = ["recipe", "steps", "s/step", "s/step in float32", "minutes", "GiB", "step"]
    return (
        f"{format_table(headings, rows)}\n\nComputed, not measured: the least time from a T4's data sheet "
        f"({T4.float16_flops / 1e12:.0f} TFLOP/s in float16, {T4.float32_flops / 1e12:.1f} in float32, "
        f"{T4.bytes_per_second / 1e9:.0f} GB/s), and the memory that `hw3 check` estimates, of "
        f"{T4.memory_bytes / 1e9:.0f} GB."
    )
