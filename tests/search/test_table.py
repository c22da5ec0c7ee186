"""The lines and tables of a search."""

import pytest

from hw3.report.search_trials import format_score, format_setting, rank_trials, short_names
from hw3.runs.search_record import SearchRecord, TrialRecord
from hw3.search.table import describe_trial, print_ranking


def trial(number: int, outcome: str, score: float | None, **more: object) -> TrialRecord:
    values = {"training.learning_rate": 0.00123456, "lora.r": 8, "prompt": "recipes/prompts/study.yaml"}
    scored = {"score": score, "step": 8, "scores": {8: score}, "mean_perplexity": score} if score else {}
    interval = {"mean_perplexity_ci95": (score - 1, score + 1)} if score else {}
    defaults = {"score": None, "step": None, "scores": {}, "mean_perplexity": None, "mean_perplexity_ci95": None}
    return TrialRecord(
        number=number, run="trial", settings=values, overrides=[], outcome=outcome, steps=8 if score else 0,
        **(defaults | scored | interval | more),
    )  # fmt: skip


def record(*trials: TrialRecord) -> SearchRecord:
    return SearchRecord(
        id="x", recipe="tiny-qlora", sampler="tpe", pruner="none", best_by="mean_perplexity", total_trials=16,
        max_steps=36, trials=list(trials),
    )  # fmt: skip


def test_short_names_are_unique() -> None:
    assert short_names(["lora.r", "training.seed"]) == {"lora.r": "r", "training.seed": "seed"}
    assert short_names(["a.r", "b.r"]) == {"a.r": "a.r", "b.r": "b.r"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.00123456, "0.00123"),
        (8, "8"),
        (True, "true"),
        (None, "null"),
        ("recipes/prompts/study.yaml", "study"),
        (["q_proj", "v_proj"], '["q_proj", "v_proj"]'),
        ("x" * 50, "x" * 39 + "…"),
    ],
)
def test_settings_are_short(value: object, text: str) -> None:
    assert format_setting(value) == text


def test_score_has_its_interval() -> None:
    assert format_score(trial(0, "complete", 5.0)) == "5.000 [4.00, 6.00]"
    by_tokens = trial(0, "complete", 5.0).model_copy(update={"score": 3.5})
    assert format_score(by_tokens) == "3.500, mean 5.000 [4.00, 6.00]"
    assert format_score(trial(0, "failed", None)) == "-"


def test_line_of_a_trial() -> None:
    one = trial(2, "pruned", 5.0)
    expected = "trial  3/16  5.000 [4.00, 6.00]        pruned    step  8/36  learning_rate 0.00123  r 8  prompt study"
    assert describe_trial(one, record(one)) == expected
    failed = trial(2, "failed", None, problem="out of memory")
    assert describe_trial(failed, record(failed)).endswith("  (out of memory)")


def test_ranking_puts_complete_trials_first(capsys: pytest.CaptureFixture[str]) -> None:
    search = record(
        trial(0, "pruned", 3.0), trial(1, "complete", 6.0), trial(2, "failed", None), trial(3, "complete", 5.0)
    )
    assert [trial.number for trial in rank_trials(search)] == [3, 1, 0, 2]
    print_ranking(search)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["trial", "mean", "perplexity", "outcome", "steps", "learning_rate", "r", "prompt"]
    assert [line.split()[0] for line in lines[1:]] == ["3", "1", "0", "2"]
