"""Format numbers and names for a report."""

from __future__ import annotations

from typing import Any

from hw3.evaluation.bootstrap import PairedDifference
from hw3.report.language import tr
from hw3.runs.results_file import ScoreEntry

CI = "[95%\u00a0CI]"  # in column names
GROUP_NAMES = {
    "all": "all rows",
    "m2c": "modern to Classical",
    "c2m": "Classical to modern",
    "other": "other instructions",
}
SHORT_GROUP_NAMES = GROUP_NAMES | {"m2c": "into Classical", "c2m": "into modern"}  # for narrow columns


def format_count(count: int, noun: str, plural: str | None = None) -> str:
    """Return a count with its noun: `1 row`, `1,200 rows`, `2 processes`."""
    return tr(f"{{count:,}} {noun if count == 1 else plural or noun + 's'}", count=count)


def format_perplexity(value: float) -> str:
    """Return a perplexity with two decimals, from 1,000 upwards with none."""
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def format_interval(bounds: tuple[float, float]) -> str:
    """Return an interval of perplexities: `[3.95, 5.18]`."""
    return f"[{format_perplexity(bounds[0])}, {format_perplexity(bounds[1])}]"


def format_score(entry: ScoreEntry) -> str:
    """Return a mean perplexity with its interval: `4.52 [3.95, 5.18]`."""
    return f"{format_perplexity(entry.mean_perplexity)} {format_interval(entry.mean_perplexity_ci95)}"


def format_difference(pair: PairedDifference) -> str:
    """Return a paired difference with its interval: `+5.18 [+4.02, +6.55]`."""
    return "{} [{}, {}]".format(*map(format_signed, (pair.difference, *pair.ci95)))


def format_comparison(pair: PairedDifference | None) -> list[str]:
    """Format two cells of a table: the difference, and on how many rows it is better / worse; empty without a pair."""
    return ["", ""] if pair is None else [format_difference(pair), f"{pair.better} / {pair.worse}"]


def format_signed(value: float) -> str:
    """Return a difference of perplexities with its sign, a minus sign instead of a hyphen: `+0.21`, `−1.30`."""
    return ("−" if value < 0 else "+") + format_perplexity(abs(value))


def format_percent(share: float) -> str:
    """Return a share, where 1 is everything, as a percentage with one decimal."""
    return f"{share:.1%}"


def format_duration(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours."""
    if seconds < 120:
        return tr("{seconds:.0f} s", seconds=seconds) if seconds >= 10 else tr("{seconds:.1f} s", seconds=seconds)
    if seconds < 7200:
        return tr("{minutes:.0f} min", minutes=seconds / 60)
    return tr("{hours:.1f} h", hours=seconds / 3600)


def format_length_group(name: str) -> str:
    """Return the name of a group of `by_length`, such as `1-10` or `51-`, for people."""
    if name[-1] == "-":
        return tr("{least} or more characters", least=name[:-1])
    return tr("{range} characters", range=name.replace("-", "–"))


def format_shots(entry: ScoreEntry) -> str:
    """Return the number of few-shot examples: `zero-shot`, `4-shot`, `4-shot, sampled examples`."""
    name = tr("{shots}-shot", shots=entry.shots) if entry.shots else tr("zero-shot")
    return tr("{shots}, sampled examples", shots=name) if entry.example_ids else name


def format_model(entry: ScoreEntry) -> str:
    """Return the scored model: `base model, zero-shot`, `checkpoint-100, zero-shot`."""
    if entry.checkpoint is None:
        return tr("base model, {shots}", shots=format_shots(entry))
    return f"{entry.checkpoint}, {format_shots(entry)}"


def format_value(value: Any) -> str:
    """Return the value of a setting as short text."""
    if isinstance(value, bool):
        return tr("yes") if value else tr("no")
    if value is None:
        return tr("none")
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(format_value, value))
    return str(value)
