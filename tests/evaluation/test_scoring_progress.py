"""Entries and rows are counted, also those of an entry that could not be scored."""

import pytest

from hw3.evaluation.scoring_progress import ScoringProgress


def test_scoring_progress_counts_entries_and_the_rows_of_the_present_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    progress = ScoringProgress(entries=3, rows=30)
    progress.start_entry("base", 10)
    now += 5
    progress.add_rows(10)
    progress.finish_entry()
    assert progress.count_entry() == "1/3, 00:10 left"
    progress.start_entry("checkpoint-8", 10)
    progress.add_rows(4)
    assert progress.describe().startswith("1/3 entries, checkpoint-8 4/10, ")
    progress.finish_entry()  # its adapter is invalid
    assert progress.count_entry() == "2/3, 00:02 left"
    progress.start_entry("checkpoint-16", 10)
    progress.add_rows(10)
    assert progress.count_entry() == "3/3"
    progress.close()
