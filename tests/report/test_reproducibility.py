"""The last section: times, memory and disk space."""

from sample_runs import Page


def test_facts_sum_up_the_sessions(page: Page) -> None:
    assert page.facts["training time"] == "90 s for 20 steps, in 2 sessions"
    assert page.facts["peak GPU memory, training"] == "3.50 GiB" and page.facts["device"] == "NVIDIA H200"
    assert page.facts["batch layout"] == "2 processes × 1 row × 3 accumulation steps"
    assert page.facts["disk space"] == "2.0 MiB for 2 checkpoints; weights: 1.0 MiB each"


def test_sessions_are_listed(page: Page) -> None:
    assert page.table("Training sessions")[1:] == [
        ["2026-01-02T03:04:05+00:00", "0", "10", "40 s", "2"],
        ["2026-01-02T04:04:05+00:00", "10", "20", "50 s", "2"],
    ]
