"""A report on the folder of a search is one on its winner, with a section on the search."""

from pathlib import Path

from helpers import hw3
from sample_runs import write_and_read_report, write_run

from hw3.runs.search_record import BestTrial, FinalScore, SearchRecord, TrialRecord


def write_search(folder: Path, *, is_finished: bool = True) -> Path:
    """Write a search of three trials, the second of which is the best."""
    trials = []
    for number, (score, outcome) in enumerate([(7.0, "complete"), (6.0, "complete"), (9.0, "pruned")]):
        write_run(folder / f"trial-{number:03}")
        scores = {10: score + 1, 20: score} if outcome == "complete" else {10: score}
        trials.append(
            TrialRecord(
                number=number,
                run=f"trial-{number:03}",
                settings={"training.learning_rate": 0.001 * (number + 1), "prompt": "recipes/prompts/study.yaml"},
                overrides=[],
                outcome=outcome,
                steps=max(scores),
                scores=scores,
                score=score,
                step=max(scores),
                mean_perplexity=score,
                mean_perplexity_ci95=(score - 1, score + 1),
            )
        )
    final = FinalScore(
        data_file="data/eval.json", mean_perplexity=6.5, mean_perplexity_ci95=(5.5, 7.5), base_mean_perplexity=30.0
    )
    best = BestTrial(number=1, checkpoint="checkpoint-20", chosen_on="data/dev.json", final=final)
    SearchRecord(
        id="x",
        recipe="tiny-<b>qlora",
        sampler="tpe",
        pruner="successive_halving",
        best_by="mean_perplexity",
        total_trials=3,
        max_steps=20,
        trials=trials,
        importances_step=10,
        importances={"training.learning_rate": 0.8, "prompt": 0.2},
        best=best if is_finished else None,
    ).write(folder / "search.json")
    return folder


def test_section_has_the_winner_the_picture_and_the_trials() -> None:
    folder = write_search(Path("outputs/search-tiny"))
    page = write_and_read_report(folder)
    assert (folder / "report.html").exists()
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    assert "## Search: outputs/search-tiny" in markdown
    assert "The pruner saved 17% of the optimizer steps. The best trial was chosen on data/dev.json." in markdown
    assert "| mean perplexity on data/eval.json | 6.50 [5.50, 7.50] |" in markdown
    assert "| 1 | 0.002 | study | complete | 20 | 6.000 [5.00, 7.00] |" in markdown.replace("**", "")
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert "tiny-<b>qlora" not in html and "tiny-&lt;b&gt;qlora" in html
    assert "trial 2, pruned: 9.000; learning_rate 0.003  prompt study" in html
    assert page is not None


def test_search_without_a_winner_is_refused() -> None:
    folder = write_search(Path("outputs/search-tiny"), is_finished=False)
    message = "".join(hw3("report", folder, expected=2))
    assert "outputs/search-tiny: the search has no winner yet; run the same `hw3 search` command" in message
