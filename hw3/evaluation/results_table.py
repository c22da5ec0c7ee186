"""Print the table of scores, or a ranking of prompts."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from hw3.common.errors import UserError
from hw3.common.text import count_columns
from hw3.config.schema import EvaluationSection
from hw3.evaluation.bootstrap import paired_difference
from hw3.evaluation.metric_choices import MetricChoice
from hw3.evaluation.results import EvalResults
from hw3.runs.results_file import ScoreEntry


def print_results(results: EvalResults, baseline: str | None, settings: EvaluationSection) -> None:
    """Print all entries, each compared row by row with a baseline, and a breakdown of the baseline's score.

    Args:
        results: the entries.
        baseline: label of the entry to compare with; if None, the best checkpoint.
        settings: settings of the bootstrap.

    Raises:
        UserError: no entry has this label.
    """
    reference = results.best_entry() or next(iter(results.entries), None)
    if baseline is not None:
        reference = _find_baseline(results, results.entries, baseline)
    print(f"\n{results.data.rows} rows of {results.data.path}")
    print(
        f"{'':<16}  {'shots':>5}  {'prompt':<14}  {'mean ppl':>9}  {'95 % interval':>19}  {'token ppl':>9}  "
        f"{'bits/char':>9}"
        + (f"  compared with {reference.label}: difference, interval, better/worse" if reference else "")
    )
    for entry in results.entries:
        low, high = entry.mean_perplexity_ci95
        print(
            f"{entry.checkpoint or 'base':<16}  {entry.shots:>5}  {entry.prompt.name:<14}  "
            f"{entry.mean_perplexity:>9.3f}  {f'[{low:.2f}, {high:.2f}]':>19}  {entry.token_perplexity:>9.3f}  "
            f"{entry.bits_per_character:>9.3f}{_compare(results, reference, entry, settings)}"
        )
    if reference is not None:
        _print_breakdown(reference)
        best = results.best_checkpoint()
        if best is not None:
            criterion = "" if best.chosen_by == "mean_perplexity" else f" by {best.criterion}"
            score = f"mean perplexity {best.mean_perplexity:.3f}"
            print(f"best: {best.checkpoint}, {score}, chosen on {best.chosen_on}{criterion}")


def print_metric_choices(results: EvalResults, choices: Sequence[MetricChoice]) -> None:
    """Print which other checkpoints BLEU and chrF would have chosen.

    Args:
        results: the scores on a data file.
        choices: from `find_metric_choices`.
    """
    best = results.best_entry()
    for choice in choices:
        if best is None or choice.checkpoint == best.checkpoint:
            continue
        other = "" if choice.best_value is None else f", {best.checkpoint} has {choice.best_value:.2f}"
        print(
            f"{choice.metric} would have chosen {choice.checkpoint} of {choice.checkpoints} checkpoints with "
            f"predictions: {choice.value:.2f}{other}"
        )


def print_ranking(
    results: EvalResults, keys: Collection[str], baseline: str | None, settings: EvaluationSection
) -> None:
    """Print entries under several prompts, the lowest mean perplexity first, each compared row by row with a baseline.

    Args:
        results: the entries.
        keys: keys of the entries to print; those without scores are left out.
        baseline: label of the entry to compare with, or its prompt's; if None, the first of the ranking.
        settings: settings of the bootstrap.

    Raises:
        UserError: no entry has this label.
    """
    ranked = sorted((entry for entry in results.entries if entry.key in keys), key=lambda entry: entry.mean_perplexity)
    if not ranked:
        return
    reference = ranked[0] if baseline is None else _find_baseline(results, ranked, baseline)
    name = reference.prompt_label if reference.is_base else f"{reference.prompt_label} ({reference.checkpoint})"
    width = max(count_columns(name) for name in ("prompt", *(entry.prompt.name for entry in ranked)))
    print(f"\n{results.data.rows} rows of {results.data.path}")
    print(
        f"{'prompt':<{width}}  {'shots':>5}  {'':<16}  {'mean ppl':>9}  {'95 % interval':>19}  {'prompt tokens':>13}"
        f"  compared with {name}: difference, interval, better/worse"
    )
    for entry in ranked:
        low, high = entry.mean_perplexity_ci95
        tokens = "" if entry.prompt_tokens is None else f"{entry.prompt_tokens / entry.rows:.1f}"
        padding = " " * (width - count_columns(entry.prompt.name))
        print(
            f"{entry.prompt.name}{padding}  {entry.shots:>5}  {entry.checkpoint or 'base':<16}  "
            f"{entry.mean_perplexity:>9.3f}  {f'[{low:.2f}, {high:.2f}]':>19}  {tokens:>13}"
            f"{_compare(results, reference, entry, settings)}"
        )


def _find_baseline(results: EvalResults, entries: Sequence[ScoreEntry], label: str) -> ScoreEntry:
    """Return the entry with a label; of several, the one under the run's own prompt, or else the first."""
    found = [entry for entry in entries if label in (entry.label, entry.prompt_label)]
    if found:
        return min(found, key=lambda entry: (entry.prompt.sha256 != results.prompt_sha256, not entry.is_base))
    has_prompts = len({entry.prompt.sha256 for entry in entries}) > 1
    labels = [*(entry.label for entry in entries), *(entry.prompt_label for entry in entries if has_prompts)]
    raise UserError(
        f"--baseline {label}: no entry with this name has been scored; there are {', '.join(dict.fromkeys(labels))}"
    )


def _compare(results: EvalResults, reference: ScoreEntry | None, entry: ScoreEntry, settings: EvaluationSection) -> str:
    """Return the last columns of a row: the paired difference from the baseline."""
    if reference is None or entry is reference:
        return ""
    pair = paired_difference(
        results.row_scores[reference.key],
        results.row_scores[entry.key],
        samples=settings.bootstrap_samples,
        seed=settings.bootstrap_seed,
    )
    low, high = pair.ci95
    return f"  {pair.difference:+.3f} [{low:+.2f}, {high:+.2f}] {pair.better}/{pair.worse}"


def _print_breakdown(entry: ScoreEntry) -> None:
    print(f"\n{entry.label} by direction and output length:")
    directions = {"m2c": "modern to Classical", "c2m": "Classical to modern"}
    for name, group in (entry.by_direction | entry.by_length).items():
        title = directions.get(name, f"{name} characters")
        print(f"  {title:<20}  {group.mean_perplexity:>9.3f}  {group.rows} rows")
    top = entry.top_contributors
    share = sum(row.share for row in top)
    print(
        f"  the {len(top)} rows with the highest perplexity make up {share:.0%} of the mean; the first is {top[0].id}"
    )
    if unknown := entry.unknown_tokens:
        print(
            f"  {unknown} of {entry.tokens} output tokens are unknown to the tokenizer ({unknown / entry.tokens:.2%})"
        )
