"""Samplers and pruners without state: a search that is continued by another process takes the same decisions."""

from pathlib import Path

import optuna
import pytest
from optuna.pruners import HyperbandPruner, NopPruner, SuccessiveHalvingPruner
from optuna.trial import Trial, TrialState

from hw3.search.sampling import TrialSeededSampler, build_pruner, should_prune
from hw3.search.space import load_space

SPACE = """
sampler: {sampler}
seed: {seed}
space:
  training.learning_rate:
    {learning_rate}
  lora.r:
    categorical: [2, 4, 8]
"""


def load(folder: Path, sampler: str, seed: int = 0):
    values = "categorical: [0.1, 0.2]" if sampler == "grid" else "float: {low: 1e-4, high: 1, log: true}"
    path = folder / "space.yaml"
    path.write_text(SPACE.format(sampler=sampler, seed=seed, learning_rate=values))
    return load_space(path)


def run(space, count: int, *, restart_every: int = 1000, killed_after_one_key: bool = False) -> list[dict]:
    """Tell a score for each trial; return the settings. A restart makes a new study object on the same storage."""
    storage = optuna.storages.InMemoryStorage()
    for number in range(count):
        if number % restart_every == 0:
            study = optuna.create_study(
                storage=storage, study_name="s", load_if_exists=True, sampler=TrialSeededSampler(space)
            )
        trial = study.ask()
        if killed_after_one_key:
            trial._suggest("training.learning_rate", space.distributions["training.learning_rate"])
            study = optuna.create_study(
                storage=storage, study_name="s", load_if_exists=True, sampler=TrialSeededSampler(space)
            )
            trial = Trial(study, trial._trial_id)
        for key, distribution in space.distributions.items():
            trial._suggest(key, distribution)
        study.tell(trial, trial.params["lora.r"] + trial.params["training.learning_rate"])
    return [trial.params for trial in study.get_trials()]


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_settings_do_not_depend_on_restarts(tmp_path: Path, sampler: str) -> None:
    space = load(tmp_path, sampler)
    count = 6 if sampler == "grid" else 16  # TPE draws at random until it knows 10 trials
    straight = run(space, count)
    assert run(space, count, restart_every=1) == straight
    assert run(space, count, killed_after_one_key=True) == straight
    assert run(load(tmp_path, sampler, seed=1), count) != straight


def test_grid_visits_each_point_once(tmp_path: Path) -> None:
    settings = run(load(tmp_path, "grid"), 6)
    assert len({tuple(values.values()) for values in settings}) == 6


def test_tpe_prefers_what_scored_well(tmp_path: Path) -> None:
    settings = run(load(tmp_path, "tpe"), 40)
    assert sum(values["lora.r"] == 2 for values in settings[20:]) > 9


def test_pruner_is_built_with_the_spaces_settings(tmp_path: Path) -> None:
    text = "pruner: {}\nreduction_factor: 2\nspace:\n  lora.r:\n    categorical: [2, 4]\n"
    kinds = []
    for name in ("none", "successive_halving", "hyperband"):
        (tmp_path / "space.yaml").write_text(text.format(name))
        kinds.append(type(build_pruner(load_space(tmp_path / "space.yaml"), first_score=5, max_steps=60)))
    assert kinds == [NopPruner, SuccessiveHalvingPruner, HyperbandPruner]


@pytest.mark.parametrize(
    "make_pruner",
    [
        lambda: SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
        lambda: HyperbandPruner(min_resource=1, max_resource=8, reduction_factor=2),
    ],
    ids=["successive halving", "hyperband"],
)
def test_decisions_are_those_of_optuna_even_after_a_kill(make_pruner) -> None:
    """`plain` is a study as Optuna runs it. In `resumed`, each decision is taken twice, as after a kill between."""
    plain = optuna.create_study(study_name="s", pruner=make_pruner())
    resumed = optuna.create_study(study_name="s")
    outcomes: dict[str, list[int]] = {"plain": [], "resumed": []}
    for number in range(12):
        pair = {"plain": plain.ask(), "resumed": resumed.ask()}
        for name, trial in pair.items():
            for step in range(1, 9):
                trial.report((number * 7) % 12 + 1 / step, step)
                if name == "plain":
                    stops = trial.should_prune()
                else:
                    stops = should_prune(resumed, number, make_pruner, last_step=step)
                    assert should_prune(resumed, number, make_pruner, last_step=step) == stops
                if stops:
                    break
            outcomes[name].append(step)
            (plain if name == "plain" else resumed).tell(trial, state=TrialState.PRUNED)
    assert outcomes["resumed"] == outcomes["plain"]
    assert min(outcomes["plain"]) < 8 == max(outcomes["plain"])


def test_later_scores_of_the_trial_do_not_count() -> None:
    study = optuna.create_study(study_name="s")
    for scores in ((1.0, 1.0), (2.0, 0.5)):
        trial = study.ask()
        for step, score in enumerate(scores, 1):
            trial.report(score, step)

    def make_pruner() -> SuccessiveHalvingPruner:
        return SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)

    assert should_prune(study, 1, make_pruner, last_step=1)
    assert not should_prune(study, 0, make_pruner, last_step=1)


def test_pruner_compares_the_best_scores_so_far() -> None:
    """The second trial has the best checkpoint of all at step 2; its score at step 3 is the worst of all."""
    study = optuna.create_study(study_name="s")
    for scores in ((5.0, 4.8, 4.7), (4.9, 4.5, 5.5), (5.0, 4.7, 4.8)):
        trial = study.ask()
        for step, score in enumerate(scores, 1):
            trial.report(score, step)

    def make_pruner() -> SuccessiveHalvingPruner:
        return SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)

    stops = [should_prune(study, number, make_pruner, last_step=3) for number in range(3)]
    assert stops == [True, False, True]
