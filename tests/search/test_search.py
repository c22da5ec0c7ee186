"""`hw3 search` on a small model: trials are ordinary runs, killed searches resume, processes share the trials."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import ENVIRONMENT, REPOSITORY, hw3, write_recipe
from sample_search import comparable, read_record, write_space

from hw3.config.recipe import load_recipe
from hw3.runs.checkpoints import find_complete_checkpoints
from hw3.training.train import train


def start(*words: object, workers: int = 1) -> subprocess.Popen[str]:
    """Start `hw3 search` as the leader of a process group."""
    command = [sys.executable, "-m", "hw3", "search", *map(str, words), "--workers", str(workers)]
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until a function returns true, while a process runs."""
    while not condition():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, mini_base: Path) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), mini_base)


@pytest.fixture(scope="module")
def space(recipe: Path) -> Path:
    return write_space(recipe.parent)


@pytest.fixture(scope="module")
def searched(recipe: Path, space: Path) -> Path:
    """Return the folder of a finished search."""
    folder = recipe.parent / "search-mini"
    process = start(recipe, space, "--output", folder)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    (folder / "output.txt").write_text(output)
    return folder


def test_search_prints_each_trial_and_writes_record_picture_and_best_recipe(searched: Path, tmp_path: Path) -> None:
    output, record = (searched / "output.txt").read_text(), read_record(searched)
    assert [line.split("  ")[0] for line in output.splitlines() if line.startswith("trial ")][:4] == [
        "trial 1/4", "trial 2/4", "trial 3/4", "trial 4/4",
    ]  # fmt: skip
    assert record.total_trials == len(record.trials) == 4
    outcomes = {trial.outcome for trial in record.trials}
    assert outcomes == {"complete", "pruned"}
    for trial in record.trials:
        assert trial.steps == 4 or trial.outcome == "pruned"
        assert list(trial.scores) == list(range(1, trial.steps + 1))
        low, high = trial.mean_perplexity_ci95
        assert low < trial.score == trial.mean_perplexity == min(trial.scores.values()) < high
    best = record.trials[record.best.number]
    assert best.score == min(trial.score for trial in record.trials if trial.outcome == "complete")
    assert record.best.final.mean_perplexity == best.score  # the mini recipe has no dev file
    assert "so the score is too good; set data.dev or data.dev_fraction" in output
    assert (searched / "search.png").read_bytes().startswith(b"\x89PNG")
    assert load_recipe(searched / "best.yaml").to_dict() == load_recipe(searched / best.run / "recipe.yaml").to_dict()


def test_trial_is_bitwise_the_run_of_hw3_train_with_its_overrides(searched: Path, recipe: Path, tmp_path: Path) -> None:
    for trial in read_record(searched).trials[:2]:
        assert train(load_recipe(recipe, trial.overrides), tmp_path / trial.run) == 0
        mine, other = (
            (find_complete_checkpoints(folder)[trial.steps - 1].path / "adapter_model.safetensors").read_bytes()
            for folder in (searched / trial.run, tmp_path / trial.run)
        )
        assert mine == other


def test_best_recipe_trains_the_winner_again(searched: Path, tmp_path: Path) -> None:
    record = read_record(searched)
    assert train(load_recipe(searched / "best.yaml"), tmp_path / "again") == 0
    adapters = [
        (find_complete_checkpoints(folder)[-1].path / "adapter_model.safetensors").read_bytes()
        for folder in (searched / record.trials[record.best.number].run, tmp_path / "again")
    ]
    assert adapters[0] == adapters[1]


def test_finished_search_only_reports_again(searched: Path, recipe: Path, space: Path) -> None:
    before = comparable(searched)
    best = read_record(searched).best
    assert f"best: trial-{best.number:03}, checkpoint-" in hw3("search", recipe, space, "--output", searched)[0]
    assert comparable(searched) == before


