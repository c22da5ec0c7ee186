"""Print the table of scores."""

from __future__ import annotations

from hw3.common.errors import UserError
from hw3.config.schema import EvaluationSection
from hw3.evaluation.bootstrap import paired_difference
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
    reference = _find_baseline(results, baseline)
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
            print(f"best: {best.checkpoint}, mean perplexity {best.mean_perplexity:.3f}, chosen on {best.chosen_on}")


def _find_baseline(results: EvalResults, label: str | None) -> ScoreEntry | None:
    if label is None:
        return results.best_entry() or next(iter(results.entries), None)
    for entry in results.entries:
        if entry.label == label:
            return entry
    labels = ", ".join(dict.fromkeys(entry.label for entry in results.entries))
    raise UserError(f"--baseline {label}: no entry with this name has been scored; there are {labels}")


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
