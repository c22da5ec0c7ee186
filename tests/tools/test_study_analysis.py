"""`tools/study/analysis.py`: estimates over seeds and rows, and what other ways of selecting would cost."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import REPOSITORY
from study.analysis import Study, mean_curve


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def make_run(
    name: str, seed: int, settings: dict[str, Any], *points: tuple[float, float, float, float]
) -> dict[str, Any]:
    """Return a record; each point has (mean perplexity, evaluation loss, BLEU) on the file, and held-out perplexity."""
    curve = [
        {
            "step": 20 * number,
            "eval": {"mean_perplexity": perplexity, "eval_loss": loss, "token_perplexity": perplexity},
            "held_out": {"mean_perplexity": held_out},
            "metrics": {"all": {"bleu": bleu, "chrf": bleu}},
        }
        for number, (perplexity, loss, bleu, held_out) in enumerate(points, 1)
    ]
    best = min(curve, key=lambda point: point["held_out"]["mean_perplexity"])
    fields = {"id": name, "seed": seed, "settings": settings, "curve": curve, "best_step": best["step"]}
    return {**fields, "model": "tiny", "experiments": ["data"], "seconds": {"train": 6.0}, "training_rows": 9}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    half = {"train_share": "1/2"}
    runs = [
        make_run("a", 1, {}, (6.0, 1.5, 20.0, 6.1), (5.0, 1.6, 30.0, 5.2), (5.5, 1.7, 25.0, 5.0)),
        make_run("b", 2, {}, (6.0, 1.9, 20.0, 6.4), (5.2, 1.8, 10.0, 5.4)),
        make_run("c", 1, half, (7.0, 2.0, 10.0, 7.0)),
    ]
    (tmp_path / "runs.json").write_text(json.dumps({"plan": "docs/study/plan.yaml", "runs": runs}), encoding="utf-8")
    rows = {"a": [4.0, 7.0], "b": [4.2, 6.2], "c": [6.0, 8.0]}
    arrays = {f"{name}/{file}": np.array(values) for name, values in rows.items() for file in ("eval", "held_out")}
    np.savez(tmp_path / "rows.npz", **arrays)
    return Study(tmp_path)


def test_best_checkpoint_is_selected_on_the_held_out_rows(study: Study) -> None:
    [seeds, [half]] = study.cases("tiny", "data", "train_share").values()
    estimate = study.estimate(seeds)
    assert estimate.seeds == [5.5, 5.2]
    assert estimate.mean == pytest.approx(5.35)
    assert (estimate.low, estimate.high) == (4.0, 7.0)  # of single seeds and rows, with so few of them
    assert study.best_case("tiny", "data", "train_share") == (1,)
    difference = study.difference(seeds, [half])
    assert (difference.mean, difference.low, difference.high) == pytest.approx((1.5, 1.0, 2.0))


def test_runs_without_a_common_seed_are_not_compared(study: Study) -> None:
    first, second, half = study.select("tiny")
    assert study.describe([half], [first]).change == "+1.50 [+1.00, +2.00]"
    assert study.describe([half], [second]).change == ""


def test_selection_counts_other_checkpoints_and_their_cost(study: Study) -> None:
    loss = study.selection("tiny", "eval_loss")
    assert (loss.runs, loss.different) == (2, 1)
    assert loss.costs == pytest.approx([0.2, 0.0])
    assert (loss.share, loss.cost, loss.worst) == pytest.approx((0.5, 0.1, 0.2))
    assert loss.interval == pytest.approx((0.0, 0.2))
    bleu = study.selection("tiny", "bleu")
    assert (bleu.runs, bleu.different) == (2, 1)
    assert bleu.costs == pytest.approx([0.0, 6.0 / 5.2 - 1])
    assert study.selection("tiny", "token_perplexity").different == 0


def test_runs_far_from_the_best_one_do_not_count_for_selection(study: Study) -> None:
    assert [run["id"] for run in study.comparable("tiny")] == ["a", "b"]  # the lowest score of c is 7.0, of all 5.0


def test_cases_are_compared_with_the_recipes_setting(study: Study) -> None:
    cases = study.compare("tiny", "data")
    assert [(values, case.score, case.change) for values, case in cases.items()] == [
        ((1,), "5.35 [4.00, 7.00]", ""),
        (("1/2",), "7.00 [6.00, 8.00]", "+1.50 [+1.00, +2.00]"),
    ]
    assert (cases[1,].best_step, cases[1,].last) == (50, pytest.approx(5.35))


def test_transfer_scores_the_winner_of_one_file_on_the_other(study: Study) -> None:
    public = study.transfer("tiny", "eval", "held_out")
    assert (public.own, public.other, public.lowest, public.rank, public.checkpoints) == (5.0, 5.2, 5.0, 2, 6)
    assert public.loss == pytest.approx(0.04)
    held_out = study.transfer("tiny", "held_out", "eval")
    assert (held_out.own, held_out.other, held_out.lowest, held_out.rank) == (5.0, 5.5, 5.0, 3)


def test_mean_curve_averages_seeds_at_each_checkpoint(study: Study) -> None:
    [_, second] = study.select("tiny")[:2]
    assert mean_curve([second, second]) == [(20, 6.0, 6.0, 6.0), (40, 5.2, 5.2, 5.2)]
