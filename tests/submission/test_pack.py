"""`hw3 pack` writes the files that the course asks for, with the run's predictions, or refuses and writes nothing."""

import json
import shutil
from pathlib import Path

from helpers import copy_run_with_scaled_scores, hw3

from hw3.submission.folder import SUBMISSION_FILES


def test_pack_writes_only_the_files_of_a_submission(submission_dir: Path, scored_run: Path) -> None:
    files = sorted(path.relative_to(submission_dir).as_posix() for path in submission_dir.rglob("*") if path.is_file())
    assert (
        files
        == sorted(SUBMISSION_FILES)
        == [
            "README.md",
            "adapter_checkpoint/adapter_config.json",
            "adapter_checkpoint/adapter_model.safetensors",
            "download.sh",
            "predict.py",
            "prediction.json",
            "run.sh",
            "utils.py",
        ]
    )
    best = json.loads((scored_run / "eval/eval/results.json").read_text(encoding="utf-8"))["best"]
    weights = (scored_run / best["checkpoint"] / "adapter_model.safetensors").read_bytes()
    assert (submission_dir / "adapter_checkpoint/adapter_model.safetensors").read_bytes() == weights
    for file in files:
        if not file.endswith(".safetensors"):
            text = (submission_dir / file).read_text(encoding="utf-8")
            # No local paths, and nothing that needs hw3.
            assert str(scored_run.parent) not in text and "import hw3" not in text and "from hw3" not in text
    readme = (submission_dir / "README.md").read_text(encoding="utf-8")
    assert f"{best['mean_perplexity']:.3f}" in readme and "peft 0.13.0" in readme and "$" not in readme


def test_pack_writes_the_predictions_of_hw3_predict(submission_dir: Path, scored_run: Path, tmp_path: Path) -> None:
    predictions = json.loads((submission_dir / "prediction.json").read_text(encoding="utf-8"))
    hw3("predict", scored_run, submission_dir.parent / "private.json", "--output", tmp_path / "predictions.json")
    assert predictions == json.loads((tmp_path / "predictions.json").read_text(encoding="utf-8"))
    assert [set(prediction) for prediction in predictions] == [{"id", "output"}] * 3
    assert [prediction["id"] for prediction in predictions] == ["row-100", "row-101", "special"]


def test_pack_refuses_wrong_arguments_and_writes_nothing(
    scored_run: Path, submission_dir: Path, tmp_path: Path
) -> None:
    def pack_and_fail(*words: str | Path) -> str:
        return hw3("pack", *words, expected=2)[1]

    out = tmp_path / "out"
    assert "already exists, and existing files are never overwritten" in pack_and_fail(
        scored_run, "--output", submission_dir
    )
    unknown = pack_and_fail(scored_run, "--checkpoint", "5", "--output", out)
    assert "no complete checkpoint 5; there are checkpoint-4" in unknown
    assert "expected an http(s) address" in pack_and_fail(scored_run, "--url", "ftp://x", "--output", out)
    assert "no such file" in pack_and_fail(scored_run, "--input", tmp_path / "none.json", "--output", out)
    assert "no such run" in pack_and_fail(tmp_path / "none", "--output", out)
    unscored = shutil.copytree(scored_run, tmp_path / "unscored")
    shutil.rmtree(unscored / "eval")
    assert "score the run first: make eval" in pack_and_fail(unscored, "--output", out)
    assert list(tmp_path.iterdir()) == [unscored]


def test_pack_refuses_full_fine_tuning(mini_recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    hw3("train", mini_recipe, "--run", run, "quantization=null", "lora=null", "training.max_steps=4")
    hw3("eval", run)
    assert "full fine-tuning has no adapter" in hw3("pack", run, "--output", tmp_path / "out", expected=2)[1]


def test_pack_refuses_another_score_than_that_of_the_run(scored_run: Path, tmp_path: Path) -> None:
    run = copy_run_with_scaled_scores(scored_run, tmp_path / "run", 1.001)
    _, stderr = hw3("pack", run, "--output", tmp_path / "out", expected=1)
    assert "relative difference 1.0e-03, at most 0.0001 in float32" in stderr
    assert stderr.endswith(f"\n{tmp_path / 'out'} was not written\n")
    assert list(tmp_path.iterdir()) == [run]
