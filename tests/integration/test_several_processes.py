"""Several real processes on the CPU: their results equal those of one process, and none waits for a dead one."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from helpers import CPU2_LAUNCH_OPTIONS, DETERMINISTIC_SETTINGS, ENVIRONMENT, REPOSITORY, assert_same_run, hw3, launch

from hw3.runs.checkpoints import find_complete_checkpoints

# Run `hw3` with a process 1 that fails in the middle of step 6, in the way that the first argument names.
FAIL_IN_TRAINING = """
import os, signal, sys, time
import torch
from hw3.training.trainer import CompletionTrainer
original_step, failure = CompletionTrainer.training_step, sys.argv.pop(1)
def training_step(self, *arguments, **keywords):
    if self.state.global_step == 5 and os.environ["RANK"] == "1":
        if failure == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if failure == "hangs":
            time.sleep(600)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return original_step(self, *arguments, **keywords)
CompletionTrainer.training_step = training_step
from hw3.cli import main
sys.exit(main(sys.argv[1:]))
"""
# Run `hw3 eval RUN --base-only`, `hw3 eval RUN` and `hw3 predict RUN` in one process, to save the seconds of imports.
EVAL_AND_PREDICT = """
import sys
from hw3.cli import main
run = sys.argv[1]
sys.exit(main(["eval", run, "--base-only"]) or main(["eval", run]) or main(["predict", run]))
"""
# Run `hw3 predict` with a process 1 that is killed before its third prediction. Process 0 has then saved its five
# predictions and waits; otherwise the launcher would end it too early.
FAIL_IN_PREDICTION = """
import glob, os, signal, sys, time
from hw3.data.tokenization import Encoder
original_decode, decoded = Encoder.decode, []
def decode(self, ids):
    decoded.append(ids)
    if len(decoded) == 3 and os.environ["RANK"] == "1":
        (partial,) = glob.glob(sys.argv[2] + "/predictions/eval/.*.partial.jsonl")
        while len(open(partial).readlines()) < 6:
            time.sleep(0.05)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    return original_decode(self, ids)
Encoder.decode = decode
from hw3.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture
def straight(mini_recipe: Path, tmp_path: Path) -> Path:
    hw3("train", mini_recipe, "--run", tmp_path / "straight", *DETERMINISTIC_SETTINGS)
    return tmp_path / "straight"


def test_train_on_two_machines_resumes_a_run_of_one_process(mini_recipe: Path, tmp_path: Path, straight: Path) -> None:
    """Two launchers, as on two nodes, resume a run that one process has started."""
    run = tmp_path / "run"
    hw3("train", mini_recipe, "--run", run, *DETERMINISTIC_SETTINGS, "training.max_steps=4")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", "accelerate_configs/multi_node.yaml", "--num_machines", "2", "--num_processes", "2"]
    command += ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
    job = ["-m", "hw3", "train", str(mini_recipe), "--run", str(run), *DETERMINISTIC_SETTINGS]
    nodes = [
        subprocess.Popen(
            [*command, "--machine_rank", str(number), *job],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT, cwd=REPOSITORY,
        )
        for number in (0, 1)
    ]  # fmt: skip
    shown = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(shown)
    assert f"resuming {run} from step 4 of 12" in shown[0] and "resuming" not in shown[1]
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    assert [session["processes"] for session in manifest["sessions"]] == [1, 2]
    assert_same_run(straight, run)


@pytest.mark.slow
def test_train_with_four_processes_resumes_a_run_of_two(mini_recipe: Path, tmp_path: Path, straight: Path) -> None:
    for processes, steps in ((2, 6), (4, 12)):
        options = [*CPU2_LAUNCH_OPTIONS[:3], str(processes), *CPU2_LAUNCH_OPTIONS[4:]]
        arguments = [
            "train",
            mini_recipe,
            "--run",
            tmp_path / "run",
            *DETERMINISTIC_SETTINGS,
            f"training.max_steps={steps}",
        ]
        done = launch("-m", "hw3", *arguments, "training.save_steps=6", options=options)
        assert done.returncode == 0, done.stdout
        assert f"each of {processes} processes takes {8 // processes} rows x 1" in done.stdout
    assert_same_run(straight, tmp_path / "run")


