"""The lines that a search prints: one for each trial that ends, and the ranking at the end."""

from __future__ import annotations

from hw3.report.search_trials import format_score, format_setting, format_settings, rank_trials, short_names
from hw3.runs.search_record import SearchRecord, TrialRecord


def describe_trial(trial: TrialRecord, record: SearchRecord) -> str:
    """Return the line of a trial that has ended."""
    width = len(str(record.total_trials))
    line = f"trial {trial.number + 1:>{width}}/{record.total_trials}  {format_score(trial):<24}  {trial.outcome:<8}  "
    line += f"step {trial.steps:>{len(str(record.max_steps))}}/{record.max_steps}  {format_settings(trial.settings)}"
    return line if trial.problem is None else f"{line}  ({trial.problem})"


def print_ranking(record: SearchRecord) -> None:
    """Print all trials, the best one first."""
    names = short_names([key for trial in record.trials[:1] for key in trial.settings])
    header = ["trial", record.best_by.replace("_", " "), "outcome", "steps", *names.values()]
    rows = [
        [
            str(trial.number),
            format_score(trial),
            trial.outcome,
            str(trial.steps),
            *(format_setting(trial.settings[key]) for key in names if key in trial.settings),
        ]
        for trial in rank_trials(record)
    ]
    widths = [max(len(row[column]) for row in [header, *rows] if column < len(row)) for column in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)).rstrip())
