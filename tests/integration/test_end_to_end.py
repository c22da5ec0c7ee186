"""The README's commands on the model in the repository: train, score, worked examples. Minutes, no network."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY

from hw3.cli import main
from hw3.runs.checkpoints import complete_checkpoints

BIN = Path(sys.executable).parent


def make(*words: str) -> str:
    """A make target in the environment that runs the tests."""
    done = subprocess.run(
        ["make", "VENV=", *words],
        cwd=REPOSITORY,
        env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs") / "tiny-qlora"
    make("train", f"RUN={folder}")
    make("eval", f"RUN={folder}")
    make("shots", f"RUN={folder}")
    return folder


@pytest.fixture(scope="module")
def results(run: Path) -> dict:
    return json.loads((run / "eval/eval/results.json").read_text(encoding="utf-8"))


def test_training_writes_complete_checkpoints(run: Path) -> None:
    steps = [checkpoint.step for checkpoint in complete_checkpoints(run)]
    assert len(steps) >= 10 and steps == sorted(steps)


def test_the_score_falls_by_half_and_the_curve_turns_up(results: dict) -> None:
    tuned = {entry["step"]: entry["mean_perplexity"] for entry in results["entries"] if entry["checkpoint"]}
    base = next(e["mean_perplexity"] for e in results["entries"] if not e["checkpoint"] and e["shots"] == 0)
    best = results["best"]
    assert best["mean_perplexity"] == min(tuned.values()) <= base / 2
    assert best["step"] <= 0.75 * max(tuned) and tuned[max(tuned)] > 1.01 * best["mean_perplexity"]


def test_worked_examples_help(results: dict) -> None:
    base = {e["shots"]: e["mean_perplexity"] for e in results["entries"] if not e["checkpoint"]}
    assert set(base) == {0, 1, 2, 4}
    assert max(base[1], base[2], base[4]) < base[0]


def test_answers_are_better_than_copies_and_compared(run: Path, results: dict) -> None:
    make("predict", f"RUN={run}")
    name = results["best"]["checkpoint"]
    quality = json.loads((run / f"predictions/eval/{name}.quality.json").read_text(encoding="utf-8"))
    assert quality["rows_per_second"] > 1 and quality["groups"]["all"]["unfinished"] < 0.05
    for way in ("m2c", "c2m"):
        assert quality["groups"][way]["bleu"] > 2 * quality["copy_input"][way]["bleu"]
    assert f"{name} " in make("compare", f"RUNS={run}")


def test_every_character_is_known(results: dict) -> None:
    assert {entry["unknown_tokens"] for entry in results["entries"]} == {0}


def test_make_targets_named_in_the_readme_exist() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"^make ([a-z-]+)", readme, re.MULTILINE))
    assert {"train", "eval", "shots", "test"} <= named <= targets


def test_help_lists_every_target() -> None:
    shown = make("help")
    targets = "train eval shots predict compare report pack export check data lint test test-slow"
    for target in targets.split():
        assert f"make {target} " in shown


def test_the_run_is_packed(run: Path) -> None:
    shown = make("pack", f"RUN={run}", "FOR=2024")
    folder = run.with_name("tiny-qlora-pack")
    assert "answers: 8 of 8 equal to hw3 predict's" in shown and "by the grader's call on data/eval.json" in shown
    assert (folder / "adapter_checkpoint/adapter_model.safetensors").is_file()
    assert not (folder / "prediction.json").exists()


def test_the_run_is_exported(run: Path, results: dict, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run)]) == 0
    after = float(re.search(r"([\d.]+) after", capsys.readouterr().out)[1])
    assert after == pytest.approx(results["best"]["mean_perplexity"], rel=1e-4)
    assert (run.with_name("tiny-qlora-export") / "model.safetensors").is_file()


def test_the_report_holds_the_best_score(run: Path, results: dict) -> None:
    make("report", f"RUN={run}")
    best = results["best"]
    for name in ("report.html", "report.md"):
        text = (run / name).read_text(encoding="utf-8")
        assert f"{best['mean_perplexity']:.2f} [" in text and f"tuned, step {best['step']}" in text
