"""Question 1, second half: scores by checkpoint, and the file that selects the checkpoint."""

import re
import shutil
from pathlib import Path

import yaml
from sample_runs import (
    Page,
    adapter_sha256,
    four_rows,
    make_entry,
    read_json,
    write_and_read_report,
    write_json,
    write_predictions,
    write_recipe,
    write_run,
)

from hw3.evaluation.bootstrap import PairedDifference
from hw3.report.checkpoint_scores import _describe_end_of_run


def test_checkpoints_are_compared_with_the_best(page: Page) -> None:
    header, best, last = page.table("Perplexity by checkpoint")
    assert [header[0], best[0], last[0]] == ["step", "10 (best)", "20"]
    assert best[2:] == ["6.00 [4.00, 8.00]", "5.25", "5.50", "1.500", "", ""]
    # Row by row −2, 0, 0, +8: a mean of 1.5, one row better, one worse.
    assert last[2] == "7.50 [5.50, 9.50]" and last[7] == "1 / 1"
    assert re.fullmatch(r"\+1\.50 \[−\d\.\d\d, \+\d\.\d\d\]", last[6])


def test_final_score_is_that_of_the_best_checkpoint(page: Page) -> None:
    assert "The best checkpoint is from step 10 of 20. Its scores on the 4 rows of data/eval.json are:" in page.body
    assert page.facts["mean perplexity [95%\u00a0CI]"] == "6.00 [4.00, 8.00]"
    assert page.facts["bits per character"] == "1.500"


def test_report_names_the_checkpoint_that_another_metric_would_have_chosen() -> None:
    run = write_run(Path("outputs/a"))
    results = read_json(run / "eval/eval/results.json")
    for entry in results["entries"]:
        entry["adapter_sha256"] = adapter_sha256(run, entry["step"])
    write_json(run / "eval/eval/results.json", results)
    prompt = next(entry["prompt"] for entry in results["entries"])
    for step, bleu, chrf in ((10, 25.0, 31.0), (20, 26.5, 30.0)):
        write_predictions(run, f"checkpoint-{step}", ["甲", "乙", "丙", "丁"])
        file = run / f"predictions/eval/checkpoint-{step}.quality.json"
        record = read_json(file)
        record["groups"]["all"] |= {"bleu": bleu, "chrf": chrf}
        write_json(file, record | {"prompt": prompt})
    page, _ = write_and_read_report(run)
    assert (
        "Of the 2 checkpoints with predictions, BLEU would have chosen checkpoint-20 (26.5). checkpoint-10 has 25.0. "
        "Of the 2 checkpoints with predictions, chrF would have chosen the same one (31.0)." in page.body
    )


def test_dev_file_selects_the_checkpoint_and_is_drawn() -> None:
    run = write_run(Path("outputs/a"))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["data"]["dev"] = str(write_json(Path("data/dev.json"), four_rows()))
    write_recipe(run, recipe)
    shutil.copytree(run / "eval/eval", run / "eval/dev")
    results = read_json(run / "eval/dev/results.json")
    results["data"] |= {"path": "data/dev.json", "sha256": "of the dev file"}
    for entry in results["entries"]:
        if entry["checkpoint"] == "checkpoint-20":
            entry |= {"mean_perplexity": 5.0, "mean_perplexity_ci95": [4.0, 6.0]}
    write_json(run / "eval/dev/results.json", results)
    page, _ = write_and_read_report(run)
    assert [row[0] for row in page.table("Perplexity by checkpoint")] == ["step", "10", "20 (selected)"]
    assert page.table("The same checkpoint on other files")[1:] == [
        ["data/dev.json", "4", "30.00 [28.00, 32.00]", "5.00 [4.00, 6.00]"]
    ]
    assert "The checkpoint was selected on data/dev.json, so data/eval.json did not influence the choice." in page.body
    assert page.texts["title"].count("dev, step 20: 5.000 [4.00, 6.00]") == 2
    # One command scores both files.
    evaluations = [command for command in page.commands if "hw3 eval" in command]
    assert len(evaluations) == 2 and not any("--data" in command for command in evaluations)


def test_learning_curve_of_wide_and_narrow_screens_has_tooltips_and_labels(page: Page) -> None:
    for tooltip in (
        "step 0: 30.000 [28.00, 32.00]",
        "step 20: 7.500 [5.50, 9.50]",
        "best: step 10: 6.000 [4.00, 8.00]",
    ):
        assert page.texts["title"].count(tooltip) == 2, tooltip
    assert page.texts["title"].count("2-shot: 12.000 [10.00, 14.00]") == 4  # the level and its interval
    for label in (
        "base 30.00", "2-shot 12.00", "best 6.00, step 10", "training loss, nats per token",
        "data/eval.json, 95 % interval",
    ):  # fmt: skip
        assert page.texts["text"].count(label) == 2, label


def test_description_of_the_last_checkpoint_follows_the_interval() -> None:
    best, last = make_entry("checkpoint-10", "p"), make_entry("checkpoint-20", "p")
    for difference, ci95, expected in (
        (1.5, (-1.0, 4.0), "The interval contains 0, so the difference is not significant."),
        (1.5, (0.5, 4.0), "The model overfits after step 10."),
        (-1.5, (-4.0, -0.5), "On this file, the last checkpoint is significantly better."),
    ):
        assert _describe_end_of_run(best, last, PairedDifference(difference, ci95, 1, 1)).endswith(expected)