def test_more_trials_continue_a_search_and_another_space_is_refused(
    searched: Path, recipe: Path, space: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(searched, tmp_path / "search-mini")
    changed = tmp_path / "changed.yaml"
    changed.write_text(space.read_text(encoding="utf-8").replace("high: 1e-1", "high: 2e-1"), encoding="utf-8")
    problem = hw3("search", recipe, changed, "--output", folder, expected=2)[1]
    assert "holds another search: space differ. Only `trials` may change" in problem
    problem = hw3("search", recipe, space, "training.seed=9", "--output", folder, expected=2)[1]
    assert "holds another search: recipe.training differ" in problem
    hw3("search", recipe, space, "--output", folder, "--trials", "5")
    record = read_record(folder)
    assert len(record.trials) == 5
    assert record.trials[:4] == read_record(searched).trials


def test_killed_search_ends_as_one_that_was_not_killed(
    searched: Path, recipe: Path, space: Path, tmp_path: Path
) -> None:
    """It is killed in the second trial, after its first checkpoint."""
    folder = tmp_path / "search-mini"
    process = start(recipe, space, "--output", folder)
    wait_for(lambda: (folder / "trial-001/checkpoint-1/COMPLETE.json").exists(), process)
    process.kill()
    process.communicate()
    hw3("search", recipe, space, "--output", folder)
    assert comparable(folder) == comparable(searched)


@pytest.mark.slow
def test_signal_saves_a_checkpoint_and_the_same_command_goes_on(
    searched: Path, recipe: Path, space: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "search-mini"
    process = start(recipe, space, "--output", folder)
    wait_for(lambda: (folder / "trial-000/checkpoint-1/COMPLETE.json").exists(), process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0]
    assert process.returncode == 143, output
    assert "run the same command to resume" in output
    hw3("search", recipe, space, "--output", folder)
    assert comparable(folder) == comparable(searched)


def test_user_mistake_writes_nothing(recipe: Path, tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text("space:\n  lora.rank:\n    categorical: [1, 2]\n")
    problem = hw3("search", recipe, space, "--output", tmp_path / "out", expected=2)[1]
    assert problem.strip() == f"hw3: {space}:2: space: lora.rank: no such key; did you mean r?"
    space.write_text("space:\n  lora.target_modules:\n    categorical: [all-linear, [no_such_layer]]\n")
    assert "no_such_layer" in hw3("search", recipe, space, "--output", tmp_path / "out", expected=2)[1]
    assert not (tmp_path / "out").exists()


def test_diverged_trial_does_not_end_the_search(recipe: Path, tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    text = "sampler: grid\npruner: none\nfixed: {training.max_steps: 2, training.save_steps: 1}\nspace:\n"
    space.write_text(text + "  training.learning_rate:\n    categorical: [0.001, 1e30]\n")
    hw3("search", recipe, space, "--output", tmp_path / "out")
    outcomes = {trial.settings["training.learning_rate"]: trial for trial in read_record(tmp_path / "out").trials}
    assert (outcomes[0.001].outcome, outcomes[1e30].outcome) == ("complete", "failed")
    assert "is nan" in outcomes[1e30].problem or "infinite" in outcomes[1e30].problem


@pytest.mark.slow
def test_two_workers_train_each_trial_once_even_if_one_is_killed(recipe: Path, space: Path, tmp_path: Path) -> None:
    """Both use one journal file; the second one is started by hand, as on another machine."""
    folder, journal = tmp_path / "search-mini", tmp_path / "shared.log"
    words = (recipe, space, "--output", folder, "--storage", journal, "--trials", "8")
    first, second = start(*words), start(*words)
    wait_for(lambda: len(list(folder.glob("trial-*/checkpoint-1/COMPLETE.json"))) >= 2, first)
    second.kill()
    second.communicate()
    output = first.communicate()[0]
    assert first.returncode == 0, output
    record = read_record(folder)
    assert [trial.number for trial in record.trials] == list(range(8))
    assert {trial.outcome for trial in record.trials} <= {"complete", "pruned"}
    assert len(list(folder.glob("trial-*"))) == 8


@pytest.mark.slow
def test_search_killed_at_random_moments_ends_as_one_that_was_not(
    searched: Path, recipe: Path, space: Path, tmp_path: Path
) -> None:
    folder, draw = tmp_path / "search-mini", random.Random(0)
    journal = folder / "journal.log"
    for _ in range(6):
        size = journal.stat().st_size if journal.exists() else 0
        process = start(recipe, space, "--output", folder)
        wait_for(lambda size=size: journal.exists() and journal.stat().st_size > size, process)
        time.sleep(draw.uniform(0, 2))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    hw3("search", recipe, space, "--output", folder)
    assert comparable(folder) == comparable(searched)


@pytest.mark.slow
def test_workers_of_one_command_share_the_trials(recipe: Path, space: Path, tmp_path: Path) -> None:
    folder = tmp_path / "search-mini"
    process = start(recipe, space, "--output", folder, workers=2)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert output.count("trial ") >= 4 and "best: trial" in output
    assert "ended with status" not in output
    assert len(read_record(folder).trials) == 4
    assert (folder / "worker-1.log").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_workers_end_with_the_process_that_started_them(
    recipe: Path, space: Path, tmp_path: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "search-mini"
    process = start(recipe, space, "--output", folder, workers=2)
    wait_for(lambda: any(folder.glob("trial-*/checkpoint-1/COMPLETE.json")), process)
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8")
    children = [int(pid) for pid in listed.split()]
    assert len(children) == 2
    process.send_signal(number)
    process.communicate()
    assert process.returncode == (143 if number == signal.SIGTERM else -9)
    deadline = time.monotonic() + 60
    while any(is_running(pid) for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    output = start(recipe, space, "--output", folder).communicate()[0]
    assert "best: trial" in output


def is_running(pid: int) -> bool:
    """Return whether a process runs; one that has ended may still be in the table of processes."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
