"""The report of `hw3 data build`: `data.json`, and the tables that are printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hw3.corpus.cleaning import RuleCount
from hw3.corpus.dedup import NEAR_DUPLICATE_SIMILARITY
from hw3.corpus.excluded import ExcludedFile
from hw3.corpus.filters import FILTER_RULES
from hw3.corpus.splitting import LeakageCheck, LeakageChecks

REPORT_FILE = "data.json"


@dataclass(frozen=True)
class BuildSettings:
    """Everything that decides the rows, apart from the corpus and the excluded files.

    Attributes:
        convert: see `hw3.corpus.script_conversion`.
        train, dev, test, private: rows of each split; `train` None takes all that remain.
        seed: of every draw.
    """

    convert: str = "s2tw"
    train: int | None = 10_000
    dev: int = 250
    test: int = 250
    private: int = 250
    seed: int = 0


@dataclass(frozen=True)
class CorpusSummary:
    """The corpus that was read."""

    name: str
    sha256: str
    files: int
    pairs: int
    books: int
    skipped_chapters: int


@dataclass(frozen=True)
class ClusterSummary:
    """The clusters of the cleaned pairs; `largest_cluster` counts pairs."""

    pairs: int
    clusters: int
    pairs_with_near_duplicates: int
    largest_cluster: int


@dataclass(frozen=True)
class SplitSummary:
    """One written file: rows, of them modern to Classical (m2c) and Classical to modern (c2m), and source books."""

    file: str
    rows: int
    m2c: int
    c2m: int
    books: int
    sha256: str


@dataclass(frozen=True)
class BuildReport:
    """The content of `data.json`. It has counts and checksums only, so it reveals no sentence of an excluded file.

    Attributes:
        skipped_pairs: pairs passed over because they are copies of a pair in an earlier split.
        splits: split name to its file.
        versions: of the packages that decide the rows.
    """

    schema: int
    source: CorpusSummary
    settings: BuildSettings
    excluded_files: list[ExcludedFile]
    cleaning: list[RuleCount]
    clusters: ClusterSummary
    skipped_pairs: int
    splits: dict[str, SplitSummary]
    leakage_checks: LeakageChecks
    versions: dict[str, str]


def print_cleaning(pairs_read: int, counts: Sequence[RuleCount]) -> None:
    """Print one line per rule."""
    print(f"{'':<20}{'removed':>9}{'remaining':>11}\n{'read':<20}{'':>9}{pairs_read:>11,}")
    for count in counts:
        print(f"{count.rule:<20}{count.removed:>9,}{count.remaining:>11,}  {FILTER_RULES[count.rule]}")


def print_splits(report: BuildReport, output: Path) -> None:
    """Print clusters, splits and the results of the leakage checks."""
    clusters, checks = report.clusters, report.leakage_checks
    print(
        f"\n{clusters.clusters:,} clusters; {clusters.pairs_with_near_duplicates:,} pairs have near duplicates; "
        f"the largest cluster has {clusters.largest_cluster:,} pairs"
    )
    for split in report.splits.values():
        print(
            f"{output / split.file}: {split.rows:,} rows, {split.m2c:,} modern to Classical, {split.c2m:,} Classical "
            f"to modern, from {split.books} books"
        )
    _print_check("evaluation", checks.train_vs_evaluation)
    if checks.rows_vs_excluded is not None:
        _print_check("excluded", checks.rows_vs_excluded)
    print(f"{output / REPORT_FILE}: source, counts, checksums")


def _print_check(name: str, check: LeakageCheck) -> None:
    print(
        f"verified: {check.copies} of {check.rows_compared:,} rows copy one of {check.sentences:,} {name} sentences; "
        f"the highest similarity of the others is {check.max_similarity:.2f} (near duplicates: from "
        f"{NEAR_DUPLICATE_SIMILARITY:g})"
    )
