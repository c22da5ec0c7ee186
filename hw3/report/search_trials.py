"""Texts and the order of the trials of a search, for tables and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hw3.runs.search_record import SearchRecord, TrialRecord

MAX_VALUE_CHARACTERS = 40


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return the last part of each key, or the complete key where two have the same last part."""
    parts = [key.rpartition(".")[2] for key in keys]
    return {key: part if parts.count(part) == 1 else key for key, part in zip(keys, parts, strict=True)}


def format_setting(value: Any) -> str:
    """Return a value for a table: numbers with three digits, the name of a prompt file, other values as JSON."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, str):
        text = value.rpartition("/")[2].removesuffix(".yaml") if value.endswith(".yaml") else value
    else:
        text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_VALUE_CHARACTERS else f"{text[: MAX_VALUE_CHARACTERS - 1]}…"


def format_settings(settings: Mapping[str, Any]) -> str:
    """Return a trial's settings in one line."""
    names = short_names(list(settings))
    return "  ".join(f"{names[key]} {format_setting(value)}" for key, value in settings.items())


def format_score(trial: TrialRecord) -> str:
    """Return a trial's score with its bootstrap interval."""
    if trial.score is None:
        return "-"
    if trial.mean_perplexity is None or trial.mean_perplexity_ci95 is None:
        return f"{trial.score:.3f}"
    low, high = trial.mean_perplexity_ci95
    score = f"{trial.mean_perplexity:.3f} [{low:.2f}, {high:.2f}]"
    return score if trial.score == trial.mean_perplexity else f"{trial.score:.3f}, mean {score}"


def rank_trials(record: SearchRecord) -> list[TrialRecord]:
    """Return the trials: complete ones by score, then those that were stopped, by score, then the others."""
    order = {"complete": 0, "pruned": 1, "running": 2, "failed": 3}
    return sorted(
        record.trials,
        key=lambda trial: (
            order[trial.outcome] if trial.score is not None else 4,
            trial.score if trial.score is not None else 0.0,
            trial.number,
        ),
    )