def test_train_with_one_process_resumes_after_another_was_killed(
    mini_recipe: Path, tmp_path: Path, straight: Path
) -> None:
    run = tmp_path / "run"
    (tmp_path / "fail.py").write_text(FAIL_IN_TRAINING, encoding="utf-8")
    started = time.monotonic()
    done = launch(tmp_path / "fail.py", "killed", "train", mini_recipe, "--run", run, *DETERMINISTIC_SETTINGS)
    assert done.returncode == 1 and time.monotonic() - started < 60
    assert "hw3, process 0 of 2: another process has ended or does not respond" in done.stdout
    assert "hw3, process 1" not in done.stdout
    assert [(checkpoint.step, checkpoint.resumable) for checkpoint in find_complete_checkpoints(run)] == [(4, True)]
    assert f"resuming {run} from step 4 of 12" in hw3("train", mini_recipe, "--run", run, *DETERMINISTIC_SETTINGS)[1]
    assert_same_run(straight, run)


@pytest.mark.slow
def test_two_processes_score_during_training_and_stop_at_the_same_step(mini_recipe: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    settings = [
        *DETERMINISTIC_SETTINGS,
        "evaluation.during_training=true",
        "evaluation.patience=1",
        "training.max_steps=40",
        "training.learning_rate=1e-12",
    ]
    outputs = [hw3("train", mini_recipe, "--run", one, *settings)[0]]
    done = launch("-m", "hw3", "train", mini_recipe, "--run", two, *settings)
    assert done.returncode == 0, done.stdout
    outputs.append(done.stdout)
    for output in outputs:
        assert "of 40: mean_perplexity has not improved for 1 checkpoint" in output
    before = [(run / "eval/eval/results.json").read_bytes() for run in (one, two)]
    scores = [[entry["mean_perplexity"] for entry in json.loads(results)["entries"]] for results in before]
    count = min(map(len, scores))
    assert count >= 3 and scores[0][:count] == pytest.approx(scores[1][:count], rel=1e-5)
    hw3("eval", two)
    assert (two / "eval/eval/results.json").read_bytes() == before[1]


@pytest.mark.slow
def test_out_of_memory_in_one_process_ends_all_processes(mini_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "fail.py").write_text(FAIL_IN_TRAINING, encoding="utf-8")
    started = time.monotonic()
    done = launch(
        tmp_path / "fail.py", "memory", "train", mini_recipe, "--run", tmp_path / "run", *DETERMINISTIC_SETTINGS
    )
    assert done.returncode == 1 and time.monotonic() - started < 60
    assert "hw3, process 1 of 2: out of memory: CUDA out of memory. Tried to allocate 2.00 GiB.\n" in done.stdout
    assert "hw3, process 0 of 2: another process has ended or does not respond" in done.stdout
    assert [checkpoint.step for checkpoint in find_complete_checkpoints(tmp_path / "run")] == [4]


@pytest.mark.slow
def test_process_that_hangs_ends_all_processes_after_the_timeout(mini_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "fail.py").write_text(FAIL_IN_TRAINING, encoding="utf-8")
    done = launch(
        tmp_path / "fail.py", "hangs", "train", mini_recipe, "--run", tmp_path / "run", *DETERMINISTIC_SETTINGS,
        "training.ddp_timeout=20", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="8",
    )  # fmt: skip
    assert done.returncode == 1
    assert "hw3, process 0 of 2: another process has ended or does not respond" in done.stdout
    assert "hw3, process 1 of 2: received a signal to stop, and the step has not ended in 3 s" in done.stdout
    assert [checkpoint.step for checkpoint in find_complete_checkpoints(tmp_path / "run")] == [4]


def test_make_refuses_a_wrong_number_of_processes_before_the_launcher_starts(mini_recipe: Path, tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    arguments = ["train", "GPUS=3", "ACCELERATE=cpu2", f"RUN={tmp_path / 'run'}", f"recipe={mini_recipe}"]
    done = subprocess.run(
        ["make", "VENV=", *arguments], cwd=REPOSITORY, env=ENVIRONMENT | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "run").exists()
    assert done.stderr.startswith(
        "hw3: training: 8 rows per step (per_device_train_batch_size 8 x gradient_accumulation_steps 1) cannot be "
        "divided among 3 processes; use 2 or 4 processes, or 6 or 9 rows per step\n"
    )


@pytest.mark.slow
def test_ctrl_c_at_the_launcher_writes_a_checkpoint(mini_recipe: Path, tmp_path: Path) -> None:
    """The launcher may signal its processes at different steps; all save the same step."""
    run = tmp_path / "run"
    command = [sys.executable, "-u", "-m", "accelerate.commands.launch", *CPU2_LAUNCH_OPTIONS, "-m", "hw3"]
    process = subprocess.Popen(
        [*command, "train", str(mini_recipe), "--run", str(run), *DETERMINISTIC_SETTINGS, "training.max_steps=100000"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY,
        env=ENVIRONMENT | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step"):
            process.send_signal(signal.SIGINT)
            break
    rest, _ = process.communicate(timeout=60)
    stopped = find_complete_checkpoints(run)[-1]
    assert process.returncode != 0 and f"stopped at step {stopped.step} of 100000" in rest and stopped.resumable
    assert "another process" not in rest


@pytest.mark.slow
def test_user_error_is_reported_once(mini_recipe: Path, tmp_path: Path) -> None:
    """Without `make`, the launcher adds its traceback after the message."""
    options = ["3" if word == "2" else word for word in CPU2_LAUNCH_OPTIONS]
    done = launch("-m", "hw3", "train", mini_recipe, "--run", tmp_path / "run", options=options)
    assert done.returncode == 1 and not (tmp_path / "run").exists()
    assert done.stdout.count("cannot be divided among 3 processes") == 1
    assert done.stdout.index("cannot be divided") < done.stdout.index("Traceback") and "exitcode  : 2 " in done.stdout


def test_scores_and_predictions_of_two_processes_equal_those_of_one(scored_run: Path, tmp_path: Path) -> None:
    one, two = (shutil.copytree(scored_run, tmp_path / name / "run") for name in ("one", "two"))
    shutil.rmtree(two / "eval")
    hw3("predict", one)
    (tmp_path / "both.py").write_text(EVAL_AND_PREDICT, encoding="utf-8")
    done = launch(tmp_path / "both.py", two)
    assert done.returncode == 0, done.stdout
    # First the rows of the base model are shared; then each process scores one checkpoint, and they share the last.
    assert done.stdout.count("1 of 1 entries to score") == done.stdout.count("3 of 4 entries to score") == 1
    assert done.stdout.count("shared by 2 processes") == 1
    stored = [json.loads((run / "eval/eval/results.json").read_text(encoding="utf-8")) for run in (one, two)]
    assert [entry["step"] for entry in stored[0]["entries"]] == [0, 4, 8, 12]
    assert stored[0]["best"]["checkpoint"] == stored[1]["best"]["checkpoint"]
    for entry, other in zip(*(results["entries"] for results in stored), strict=True):
        assert entry.pop("seconds") > 0 < other.pop("seconds")
        if entry["step"] in (4, 8):  # bitwise, because its batches do not depend on the number of processes
            assert entry == other
        assert {key: other[key] for key in ("key", "rows", "tokens", "unknown_tokens")}.items() <= entry.items()
        for key in ("mean_perplexity", "token_perplexity", "median_perplexity", "bits_per_character"):
            assert other[key] == pytest.approx(entry[key], rel=1e-6)
    tables = [pq.read_table(run / "eval/eval/rows.parquet").to_pylist() for run in (one, two)]
    for row, other in zip(*tables, strict=True):
        assert (row["entry"], row["id"], row["tokens"]) == (other["entry"], other["id"], other["tokens"])
        assert other["nll"] == pytest.approx(row["nll"], rel=1e-6)
    (predictions,) = (file for file in (one / "predictions/eval").glob("*.json") if "quality" not in file.name)
    assert predictions.read_bytes() == (two / "predictions/eval" / predictions.name).read_bytes()
    names = sorted(file.name for file in (two / "predictions/eval").iterdir())
    assert names == [predictions.name, f"{predictions.stem}.quality.json"]


@pytest.mark.slow
def test_predictions_before_a_process_was_killed_are_reused(scored_run: Path, tmp_path: Path) -> None:
    one, two = (shutil.copytree(scored_run, tmp_path / name / "run") for name in ("one", "two"))
    hw3("predict", one)
    (tmp_path / "fail.py").write_text(FAIL_IN_PREDICTION, encoding="utf-8")
    done = launch(tmp_path / "fail.py", "predict", two)
    assert done.returncode == 1
    assert "hw3, process 0 of 2: another process has ended or does not respond" in done.stdout
    assert len(list((two / "predictions/eval").glob(".*.partial*.jsonl"))) == 2
    assert "10 rows of" in (shown := hw3("predict", two)[1]) and "7 already predicted" in shown
    files = [next((run / "predictions/eval").glob("checkpoint-*[0-9].json")) for run in (one, two)]
    assert files[0].read_bytes() == files[1].read_bytes() and len(list(files[1].parent.iterdir())) == 2


def test_predict_with_several_processes_refuses_a_single_text(
    scored_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "only the rows of a FILE can be shared" in hw3("predict", scored_run, "--text", "甲", expected=2)[1]


def test_process_timeout_may_change_on_resume(mini_recipe: Path, straight: Path) -> None:
    changed = [*DETERMINISTIC_SETTINGS, "training.ddp_timeout=60"]
    assert "is complete" in hw3("train", mini_recipe, "--run", straight, *changed)[0]
