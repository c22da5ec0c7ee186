"""What is loaded of a run: results and predictions that no longer belong to it are left out."""

from pathlib import Path

from sample_runs import four_rows, read_json, write_and_read_report, write_json, write_predictions, write_run

from hw3.report.run_data import load_run_data
from hw3.runs.run import Run


def test_predictions_for_other_rows_are_not_shown() -> None:
    run = write_run(Path("outputs/a"))
    write_predictions(run, "base", ["甲"] * 4, write_json(Path("data/other.json"), four_rows("x")))
    page, _ = write_and_read_report(run)
    assert not any(title.startswith("Metrics") for title in page.tables)


def test_changed_predictions_are_not_shown() -> None:
    run = write_run(Path("outputs/a"))
    write_predictions(run, "checkpoint-10", ["甲"] * 4)
    file = run / "predictions/eval/checkpoint-10.json"
    file.write_text(file.read_text(encoding="utf-8").replace("甲", "乙"), encoding="utf-8")
    page, _ = write_and_read_report(run)
    assert "checkpoint-10.json is not shown: it has changed since it was written." in page.body
    assert not any(title.startswith("Metrics") for title in page.tables)


def test_predictions_of_an_earlier_checkpoint_are_not_shown() -> None:
    run = write_run(Path("outputs/a"))
    write_predictions(run, "checkpoint-10", ["甲"] * 4)
    record = run / "predictions/eval/checkpoint-10.quality.json"
    write_json(record, read_json(record) | {"adapter_sha256": "of another checkpoint"})
    page, _ = write_and_read_report(run)
    assert "checkpoint-10.json is not shown: checkpoint-10 has been trained again since." in page.body


def test_predictions_are_sorted_by_step_and_number_of_examples() -> None:
    run = write_run(Path("outputs/a"))
    for name in ("checkpoint-20", "base+2", "checkpoint-10", "base"):
        write_predictions(run, name, ["甲"] * 4)
    predictions = load_run_data(Run(run)).predictions
    assert [system.name for system in predictions] == ["base", "base+2", "checkpoint-10", "checkpoint-20"]


def test_scores_of_an_earlier_run_are_not_shown() -> None:
    run = write_run(Path("outputs/a"))
    write_json(run / "manifest.json", read_json(run / "manifest.json") | {"started": "2026-02-02T00:00:00+00:00"})
    page, _ = write_and_read_report(run)
    assert "No checkpoint has been scored yet." in page.body
    assert len(page.table("Zero-shot, few-shot and fine-tuned")) == 3
