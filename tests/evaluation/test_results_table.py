"""The printed table compares every entry with a baseline, row by row."""

import math
from collections.abc import Callable

import pytest
from helpers import make_score_entry

from hw3.common.errors import UserError
from hw3.config.schema import EvaluationSection
from hw3.evaluation.perplexity import RowScore
from hw3.evaluation.results import EvalResults
from hw3.evaluation.results_table import print_ranking, print_results
from hw3.runs.results_file import GroupScore, RowContribution, ScoreEntry

SETTINGS = EvaluationSection(bootstrap_samples=100)


@pytest.fixture
def results(make_results: Callable[..., EvalResults]) -> EvalResults:
    """The base model with perplexities e^3 and e^4, and a checkpoint with e^2 and e^4."""
    base, checkpoint = _with_breakdown(make_score_entry(0, 37.3)), _with_breakdown(make_score_entry(10, 31.0))
    results = make_results("eval.json", base, checkpoint)
    results.row_scores = {
        base.key: [RowScore("a", 3.0, 1, 1), RowScore("b", 4.0, 1, 1)],
        checkpoint.key: [RowScore("a", 2.0, 1, 1), RowScore("b", 4.0, 1, 1)],
    }
    return results


def _with_breakdown(entry: ScoreEntry) -> ScoreEntry:
    group = GroupScore(mean_perplexity=31.0, token_perplexity=5.5, rows=2, tokens=7)
    top = [RowContribution(id="b", perplexity=54.6, share=0.88, tokens=1)]
    update = {"by_direction": {"m2c": group}, "by_length": {"1-10": group}, "top_contributors": top}
    return entry.model_copy(update=update | {"unknown_tokens": 7})


def test_print_results_compares_with_the_best_checkpoint(
    results: EvalResults, capsys: pytest.CaptureFixture[str]
) -> None:
    print_results(results, None, SETTINGS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "2 rows of eval.json"
    assert lines[2].endswith("compared with checkpoint-10: difference, interval, better/worse")
    assert lines[3].split()[:6] == ["base", "0", "own", "37.300", "[36.30,", "38.30]"]
    # (e^3 - e^2) / 2 = 6.348; the base model is worse on one row.
    assert lines[3].split()[8] == "+6.348" and lines[3].endswith(" 0/1")
    assert lines[4].split()[0] == "checkpoint-10" and lines[4].endswith("2.500")
    assert lines[6:] == [
        "checkpoint-10 by direction and output length:",
        "  modern to Classical      31.000  2 rows",
        "  1-10 characters          31.000  2 rows",
        "  the 1 rows with the highest perplexity make up 88% of the mean; the first is b",
        "  7 of 7 output tokens are unknown to the tokenizer (100.00%)",
        "best: checkpoint-10, mean perplexity 31.000, chosen on eval.json",
    ]


def test_print_results_compares_with_a_named_baseline(results: EvalResults, capsys: pytest.CaptureFixture[str]) -> None:
    print_results(results, "base", SETTINGS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[4].split()[8] == "-6.348" and lines[4].endswith(" 1/0")


def test_print_results_refuses_an_unknown_baseline(results: EvalResults) -> None:
    with pytest.raises(UserError, match=r"--baseline checkpoint-5: .*; there are base, checkpoint-10$"):
        print_results(results, "checkpoint-5", SETTINGS)


@pytest.fixture
def prompts(make_results: Callable[..., EvalResults]) -> EvalResults:
    """The base model under the run's own prompt and under a better one, with 0 and 4 few-shot examples."""
    perplexities = {("own", 0): (3.0, 4.0), ("own", 4): (2.5, 3.0), ("short", 0): (2.0, 3.0), ("short", 4): (4.0, 4.5)}
    entries = [
        make_score_entry(shots=shots, prompt=name, mean_perplexity=sum(map(math.exp, values)) / 2)
        for (name, shots), values in perplexities.items()
    ]
    entries[2] = entries[2].model_copy(update={"prompt_tokens": 25})
    results = make_results("eval.json", *entries)
    for entry, values in zip(entries, perplexities.values(), strict=True):
        results.row_scores[entry.key] = [RowScore(id, value, 1, 1) for id, value in zip("ab", values, strict=True)]
    return results


def test_print_ranking_compares_every_prompt_with_the_best(
    prompts: EvalResults, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {entry.key for entry in prompts.entries if entry.prompt_label != "short+4"}
    print_ranking(prompts, keys, None, SETTINGS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].endswith("prompt tokens  compared with short: difference, interval, better/worse")
    assert [line.split()[:4] for line in lines[3:]] == [
        ["short", "0", "base", "13.737"],
        ["own", "4", "base", "16.134"],
        ["own", "0", "base", "37.342"],
    ]
    assert lines[3].endswith("  12.5")  # 25 tokens in 2 rows
    # (e^2.5 - e^2) / 2 = 2.397: worse on one row, equal on the other.
    assert lines[4].split()[6] == "+2.397" and lines[4].endswith(" 0/1")


@pytest.mark.parametrize(("baseline", "name"), [("base", "own"), ("base+4", "own+4"), ("short+4", "short+4")])
def test_print_ranking_compares_with_a_named_baseline(
    prompts: EvalResults, capsys: pytest.CaptureFixture[str], baseline: str, name: str
) -> None:
    print_ranking(prompts, set(prompts.row_scores), baseline, SETTINGS)
    assert f"compared with {name}: difference" in capsys.readouterr().out


def test_print_ranking_names_the_baselines_that_there_are(prompts: EvalResults) -> None:
    with pytest.raises(UserError, match=r"--baseline shot: .*; there are base, base\+4, short, own\+4, own, short\+4$"):
        print_ranking(prompts, set(prompts.row_scores), "shot", SETTINGS)
