"""A run folder opens its own files, and gives each data file its own folder of results."""

import json
from pathlib import Path

import pytest
from helpers import SCORING_SETTINGS, make_score_entry

from hw3.common.errors import UserError
from hw3.data.fingerprint import DatasetFingerprint
from hw3.runs.checkpoints import mark_complete
from hw3.runs.manifest import Manifest
from hw3.runs.prediction_record import PredictionRecord
from hw3.runs.results_file import PromptReference, ResultsFile
from hw3.runs.run import Run

SHA256 = "0123456789abcdef"
OTHER_SHA256 = "fedcba9876543210"


def write_results(folder: Path, data: DatasetFingerprint) -> None:
    """Write results of the base model on a data file."""
    results_file = ResultsFile(
        run="run", started=None, data=data, settings=SCORING_SETTINGS, entries=[make_score_entry(0)], best=None
    )
    results_file.write(folder / "results.json")


def write_prediction_record(path: Path, data: DatasetFingerprint) -> None:
    """Write a record of predictions of the base model on a data file."""
    PredictionRecord(
        key="key",
        run="run",
        data=data,
        name="base",
        checkpoint=None,
        adapter_sha256=None,
        shots=0,
        prompt=PromptReference(name="own", sha256="own"),
        generation={},
        seconds=1.0,
        rows_per_second=2.0,
        unfinished_ids=[],
        predictions_sha256="predictions hash",
        groups={},
        copy_input={},
    ).write(path)


def test_run_formats_as_its_path(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"{run}" == str(run.path)
    assert run.name == "run"  # outside the working directory
    monkeypatch.chdir(run.path.parent.parent)
    assert run.name == f"{run.path.parent.name}/run"


@pytest.mark.parametrize(
    ("path", "beside"),
    [("outputs/a", "outputs/a-pack"), (".", "{parent}/{name}-pack"), ("/", "/-pack")],
)
def test_folder_beside_has_the_runs_name(path: str, beside: str) -> None:
    folder = Path.cwd()
    assert str(Run(Path(path)).folder_beside("-pack")) == beside.format(parent=folder.parent, name=folder.name)


def test_load_recipe_reports_how_to_make_a_missing_run(run: Run) -> None:
    with pytest.raises(UserError, match="no such run; train it first"):
        run.load_recipe()


def test_read_manifest_is_none_before_training(run: Run, manifest: Manifest) -> None:
    assert run.read_manifest() is None
    manifest.write(run.manifest_path)
    assert run.read_manifest() == manifest


def test_training_losses_are_those_of_the_last_complete_checkpoint(run: Run) -> None:
    assert run.training_losses() == []
    for step in (4, 8):
        folder = run.path / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        log_history = [{"step": 3, "loss": 2.5}, {"step": step, "loss": 1.5}, {"step": step, "train_runtime": 1.0}]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": log_history}), encoding="utf-8")
        mark_complete(folder, step)
    assert run.training_losses() == [(3, 2.5), (8, 1.5)]


def test_eval_dir_appends_the_hash_for_another_file_of_the_same_name(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    data = DatasetFingerprint(path="eval.json", sha256=SHA256, rows=2)
    assert run.eval_dir(path, data) == run.path / "eval/eval"
    write_results(run.path / "eval/eval", data)
    assert run.eval_dir(path, data) == run.path / "eval/eval"
    # Outside the working directory only the name is stored, so another content is another file.
    other = data.model_copy(update={"sha256": OTHER_SHA256})
    assert run.eval_dir(path, other) == run.path / "eval/eval-fedcba98"


def test_eval_dir_stays_for_an_edited_file_inside_the_working_directory(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = DatasetFingerprint(path="eval.json", sha256=SHA256, rows=2)
    write_results(run.path / "eval/eval", data)
    edited = data.model_copy(update={"sha256": OTHER_SHA256})
    assert run.eval_dir(Path("eval.json"), edited) == run.path / "eval/eval"
    moved = edited.model_copy(update={"path": "other/eval.json"})
    assert run.eval_dir(Path("other/eval.json"), moved) == run.path / "eval/eval-fedcba98"


def test_predictions_dir_appends_the_hash_for_another_file_of_the_same_name(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    data = DatasetFingerprint(path="eval.json", sha256=SHA256, rows=2)
    write_prediction_record(run.path / "predictions/eval/base.quality.json", data)
    assert run.predictions_dir(path, data) == run.path / "predictions/eval"
    other = data.model_copy(update={"sha256": OTHER_SHA256})
    assert run.predictions_dir(path, other) == run.path / "predictions/eval-fedcba98"


def test_read_results_on_finds_the_data_file_by_content(run: Run, tmp_path: Path) -> None:
    data_file = tmp_path / "rows.json"
    data_file.write_text("[]", encoding="utf-8")
    sha256 = "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"  # of `[]`
    assert run.read_results_on(data_file) is None
    write_results(run.path / "eval/a", DatasetFingerprint(path="rows.json", sha256=OTHER_SHA256, rows=0))
    write_results(run.path / "eval/b", DatasetFingerprint(path="renamed.json", sha256=sha256, rows=0))
    folder, results_file = run.read_results_on(data_file)
    assert folder == run.path / "eval/b" and results_file.data.path == "renamed.json"
    assert list(run.read_results()) == [run.path / "eval/a", run.path / "eval/b"]


def test_read_prediction_records_leaves_out_records_without_predictions(run: Run) -> None:
    data = DatasetFingerprint(path="eval.json", sha256=SHA256, rows=2)
    for name in ("base", "checkpoint-4"):
        write_prediction_record(run.path / f"predictions/eval/{name}.quality.json", data)
    predictions = run.path / "predictions/eval/checkpoint-4.json"
    predictions.write_text("[]", encoding="utf-8")
    ((path, record),) = run.read_prediction_records()
    assert path == predictions and record.data == data
