"""`benchmarks/pruning.py` stops recorded runs as `hw3 search` does, and counts the steps that this saves."""

import random
from pathlib import Path

import numpy as np
import optuna
import pytest
from pruning import Curve, Outcome, measure, replay

from hw3.search.sampling import build_pruner, should_prune
from hw3.search.space import SearchSpace, load_space

# Scores at steps 10, 20, 30 and 40. The best checkpoint is that of the third run at step 20.
SCORES = [(5.0, 4.8, 4.7, 4.6), (9.0, 8.0, 7.0, 6.0), (4.9, 4.5, 5.5, 6.0), (5.1, 5.0, 4.9, 4.8)]
CURVES = [
    Curve(dict(zip((10, 20, 30, 40), scores, strict=True)), np.array([min(scores) - 1, min(scores) + 1]), (4.0, 4.65))
    for scores in SCORES
]


@pytest.fixture
def space(tmp_path: Path) -> SearchSpace:
    path = tmp_path / "space.yaml"
    path.write_text("reduction_factor: 3\nspace:\n  lora.r:\n    categorical: [2, 4, 8, 16]\n")
    return load_space(path)


def test_replay_stops_runs_as_a_search_does(space: SearchSpace) -> None:
    pruner = build_pruner(space, 10, 40)
    for order in range(10):
        study, steps_done, complete = optuna.create_study(study_name=f"order-{order}"), 0, []
        for number in random.Random(order).sample(range(4), 4):
            trial = study.ask()
            for step, score in CURVES[number].scores.items():
                trial.report(score, step)
                if step < 40 and should_prune(study, trial.number, lambda: build_pruner(space, 10, 40), step):
                    break
            else:
                complete.append(number)
            steps_done += step
        winner = min(complete, key=lambda number: CURVES[number].best)
        assert replay(CURVES, pruner, order) == Outcome(winner, 1 - steps_done / 160)


def test_replay_keeps_a_run_whose_best_checkpoint_is_early(space: SearchSpace) -> None:
    """In the order of `CURVES`, decisions are at steps 10 and 30; the second run and the fourth stop at step 10."""
    order = next(order for order in range(1000) if random.Random(order).sample(range(4), 4) == [0, 1, 2, 3])
    pruner = build_pruner(space, 10, 40)
    assert replay(CURVES, pruner, order) == Outcome(winner=2, saved=60 / 160)
    assert replay(CURVES, pruner, order, latest=True).winner == 0


def test_measure_counts_searches_that_keep_the_best(space: SearchSpace) -> None:
    row = measure({1: CURVES}, space, orders=20)
    assert row["searches"] == 20
    assert (row["kept_best"], row["not_worse"], row["within_interval"], row["loss"]) == ("100%", "100%", "100%", "0.0%")
    assert measure({1: CURVES}, space, orders=20, latest=True)["kept_best"] != "100%"
