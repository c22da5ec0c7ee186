"""Blocks about `hw3 search`: the trials of the embedded model, pruners, and the time between trials."""

from __future__ import annotations

from document_blocks.sources import Row, format_table, read_json, read_report

MAX_TRIALS_SHOWN = 5
_BASE_MODELS = {
    "gemma, one process": "random weights of Gemma-2-2B's shape",
    "tiny, one process": "the model in this repository",
    "smollm2, one process": "SmolLM2-135M-Instruct",
}


def search_tiny() -> str:
    """Return the best trials of the embedded model, and what the winner scored."""
    record = read_json("docs/search/tiny.json")
    trials = [trial for trial in record["trials"] if trial["outcome"] == "complete"]
    trials.sort(key=lambda trial: trial["score"])
    keys = list(trials[0]["settings"])
    rows = [
        (trial["number"], *(_format(trial["settings"][key]) for key in keys), _format_interval(trial))
        for trial in trials[:MAX_TRIALS_SHOWN]
    ]
    best, total = record["best"], len(record["trials"])
    steps = sum(trial["steps"] for trial in record["trials"])
    final = best["final"]
    low, high = final["mean_perplexity_ci95"]
    saved = 1 - steps / (record["max_steps"] * total)
    score = f"{final['mean_perplexity']:.2f} [{low:.2f}, {high:.2f}]"
    text = (
        f"{len(trials)} of {total} trials were trained to the end; {steps} optimizer steps in all, {saved:.0%} fewer "
        f"than without a pruner. The winner, trial {best['number']}, scores {score} on `{final['data_file']}`, the "
        f"base model {final['base_mean_perplexity']:.2f}."
    )
    return "\n".join([format_table(["trial", *(f"`{key}`" for key in keys), "dev rows"], rows), "", text])


def search_pruning() -> str:
    """Return how often the best setting survives pruning, and how many steps it saves."""
    rows = read_report("pruning")["rows"]
    default = _find_pruner(rows, "successive halving", 3, 20)
    shown = {
        "**the default**": default,
        "reduction factor 2": _find_pruner(rows, "successive halving", 2, 20),
        "reduction factor 4": _find_pruner(rows, "successive halving", 4, 20),
        "first decision at the second score": _find_pruner(rows, "successive halving", 3, 40),
        "Hyperband": _find_pruner(rows, "hyperband", 3, 20),
        "Hyperband, reduction factor 4": _find_pruner(rows, "hyperband", 4, 20),
        "the default, if it compared the latest scores": _find_pruner(
            rows, "successive halving", 3, 20, "latest score"
        ),
    }
    fields = ("kept_best", "not_worse", "steps_saved", "worst_loss")
    headings = ("pruner", "best setting wins", "winner not significantly worse", "steps saved", "score lost, at most")
    table = format_table(headings, [(name, *(row[field] for field in fields)) for name, row in shown.items()])
    text = (
        f"{default['searches']} searches for each pruner. The winner's score is always inside the bootstrap interval "
        "of the best setting's, which is wide. The third column compares both row by row."
    )
    assert all(row["within_interval"] == "100%" for row in shown.values()), "the text says so"
    return f"{table}\n\n{text}"


def _find_pruner(rows: list[Row], name: str, factor: int, step: int, compares: str = "best score so far") -> Row:
    keys = ("setting", "reduction_factor", "min_resource", "compares")
    return next(row for row in rows if tuple(row[key] for key in keys) == (name, factor, step, compares))


def search_speed() -> str:
    """Return the time until a trial's first step, in a process that has trained others and in a new one."""
    gpu, cpu = read_report("search"), read_report("search_cpu")
    places = {
        f"one {gpu['machine']['gpu']}": gpu["rows"],
        f"{cpu['machine']['cpu_cores']} CPU cores": cpu["rows"],
    }
    headings = ("base model", "on", "first trial, s", "next trials, s", "with another `lora.r`, s", "new process, s")
    fields = ("first_trial", "next_trials", "other_shapes", "new_process")
    rows = [
        (_BASE_MODELS[row["setting"]], place, *(row[field] for field in fields))
        for place, measured in places.items()
        for row in measured
    ]
    assert all(row["same_adapter"] == "bitwise" for measured in places.values() for row in measured), "the text says so"
    return "\n".join(
        [
            format_table(headings, rows),
            "",
            "Seconds from the end of the trial before to the end of a trial's first step, the median of four trials, "
            "on machines that had other work too. A trial's adapter is bitwise that of the same run in a new process.",
        ]
    )


def _format(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2g}"
    return str(value).rpartition("/")[2].removesuffix(".yaml")


def _format_interval(trial: dict) -> str:
    low, high = trial["mean_perplexity_ci95"]
    return f"{trial['mean_perplexity']:.3f} [{low:.2f}, {high:.2f}]"
