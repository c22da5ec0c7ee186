"""Blocks about `hw3 search`: the trials of the embedded model, and the time between trials."""

from __future__ import annotations

from document_blocks.sources import format_table, read_json, read_report

MAX_TRIALS_SHOWN = 5


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


def search_speed() -> str:
    """Return the time until a trial's first step, in a process that has trained others and in a new one."""
    report = read_report("search_cpu")
    (row,) = report["rows"]
    assert row["same_adapter"] == "bitwise", "the text says so"
    machine, torch = f"{report['machine']['cpu_cores']} busy CPU cores", report["versions"]["torch"].partition("+")[0]
    return (
        f"With the model in this repository on {machine}, torch {torch}, a trial's first step ends "
        f"{row['next_trials']} s after the trial before, {row['slowest']} s at most. In a new process it ends after "
        f"{row['new_process']} s. The adapters of both are bitwise equal."
    )


def _format(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2g}"
    return str(value).rpartition("/")[2].removesuffix(".yaml")


def _format_interval(trial: dict) -> str:
    low, high = trial["mean_perplexity_ci95"]
    return f"{trial['mean_perplexity']:.3f} [{low:.2f}, {high:.2f}]"
