"""The README's commands on the model in the repository, from training to the report. Takes minutes, uses no network."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import REPOSITORY

from hw3.cli import main
from hw3.runs.checkpoints import find_complete_checkpoints

PYTHON_BIN = Path(sys.executable).parent


def make(*words: str) -> str:
    """Run a make target with the Python of the tests, and return its standard output."""
    process = subprocess.run(
        ["make", "VENV=", *words],
        cwd=REPOSITORY,
        env=os.environ | {"PATH": f"{PYTHON_BIN}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the default recipe, trained and scored."""
    folder = tmp_path_factory.mktemp("outputs") / "tiny-qlora"
    make("train", f"RUN={folder}")
    make("eval", f"RUN={folder}")
    make("shots", f"RUN={folder}")
    return folder


@pytest.fixture(scope="module")
def results(run: Path) -> dict[str, Any]:
    return json.loads((run / "eval/eval/results.json").read_text(encoding="utf-8"))


def test_train_writes_at_least_ten_complete_checkpoints(run: Path) -> None:
    steps = [checkpoint.step for checkpoint in find_complete_checkpoints(run)]
    assert len(steps) >= 10 and steps == sorted(steps)


def test_fine_tuning_halves_the_score_and_later_checkpoints_are_worse(results: dict[str, Any]) -> None:
    finetuned = {entry["step"]: entry["mean_perplexity"] for entry in results["entries"] if entry["checkpoint"]}
    base = next(e["mean_perplexity"] for e in results["entries"] if not e["checkpoint"] and e["shots"] == 0)
    best = results["best"]
    assert best["mean_perplexity"] == min(finetuned.values()) <= base / 2
    assert best["step"] <= 0.75 * max(finetuned) and finetuned[max(finetuned)] > 1.01 * best["mean_perplexity"]


def test_few_shot_examples_improve_the_base_model(results: dict[str, Any]) -> None:
    base = {e["shots"]: e["mean_perplexity"] for e in results["entries"] if not e["checkpoint"]}
    assert set(base) == {0, 1, 2, 4}
    assert max(base[1], base[2], base[4]) < base[0]


def test_predictions_are_better_than_copies_and_can_be_compared(run: Path, results: dict[str, Any]) -> None:
    make("predict", f"RUN={run}")
    name = results["best"]["checkpoint"]
    record = json.loads((run / f"predictions/eval/{name}.quality.json").read_text(encoding="utf-8"))
    assert record["rows_per_second"] > 1 and record["groups"]["all"]["unfinished"] < 0.05
    for direction in ("m2c", "c2m"):
        assert record["groups"][direction]["bleu"] > 2 * record["copy_input"][direction]["bleu"]
    assert f"{name} " in make("compare", f"RUNS={run}")


def test_every_output_token_is_known(results: dict[str, Any]) -> None:
    assert {entry["unknown_tokens"] for entry in results["entries"]} == {0}


def test_make_targets_in_the_readme_exist() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z0-9-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"^make ([a-z0-9-]+)", readme, re.MULTILINE))
    assert {"train", "eval", "shots", "test"} <= named <= targets


def test_make_help_lists_every_target() -> None:
    stdout = make("help")
    targets = "train eval shots predict compare report pack export check data lint test test-slow"
    for target in targets.split():
        assert f"make {target} " in stdout


def test_pack_verifies_score_and_predictions(run: Path) -> None:
    stdout = make("pack", f"RUN={run}", "GRADER_YEAR=2024")
    folder = run.with_name("tiny-qlora-pack")
    assert "predictions: 8 of 8 equal to those of hw3 predict" in stdout
    assert "by the grader's call on data/eval.json" in stdout
    assert (folder / "adapter_checkpoint/adapter_model.safetensors").is_file()
    assert not (folder / "prediction.json").exists()


def test_export_does_not_change_the_best_score(
    run: Path, results: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run)]) == 0
    merged_perplexity = float(re.search(r"([\d.]+) after merging", capsys.readouterr().out)[1])
    assert merged_perplexity == pytest.approx(results["best"]["mean_perplexity"], rel=1e-4)
    assert (run.with_name("tiny-qlora-export") / "model.safetensors").is_file()


def test_report_shows_the_best_score(run: Path, results: dict[str, Any]) -> None:
    make("report", f"RUN={run}")
    best = results["best"]
    for name in ("report.html", "report.md"):
        text = (run / name).read_text(encoding="utf-8")
        assert f"{best['mean_perplexity']:.2f} [" in text and f"fine-tuned, step {best['step']}" in text
