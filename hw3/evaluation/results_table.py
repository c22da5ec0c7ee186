"""Print the table of scores."""

from __future__ import annotations

from typing import Any

from hw3.common.errors import UserError
from hw3.config.schema import EvaluationSection
from hw3.evaluation.bootstrap import paired_difference
from hw3.evaluation.results import Results, entry_name


def print_results(results: Results, against: str | None, settings: EvaluationSection) -> None:
    """The table of all entries, each compared row by row with one of them, and what the best one's mean hangs on.

    Args:
        results: what has been scored.
        against: a checkpoint's name, or `base`; the best checkpoint if None.
        settings: of the bootstrap.

    Raises:
        UserError: no entry is of that name.
    """
    reference = _reference(results, against)
    data, best = results.head["data"], results.best()
    print(f"\n{data['rows']} rows of {data['path']}")
    print(
        f"{'':<16}  {'shots':>5}  {'prompt':<14}  {'mean ppl':>9}  {'95 % interval':>19}  {'token ppl':>9}  "
        f"{'bits/char':>9}"
        + (f"  against {entry_name(reference)}: difference, interval, better/worse" if reference else "")
    )
    for entry in results.entries:
        low, high = entry["mean_perplexity_ci95"]
        compared = ""
        if reference is not None and entry is not reference:
            pair = paired_difference(
                results.rows[reference["key"]],
                results.rows[entry["key"]],
                samples=settings.bootstrap_samples,
                seed=settings.bootstrap_seed,
            )
            compared = "  {:+.3f} [{:+.2f}, {:+.2f}] {}/{}".format(pair.difference, *pair.ci95, pair.better, pair.worse)
        print(
            f"{entry['checkpoint'] or 'base':<16}  {entry['shots']:>5}  {entry['prompt']['name']:<14}  "
            f"{entry['mean_perplexity']:>9.3f}  {f'[{low:.2f}, {high:.2f}]':>19}  {entry['token_perplexity']:>9.3f}  "
            f"{entry['bits_per_character']:>9.3f}{compared}"
        )
    if reference is None:
        return
    print(f"\n{entry_name(reference)} by direction and output length:")
    for name, group in [*reference["by_direction"].items(), *reference["by_length"].items()]:
        name = {"m2c": "modern to Classical", "c2m": "Classical to modern"}.get(name, f"{name} characters")
        print(f"  {name:<20}  {group['mean_perplexity']:>9.3f}  {group['rows']} rows")
    share = sum(row["share"] for row in reference["heaviest"])
    print(f"  its ten heaviest rows are {share:.0%} of the mean, the first {reference['heaviest'][0]['id']}")
    if unknown := reference["unknown_tokens"]:
        tokens = reference["tokens"]
        print(f"  {unknown} of {tokens} output tokens are unknown to the tokenizer ({unknown / tokens:.2%})")
    if best is not None:
        print(
            f"best: {best['checkpoint']}, mean perplexity {best['mean_perplexity']:.3f}, chosen on {best['chosen_on']}"
        )


def _reference(results: Results, against: str | None) -> dict[str, Any] | None:
    if against is None:
        return results.best_entry() or next(iter(results.entries), None)
    for entry in results.entries:
        if entry_name(entry) == against:
            return entry
    names = ", ".join(dict.fromkeys(map(entry_name, results.entries)))
    raise UserError(f"--against {against}: nothing of that name has been scored; there are {names}")
