"""A checkpoint is selected by name, as the last one, or as the best of those with scores."""

import shutil
from pathlib import Path

import pytest

from hw3.common.errors import UserError
from hw3.evaluation.selection import select_checkpoint, select_scored_checkpoint
from hw3.runs.results_file import ResultsFile
from hw3.runs.run import Run


@pytest.fixture
def run(scored_run: Path, tmp_path: Path) -> Run:
    """A copy of the scored run with checkpoints 4, 8 and 12."""
    return Run(shutil.copytree(scored_run, tmp_path / "run"))


def test_select_checkpoint_finds_names_and_paths(run: Run) -> None:
    recipe = run.load_recipe()
    assert select_checkpoint(run, recipe, "base") == (None, "base, without an adapter")
    last, why = select_checkpoint(run, recipe, "last")
    assert last.step == 12 and why == "checkpoint-12, the last of 3"
    for name in ("checkpoint-8", str(run.path / "checkpoint-8")):
        checkpoint, why = select_checkpoint(run, recipe, name)
        assert (checkpoint.step, why) == (8, "checkpoint-8")
    with pytest.raises(UserError, match="no complete checkpoint checkpoint-5; there are checkpoint-4, checkpoint-8, "):
        select_checkpoint(run, recipe, "checkpoint-5")


def test_select_checkpoint_takes_an_external_adapter_by_path(run: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(run.path / "checkpoint-8", tmp_path / "adapter")
    checkpoint, why = select_checkpoint(run, run.load_recipe(), str(folder))
    assert (checkpoint.path, checkpoint.step, why) == (folder, 0, "adapter")


def test_select_checkpoint_best_has_the_lowest_score(run: Run) -> None:
    best = ResultsFile.read(run.path / "eval/eval/results.json").best
    checkpoint, why = select_checkpoint(run, run.load_recipe(), "best")
    assert checkpoint.name == best.checkpoint
    assert (
        why == f"{best.checkpoint}, the best of those scored: mean perplexity {best.mean_perplexity:.3f} on eval.json"
    )


def test_select_checkpoint_best_is_the_last_without_valid_scores(run: Run) -> None:
    best = ResultsFile.read(run.path / "eval/eval/results.json").best
    shutil.rmtree(run.path / best.checkpoint)
    checkpoint, why = select_checkpoint(run, run.load_recipe(), "best")
    assert checkpoint.step == max(checkpoint.step for checkpoint in run.complete_checkpoints())
    assert "the last: none is scored yet (hw3 eval run finds the best)" in why


def test_select_checkpoint_reports_a_run_without_checkpoints(run: Run) -> None:
    for checkpoint in run.complete_checkpoints():
        shutil.rmtree(checkpoint.path)
    with pytest.raises(UserError, match="no complete checkpoint yet; continue training"):
        select_checkpoint(run, run.load_recipe(), "best")


def test_select_scored_checkpoint_returns_the_scores_of_checkpoint_and_base(run: Run) -> None:
    scored = select_scored_checkpoint(run, "8")
    assert scored.checkpoint.name == scored.entry.checkpoint == "checkpoint-8"
    assert scored.entry.adapter_sha256 == scored.checkpoint.sha256 and scored.base.is_base
    best = ResultsFile.read(run.path / "eval/eval/results.json").best
    assert select_scored_checkpoint(run).checkpoint.name == best.checkpoint


def test_select_scored_checkpoint_needs_scores_of_the_current_weights(run: Run) -> None:
    file = run.path / "eval/eval/results.json"
    results_file = ResultsFile.read(file)
    entries = [entry.model_copy(update={"adapter_sha256": "other"}) for entry in results_file.entries]
    results_file.model_copy(update={"entries": entries}).write(file)
    with pytest.raises(
        UserError, match=r"checkpoint-8 has no score on .* with its current weights; score the run first"
    ):
        select_scored_checkpoint(run, "8")


def test_select_checkpoint_best_takes_the_scores_on_the_dev_rows_first(run: Run) -> None:
    """Scores on the dev rows may be newer than those on data.eval, because training computes them."""
    results = ResultsFile.read(run.path / "eval/eval/results.json")
    assert results.best is not None
    other = next(e for e in results.entries if e.is_run_checkpoint and e.checkpoint != results.best.checkpoint)
    best = results.best.model_copy(
        update={"checkpoint": other.checkpoint, "chosen_on": "dev.json", "chosen_by": "token_perplexity"}
    )
    data = results.data.model_copy(update={"path": "dev.json"})
    (run.path / "eval/dev").mkdir()
    results.model_copy(update={"best": best, "data": data}).write(run.path / "eval/dev/results.json")
    checkpoint, why = select_checkpoint(run, run.load_recipe(["data.dev=dev.json"]), "best")
    assert checkpoint is not None and checkpoint.name == other.checkpoint
    assert why.endswith(" on dev.json, chosen by token perplexity")
    checkpoint, _ = select_checkpoint(run, run.load_recipe(), "best")
    assert checkpoint is not None and checkpoint.name == results.best.checkpoint
