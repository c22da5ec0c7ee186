"""Blocks about scoring and prediction: scores, seconds, precision."""

from __future__ import annotations

from document_blocks.sources import describe_measurement, format_peak_memory, format_table, read_json, read_report


def scores(folder: str) -> str:
    """Scores of the base model with few-shot examples and of the best and last checkpoints, from a saved results file.

    Args:
        folder: The folder of `results.json`.
    """
    results = read_json(f"{folder}/results.json")
    entries = results["entries"]
    base = sorted((entry for entry in entries if entry["checkpoint"] is None), key=lambda entry: entry["shots"])
    fine_tuned = [entry for entry in entries if entry["checkpoint"] is not None and entry["shots"] == 0]
    best = next(entry for entry in fine_tuned if entry["step"] == results["best"]["step"])
    last = max(fine_tuned, key=lambda entry: entry["step"])
    named = [
        (f"base model, {entry['shots']} few-shot example{'' if entry['shots'] == 1 else 's'}", entry) for entry in base
    ]
    named += [
        (f"**fine-tuned, step {best['step']:,} (best)**", best),
        (f"fine-tuned, step {last['step']:,} (last)", last),
    ]
    rows = []
    for name, entry in named:
        low, high = entry["mean_perplexity_ci95"]
        interval = f"{entry['mean_perplexity']:.2f} [{low:.2f}, {high:.2f}]"
        rows.append((name, interval, f"{entry['token_perplexity']:.2f}", f"{entry['bits_per_character']:.3f}"))
    table = format_table(["", "mean perplexity [95 %]", "token perplexity", "bits per character"], rows)
    unknown, tokens = best["unknown_tokens"], best["tokens"]
    unknown_share = f"{unknown} of {tokens:,} output tokens are unknown ({unknown / tokens:.2%})"
    return f"{table}\n\n{results['data']['rows']} rows; {unknown_share}."


def scoring_precision() -> str:
    """Errors of scores in bfloat16."""
    report = read_report("scoring_precision")
    rows = [
        (row["setting"], f"{row['rms_error_nats']:.4f}", f"{row['relative_to_course_loop']:.2f}")
        for row in report["rows"]
    ]
    table = format_table(["", "RMS error, nats per row", "relative to the course's loop"], rows)
    return f"{table}\n\n{report['rows'][0]['rows']} rows, one {report['machine']['gpu']}."


def float16() -> str:
    """Losses, scores and predictions in float16 and bfloat16, compared with float32, with time and memory."""
    report = read_report("float16")
    rows = [
        (
            row["model"],
            row["setting"],
            f"{row['loss_largest']:.1e}",
            f"{row['largest_score_difference']:.3f}" if "largest_score_difference" in row else "",
            row.get("equal_tokens", ""),
            f"{row['seconds_per_step']:.3f}",
            f"{row['peak_gib']:.1f}",
        )
        for row in sorted(report["rows"], key=lambda row: (row["model"], row["setting"]))
        if "float32" not in row["setting"]
    ]
    headings = ["model", "setting", "loss", "score, nats per row", "equal tokens", "s/step", "peak GiB"]
    reference = [row for row in report["rows"] if "float32" in row["setting"]]
    failures = ", ".join(
        f"{row['model']}: {row['rows_not_finite_in_plain_float16']}"
        for row in reference
        if "rows_not_finite_in_plain_float16" in row
    )
    return (
        f"{format_table(headings, rows)}\n\n{describe_measurement(report)}. Largest differences from float32: "
        "relative, of the losses of 20 steps; of the scores of 64 rows, and equal tokens of 32 greedy outputs, with "
        "one adapter. Random models have few layers. Seconds are of the fastest step, beside other programs on the "
        "GPU. "
        f"Rows of 64 whose logits are not finite in plain float16: {failures}."
    )


def decoding() -> str:
    """Seconds of generation with CUDA graphs and without."""
    dequantized, quantized = read_report("decoding"), read_report("decoding_4bit")
    # Each report has a row with CUDA graphs and one without, for each number of rows.
    pairs = [zip(report["rows"][::2], report["rows"][1::2], strict=True) for report in (dequantized, quantized)]
    rows, all_equal = [], True
    for (graphs, eager), (graphs_4bit, eager_4bit) in zip(*pairs, strict=True):
        all_equal &= eager["equal_outputs"] == eager["rows"] and eager_4bit["equal_outputs"] == eager_4bit["rows"]
        rows.append(
            (
                graphs["rows"],
                f"{graphs['seconds']:.1f}",
                f"{eager['seconds']:.1f}",
                f"{graphs['tokens_per_second']:,}",
                format_peak_memory(graphs),
                f"{graphs_4bit['seconds']:.1f}",
                f"{eager_4bit['seconds']:.1f}",
                format_peak_memory(graphs_4bit),
            )
        )
    headings = ["rows", "s", "s without graphs", "tokens/s", "peak", "4-bit: s", "s without graphs", "peak"]
    repeats = len(dequantized["rows"][0]["seconds_all"])
    about = (
        f"{describe_measurement(dequantized)}; outputs of 64 tokens, prompts included; medians of {repeats}, and one "
        f"run without CUDA graphs. The outputs with and without graphs are {'' if all_equal else 'not all '}equal. "
        "Memory that is reserved beyond the peak is released when memory is short."
    )
    return f"{format_table(headings, rows)}\n\n{about}"


def evaluation() -> str:
    """Seconds per checkpoint, and the parts of a sweep."""
    report = read_report("evaluation")
    rows = [
        (row["setting"], f"{row['seconds_per_checkpoint']:.2f}", f"{row['peak_gib']:.1f}")
        for row in report["rows"]
        if "peak_gib" in row and "tokens per batch" not in row["setting"]
    ]
    sweep, *parts = [row for row in report["rows"] if "seconds_sweep" in row]
    named = [(part["setting"].partition(" of which ")[2], part["seconds_sweep"]) for part in parts]
    return "\n".join(
        [
            format_table(["", "s per checkpoint", "peak GiB"], rows),
            "",
            f"One {report['machine']['gpu']}; {sweep['setting']}: {sweep['seconds_sweep']:.0f} s. Seconds by part:",
            "; ".join(f"{name} {seconds:.1f}" for name, seconds in named if name) + ".",
        ]
    )


def parallel_inference() -> str:
    """Scoring and prediction by two processes compared with one, on GPUs and on a CPU."""
    gpu, cpu = read_report("parallel_inference"), read_report("parallel_inference_cpu")
    rows = [
        (row["setting"], device, row["processes"], f"{row['seconds']:.1f}", f"{row['speedup']:.2f}")
        for report, device in ((gpu, gpu["machine"].get("gpu")), (cpu, "CPU"))
        for row in sorted(report["rows"], key=lambda row: (row["setting"], row["processes"]))
    ]
    difference = max(row.get("largest_relative_difference", 0) for row in (*gpu["rows"], *cpu["rows"]))
    cores, repeats = cpu["machine"]["cpu_cores"], len(cpu["rows"][0]["seconds_all"])
    about = (
        "Seconds from the loaded base model to the last entry or output. GPUs: Gemma-2-2B's shape with random weights, "
        f"outputs of 64 tokens, measured once. CPU: the tiny run, {cores} cores, one thread per process, medians of "
        f"{repeats}. Perplexities of one process and of two differ by at most {difference:.0e}."
    )
    return f"{format_table(['', 'device', 'processes', 's', 'speedup'], rows)}\n\n{about}"
