"""`evaluation.during_training`: the run is that without it, and its scores are those of `hw3 eval`."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ENVIRONMENT, hw3
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trl import SFTConfig

from hw3.config.recipe import load_recipe
from hw3.evaluation.during_training import build_checkpoint_scorer
from hw3.modeling.adapter_slot import AdapterSlot
from hw3.runs.checkpoints import Checkpoint, find_complete_checkpoints
from hw3.runs.manifest import EarlyStop
from hw3.runs.run import Run
from hw3.training.checkpoint_scoring import CheckpointScore, SaveSchedule, count_without_improvement
from hw3.training.train import train
from hw3.training.trainer import CompletionTrainer

LIVE = "evaluation.during_training=true"
STEPS = [4, 8, 12]


def read_weights(run: Path) -> dict[int, bytes]:
    return {
        checkpoint.step: b"".join(file.read_bytes() for file in sorted(checkpoint.path.glob("*.safetensors")))
        for checkpoint in find_complete_checkpoints(run)
    }


def read_entries(run: Path, name: str = "eval") -> list[dict[str, Any]]:
    """Return the entries of `results.json` without the time that they took."""
    entries = json.loads((run / f"eval/{name}/results.json").read_text())["entries"]
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in entries]


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["quantization=null", "lora.use_dora=true"],
        ["lora=null", "quantization=null", "training.learning_rate=0.001"],
        ["lora.modules_to_save=[embed_tokens]"],
        pytest.param(["lora.target_modules=[q_proj, embed_tokens]"], marks=pytest.mark.slow),
    ],
    ids=["nf4 with dropout", "dora", "full fine-tuning", "trained embeddings", "adapted embeddings"],
)
def test_scored_run_has_the_weights_of_a_run_without_scores_and_the_scores_of_eval(
    mini_recipe: Path, tmp_path: Path, settings: list[str]
) -> None:
    live, plain = tmp_path / "live", tmp_path / "plain"
    hw3("train", mini_recipe, "--run", plain, *settings)
    hw3("train", mini_recipe, "--run", live, *settings, LIVE)
    assert read_weights(live) == read_weights(plain) and list(read_weights(live)) == STEPS
    results = live / "eval/eval/results.json"
    before = results.read_bytes()
    hw3("eval", live)
    assert results.read_bytes() == before  # nothing is scored again
    hw3("eval", plain)
    assert read_entries(live) == read_entries(plain)
    assert [entry["step"] for entry in read_entries(live)] == [0, *STEPS]


def test_score_is_shown_and_logged_to_tensorboard(mini_recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    _, err = hw3("train", mini_recipe, "--run", run, LIVE, "training.report_to=tensorboard")
    assert "the base model and 3 checkpoints, on 10 rows of eval.json" in err
    scores = {entry["step"]: entry["mean_perplexity"] for entry in read_entries(run)}
    assert f"mean perplexity {scores[4]:.3f} at step 4" in err
    (folder,) = {file.parent for file in tmp_path.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars("eval/mean_perplexity")}
    assert logged == pytest.approx(scores)
    assert [event.step for event in events.Scalars("eval/token_perplexity")] == [0, *STEPS]
    # The scores are no part of the training metrics.
    assert [event.step for event in events.Scalars("train/loss")] == [3, 6, 9, 12]


def test_checkpoint_that_was_completed_but_not_scored_is_scored_before_training_goes_on(
    mini_recipe: Path, tmp_path: Path
) -> None:
    killed, uninterrupted = tmp_path / "killed", tmp_path / "uninterrupted"
    script = (
        "import os, signal, sys\n"
        "from hw3.training.checkpoint_scoring import CheckpointScoringCallback as Callback\n"
        "score = Callback._score\n"
        "def kill(self, checkpoint):\n"
        "    if checkpoint is not None and checkpoint.step == 8:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return score(self, checkpoint)\n"
        "Callback._score = kill\n"
        "from hw3.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    settings = [LIVE, "evaluation.patience=1", "training.learning_rate=1e-12"]  # no checkpoint is better than the first
    command = [sys.executable, "-c", script, "train", str(mini_recipe), "--run", str(killed), *settings]
    assert subprocess.run(command, env=ENVIRONMENT, capture_output=True).returncode == -signal.SIGKILL
    assert [entry["step"] for entry in read_entries(killed)] == [0, 4]
    assert [checkpoint.step for checkpoint in find_complete_checkpoints(killed)] == [4, 8]
    out, _ = hw3("train", mini_recipe, "--run", killed, *settings)
    expected, _ = hw3("train", mini_recipe, "--run", uninterrupted, *settings)
    assert "done at step 8 of 12: mean_perplexity has not improved for 1 checkpoint" in out
    assert out.partition(": ")[2].partition(". Next")[0] == expected.partition(": ")[2].partition(". Next")[0]
    assert read_entries(killed) == read_entries(uninterrupted)
    assert read_weights(killed) == read_weights(uninterrupted)


def test_checkpoint_of_a_signal_is_scored_by_the_resumed_session_and_does_not_count_for_patience(
    mini_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, uninterrupted = tmp_path / "run", tmp_path / "uninterrupted"
    settings = [LIVE, "evaluation.patience=2", "training.learning_rate=1e-12"]
    hw3("train", mini_recipe, "--run", uninterrupted, *settings)
    training_step = CompletionTrainer.training_step

    def stop_at_step_6(trainer: CompletionTrainer, *args: Any) -> torch.Tensor:
        if trainer.state.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return training_step(trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(CompletionTrainer, "training_step", stop_at_step_6)
        hw3("train", mini_recipe, "--run", run, *settings, expected=128 + signal.SIGTERM)
    assert [entry["step"] for entry in read_entries(run)] == [0, 4]
    hw3("train", mini_recipe, "--run", run, *settings)
    assert [entry["step"] for entry in read_entries(run)] == [0, 4, 6, 8, 12]
    assert read_weights(run)[12] == read_weights(uninterrupted)[12]


def test_patience_ends_a_run_and_a_larger_one_continues_it(mini_recipe: Path, tmp_path: Path) -> None:
    run, uninterrupted = tmp_path / "run", tmp_path / "uninterrupted"
    # With this learning rate the scores differ by rounding only.
    settings = [LIVE, "training.learning_rate=1e-12", "training.save_steps=2"]
    hw3("train", mini_recipe, "--run", uninterrupted, *settings)
    scores = {entry["step"]: entry["mean_perplexity"] for entry in read_entries(uninterrupted) if entry["step"]}
    stops = {patience: find_stop(scores, patience) for patience in (1, 2)}
    assert stops[1] is not None and stops[2] is not None and stops[1] < stops[2] < 12, scores

    out, _ = hw3("train", mini_recipe, "--run", run, *settings, "evaluation.patience=1")
    reason = f"done at step {stops[1]} of 12: mean_perplexity has not improved for 1 checkpoint"
    assert reason in out
    manifest = Run(run).read_manifest()
    expected = EarlyStop(step=stops[1], reason="patience", patience=1, best_by="mean_perplexity")
    assert manifest is not None and manifest.stopped_early == expected
    again, err = hw3("train", mini_recipe, "--run", run, *settings, "evaluation.patience=1")
    assert reason in again and "resuming" not in err
    assert find_complete_checkpoints(run)[-1].step == stops[1]

    out, _ = hw3("train", mini_recipe, "--run", run, *settings, "evaluation.patience=2")
    assert f"done at step {stops[2]} of 12" in out
    hw3("train", mini_recipe, "--run", run, *settings, "evaluation.patience=100")
    assert read_weights(run) == read_weights(uninterrupted)
    assert read_entries(run) == read_entries(uninterrupted)
    manifest = Run(run).read_manifest()
    assert manifest is not None and manifest.stopped_early is None
    sessions = [(session.from_step, session.to_step) for session in manifest.sessions]
    assert sessions == [(0, stops[1]), (stops[1], stops[2]), (stops[2], 12)]


def test_patience_ends_a_run_that_saves_at_the_end_of_each_epoch(mini_recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    epochs = ["training.save_strategy=epoch", "training.max_steps=-1", "training.num_train_epochs=20"]
    out, _ = hw3(
        "train", mini_recipe, "--run", run, LIVE, *epochs, "evaluation.patience=1", "training.learning_rate=1e-12"
    )
    scores = {entry["step"]: entry["mean_perplexity"] for entry in read_entries(run) if entry["step"]}
    last = find_stop(scores, 1)
    assert last is not None and last < 100
    assert list(scores) == list(range(5, last + 1, 5))
    assert f"done at step {last} of 100: mean_perplexity has not improved for 1 checkpoint" in out


def find_stop(scores: dict[int, float], patience: int) -> int | None:
    """Return the step at which a run with these scores stops, by the definition."""
    best, waited = float("inf"), 0
    for step, score in scores.items():
        best, waited = (score, 0) if score < best else (best, waited + 1)
        if waited == patience:
            return step
    return None


def test_count_without_improvement_counts_from_the_earliest_of_equals() -> None:
    assert count_without_improvement({4: 3.0}) == 0
    assert count_without_improvement({4: 3.0, 8: 2.0, 12: 2.0, 16: 2.5}) == 2
    assert count_without_improvement({16: 1.0, 8: 2.0, 4: 3.0}) == 0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"save_strategy": "steps", "save_steps": 4}, [4, 8, 10]),
        ({"save_strategy": "steps", "save_steps": 0.25}, [3, 6, 9, 10]),
        ({"save_strategy": "epoch"}, [5, 10]),
        ({"save_strategy": "steps", "save_steps": 500}, [10]),
    ],
)
def test_save_schedule_has_the_steps_at_which_the_trainer_saves(
    tmp_path: Path, settings: dict[str, Any], expected: list[int]
) -> None:
    config = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **settings)
    schedule = SaveSchedule(config, 10, 5)
    assert [step for step in range(1, 11) if step in schedule] == expected


def test_out_of_memory_in_scoring_is_not_taken_for_that_of_a_step(
    mini_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out_of_memory(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("hw3.evaluation.during_training.score_tasks", run_out_of_memory)
    _, err = hw3("train", mini_recipe, "--run", tmp_path / "run", LIVE, expected=1)
    assert "the base model: out of memory in scoring: CUDA out of memory" in err
    assert "evaluation.during_training=false" in err and "continuing with" not in err


def test_dev_rows_are_a_seeded_part_that_is_not_trained_on(mini_recipe: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    settings = [LIVE, "data.dev_fraction=0.2"]
    _, err = hw3("train", mini_recipe, "--run", run, *settings, "training.max_steps=4")
    assert f"35 rows of {tmp_path}/train.json" in err
    rows = json.loads((tmp_path / "train.json").read_text())
    dev_rows = json.loads((run / "dev.json").read_text())
    assert len(dev_rows) == 9 and all(row in rows for row in dev_rows)
    manifest = Run(run).read_manifest()
    assert manifest is not None
    assert (manifest.data["train"].rows, manifest.data["dev"].rows) == (35, 9)
    results = json.loads((run / "eval/dev/results.json").read_text())
    assert results["data"] == manifest.data["dev"].model_dump() and results["best"]["chosen_on"] == "dev.json"
    hw3("train", mini_recipe, "--run", other, *settings, "training.max_steps=4", "training.seed=8")
    assert (other / "dev.json").read_bytes() != (run / "dev.json").read_bytes()

    _, err = hw3("train", mini_recipe, "--run", run, "data.dev_fraction=0.3", expected=2)
    assert "data.dev_fraction: 0.2 in the folder, 0.3 now" in err
    out, _ = hw3("check", mini_recipe, "--run", run, *settings)
    assert "train.json (dev) row" in out and "would resume at step 4" in out
    # Scores on the dev rows are not computed again; those on data.eval are new, chosen on the dev rows.
    (run / "dev.json").unlink()
    _, err = hw3("eval", run)
    assert "2 of 4 entries to score" in err
    assert json.loads((run / "eval/eval/results.json").read_text())["best"]["chosen_on"] == "dev.json"


def test_save_total_limit_keeps_the_best_checkpoint(mini_recipe: Path, tmp_path: Path) -> None:
    """With this learning rate, the score of the first checkpoint is the lowest but for rounding."""
    run = tmp_path / "run"
    settings = ["training.learning_rate=1e-12", "training.save_steps=2", "training.save_total_limit=2"]
    hw3("train", mini_recipe, "--run", run, LIVE, *settings)
    scores = {entry["step"]: entry["mean_perplexity"] for entry in read_entries(run) if entry["step"]}
    assert list(scores) == [2, 4, 6, 8, 10, 12]
    best = min(scores, key=lambda step: scores[step])
    assert best < 10
    assert [checkpoint.step for checkpoint in find_complete_checkpoints(run)] == [best, 10, 12]


def test_checkpoints_are_scored_on_the_dev_file(mini_recipe: Path, tmp_path: Path) -> None:
    rows = json.loads((tmp_path / "eval.json").read_text())
    (tmp_path / "mydev.json").write_text(json.dumps(rows[:4]))
    run = tmp_path / "run"
    hw3("train", mini_recipe, "--run", run, LIVE, f"data.dev={tmp_path}/mydev.json")
    assert [entry["rows"] for entry in read_entries(run, "mydev")] == [4] * 4
    assert not (run / "eval/eval").exists()


def test_scorer_may_end_the_run(mini_recipe: Path, tmp_path: Path) -> None:
    run, score = Run(tmp_path / "run"), build_checkpoint_scorer(Run(tmp_path / "run"))

    def prune(slot: AdapterSlot, checkpoint: Checkpoint | None) -> CheckpointScore | None:
        result = score(slot, checkpoint)
        if result is None or result.step < 8:
            return result
        return dataclasses.replace(result, stop="pruned")

    recipe = load_recipe(mini_recipe)
    assert train(recipe, run.path, score_checkpoint=prune) == 0
    manifest = run.read_manifest()
    assert manifest is not None and manifest.stopped_early is not None
    assert (manifest.stopped_early.step, manifest.stopped_early.reason) == (8, "pruned")
    assert train(recipe, run.path) == 0
    assert [checkpoint.step for checkpoint in run.complete_checkpoints()] == [4, 8]
