"""Several real processes on the CPU: the same run, scores and answers as one; what is said when one of them dies."""

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
import torch
from helpers import CPU2, ENVIRONMENT, REPOSITORY, SETTINGS, assert_same_run, hw3, launch
from hypothesis import given
from hypothesis import strategies as st

from hw3.common.distributed import check_same, failures_named, own_share
from hw3.common.errors import RunFailed, UserError
from hw3.config.recipe import load_recipe
from hw3.runs.checkpoints import complete_checkpoints
from hw3.training.batch_layout import step_layout
from hw3.training.sft_arguments import TIMEOUT, sft_config
from hw3.training.step_strategy import Speed

# `hw3`, of which process 1 ends in the middle of step 6, as the first word says.
DIES = """
import os, signal, sys, time
import torch
from hw3.training.trainer import CompletionTrainer
step, way = CompletionTrainer.training_step, sys.argv.pop(1)
def dying(self, *arguments, **named):
    if self.state.global_step == 5 and os.environ["RANK"] == "1":
        if way == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if way == "hangs":
            time.sleep(600)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return step(self, *arguments, **named)
CompletionTrainer.training_step = dying
from hw3.cli import main
sys.exit(main(sys.argv[1:]))
"""
# `hw3 eval RUN --base-only`, `hw3 eval RUN` and `hw3 predict RUN` in one, seconds of imports spared.
EVAL_AND_PREDICT = """
import sys
from hw3.cli import main
run = sys.argv[1]
sys.exit(main(["eval", run, "--base-only"]) or main(["eval", run]) or main(["predict", run]))
"""
# `hw3 predict`, of which process 1 is killed before its third answer, once process 0 has kept all five of its own and
# waits: the launcher would end it too.
DIES_ANSWERING = """
import glob, os, signal, sys, time
from hw3.data.tokenization import Encoder
decode, answers = Encoder.decode, []
def dying(self, ids):
    answers.append(ids)
    if len(answers) == 3 and os.environ["RANK"] == "1":
        (first,) = glob.glob(sys.argv[2] + "/predictions/eval/.*.partial.jsonl")
        while len(open(first).readlines()) < 6:
            time.sleep(0.05)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(self, ids)
Encoder.decode = dying
from hw3.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture
def straight(mini_recipe: Path, tmp_path: Path) -> Path:
    hw3("train", mini_recipe, "--run", tmp_path / "straight", *SETTINGS)
    return tmp_path / "straight"


def test_two_machines_go_on_with_a_run_of_one_process(mini_recipe: Path, tmp_path: Path, straight: Path) -> None:
    """Two launchers, as on two nodes, resume what one process has begun."""
    run = tmp_path / "run"
    hw3("train", mini_recipe, "--run", run, *SETTINGS, "training.max_steps=4")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", "accelerate_configs/multi_node.yaml", "--num_machines", "2", "--num_processes", "2"]
    command += ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
    job = ["-m", "hw3", "train", str(mini_recipe), "--run", str(run), *SETTINGS]
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
    manifest = json.loads((run / "manifest.json").read_text())
    assert [session["processes"] for session in manifest["sessions"]] == [1, 2]
    assert_same_run(straight, run)


@pytest.mark.slow
def test_two_processes_begin_and_four_go_on(mini_recipe: Path, tmp_path: Path, straight: Path) -> None:
    for processes, steps in ((2, 6), (4, 12)):
        options = [*CPU2[:3], str(processes), *CPU2[4:]]
        words = ["train", mini_recipe, "--run", tmp_path / "run", *SETTINGS, f"training.max_steps={steps}"]
        done = launch("-m", "hw3", *words, "training.save_steps=6", options=options)
        assert done.returncode == 0, done.stdout
        assert f"each of {processes} processes takes {8 // processes} rows x 1" in done.stdout
    assert_same_run(straight, tmp_path / "run")


def test_a_killed_process_ends_the_run_which_one_goes_on_with(
    mini_recipe: Path, tmp_path: Path, straight: Path
) -> None:
    run = tmp_path / "run"
    (tmp_path / "dies.py").write_text(DIES)
    began = time.monotonic()
    done = launch(tmp_path / "dies.py", "killed", "train", mini_recipe, "--run", run, *SETTINGS)
    assert done.returncode == 1 and time.monotonic() - began < 60
    assert "hw3, process 0 of 2: another process has ended or does not answer" in done.stdout
    assert "hw3, process 1" not in done.stdout
    assert [(checkpoint.step, checkpoint.resumable) for checkpoint in complete_checkpoints(run)] == [(4, True)]
    assert f"resuming {run} from step 4 of 12" in hw3("train", mini_recipe, "--run", run, *SETTINGS)[0]
    assert_same_run(straight, run)


@pytest.mark.slow
def test_out_of_memory_in_one_process_ends_all(mini_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text(DIES)
    began = time.monotonic()
    done = launch(tmp_path / "dies.py", "memory", "train", mini_recipe, "--run", tmp_path / "run", *SETTINGS)
    assert done.returncode == 1 and time.monotonic() - began < 60
    assert "hw3, process 1 of 2: out of memory: CUDA out of memory. Tried to allocate 2.00 GiB.\n" in done.stdout
    assert "hw3, process 0 of 2: another process has ended or does not answer" in done.stdout
    assert [checkpoint.step for checkpoint in complete_checkpoints(tmp_path / "run")] == [4]


@pytest.mark.slow
def test_a_process_that_hangs_ends_all_after_the_timeout(mini_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text(DIES)
    done = launch(
        tmp_path / "dies.py", "hangs", "train", mini_recipe, "--run", tmp_path / "run", *SETTINGS,
        "training.ddp_timeout=20", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="8",
    )  # fmt: skip
    assert done.returncode == 1
    assert "hw3, process 0 of 2: another process has ended or does not answer" in done.stdout
    assert "hw3, process 1 of 2: told to stop, and the step has not ended in 3 s" in done.stdout
    assert [checkpoint.step for checkpoint in complete_checkpoints(tmp_path / "run")] == [4]


def test_make_refuses_a_wrong_number_before_any_launcher(mini_recipe: Path, tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    words = ["train", "GPUS=3", "ACCELERATE=cpu2", f"RUN={tmp_path / 'run'}", f"recipe={mini_recipe}"]
    done = subprocess.run(
        ["make", "VENV=", *words], cwd=REPOSITORY, env=ENVIRONMENT | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "run").exists()
    assert done.stderr.startswith(
        "hw3: training: 8 rows a step (per_device_train_batch_size 8 x gradient_accumulation_steps 1) do not divide "
        "among 3 processes; use 2 or 4 processes, or 6 or 9 rows a step\n"
    )


@pytest.mark.slow
def test_ctrl_c_at_the_launcher_writes_a_checkpoint(mini_recipe: Path, tmp_path: Path) -> None:
    """The launcher hands the signal on, at different steps of its processes perhaps; all save the same one."""
    run = tmp_path / "run"
    command = [sys.executable, "-u", "-m", "accelerate.commands.launch", *CPU2, "-m", "hw3"]
    process = subprocess.Popen(
        [*command, "train", str(mini_recipe), "--run", str(run), *SETTINGS, "training.max_steps=100000"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY,
        env=ENVIRONMENT | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step"):
            process.send_signal(signal.SIGINT)
            break
    rest, _ = process.communicate(timeout=60)
    stopped = complete_checkpoints(run)[-1]
    assert process.returncode != 0 and f"stopped at step {stopped.step} of 100000" in rest and stopped.resumable
    assert "another process" not in rest


@pytest.mark.slow
def test_a_mistake_is_said_once(mini_recipe: Path, tmp_path: Path) -> None:
    """Without `make` the launcher adds its traceback, and our message stands before it."""
    options = ["3" if word == "2" else word for word in CPU2]
    done = launch("-m", "hw3", "train", mini_recipe, "--run", tmp_path / "run", options=options)
    assert done.returncode == 1 and not (tmp_path / "run").exists()
    assert done.stdout.count("do not divide among 3 processes") == 1
    assert done.stdout.index("do not divide") < done.stdout.index("Traceback") and "exitcode  : 2 " in done.stdout


def test_scores_and_answers_of_two_processes_are_those_of_one(scored_run: Path, tmp_path: Path) -> None:
    one, two = (shutil.copytree(scored_run, tmp_path / name / "run") for name in ("one", "two"))
    shutil.rmtree(two / "eval")
    hw3("predict", one)
    (tmp_path / "both.py").write_text(EVAL_AND_PREDICT)
    done = launch(tmp_path / "both.py", two)
    assert done.returncode == 0, done.stdout
    # The base alone, by rows; then two of three checkpoints, whole, and the rows of the last.
    assert done.stdout.count("1 of 1 entries to score") == done.stdout.count("3 of 4 entries to score") == 1
    assert done.stdout.count("shared by 2 processes") == 1
    stored = [json.loads((run / "eval/eval/results.json").read_text()) for run in (one, two)]
    assert [entry["step"] for entry in stored[0]["entries"]] == [0, 4, 8, 12]
    assert stored[0]["best"]["checkpoint"] == stored[1]["best"]["checkpoint"]
    for entry, other in zip(*(results["entries"] for results in stored), strict=True):
        assert entry.pop("seconds") > 0 < other.pop("seconds")
        if entry["step"] in (4, 8):  # to the bit: its batches do not depend on the number of processes
            assert entry == other
        assert {key: other[key] for key in ("key", "rows", "tokens", "unknown_tokens")}.items() <= entry.items()
        for key in ("mean_perplexity", "token_perplexity", "median_perplexity", "bits_per_character"):
            assert other[key] == pytest.approx(entry[key], rel=1e-6)
    tables = [pq.read_table(run / "eval/eval/rows.parquet").to_pylist() for run in (one, two)]
    for row, other in zip(*tables, strict=True):
        assert (row["entry"], row["id"], row["tokens"]) == (other["entry"], other["id"], other["tokens"])
        assert other["nll"] == pytest.approx(row["nll"], rel=1e-6)
    (answers,) = (file for file in (one / "predictions/eval").glob("*.json") if "quality" not in file.name)
    assert answers.read_bytes() == (two / "predictions/eval" / answers.name).read_bytes()
    names = sorted(file.name for file in (two / "predictions/eval").iterdir())
    assert names == [answers.name, f"{answers.stem}.quality.json"]


@pytest.mark.slow
def test_answers_of_a_call_that_lost_a_process_are_kept(scored_run: Path, tmp_path: Path) -> None:
    one, two = (shutil.copytree(scored_run, tmp_path / name / "run") for name in ("one", "two"))
    hw3("predict", one)
    (tmp_path / "dies.py").write_text(DIES_ANSWERING)
    done = launch(tmp_path / "dies.py", "predict", two)
    assert done.returncode == 1
    assert "hw3, process 0 of 2: another process has ended or does not answer" in done.stdout
    assert len(list((two / "predictions/eval").glob(".*.partial*.jsonl"))) == 2
    assert "10 rows of" in (shown := hw3("predict", two)[0]) and "7 done before" in shown
    files = [next((run / "predictions/eval").glob("checkpoint-*[0-9].json")) for run in (one, two)]
    assert files[0].read_bytes() == files[1].read_bytes() and len(list(files[1].parent.iterdir())) == 2


def test_several_processes_answer_no_lines(scored_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "share out the rows of a FILE" in hw3("predict", scored_run, "--text", "甲", expected=2)[1]


@given(costs=st.lists(st.floats(1, 100), max_size=40), processes=st.integers(1, 5))
def test_shares_hold_each_item_once_and_cost_alike(costs: list[float], processes: int) -> None:
    shares = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(processes))
        for rank in range(processes):
            patch.setenv("RANK", str(rank))
            shares.append(own_share(costs))
    assert sorted(index for share in shares for index in share) == list(range(len(costs)))
    sums = [sum(costs[index] for index in share) for share in shares]
    assert max(sums) - min(sums) <= max(costs, default=0) + 1e-9


def test_what_is_said_of_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunFailed, match="out of memory: no room\nless is needed"), failures_named("less is needed"):
        raise torch.OutOfMemoryError("no room\nmore")
    gloo = RuntimeError("[/pytorch/third_party/gloo/pair.cc:5] Connection closed by peer [::1]:1. This is typical.")
    with pytest.raises(RuntimeError, match=r"pair\.cc"), failures_named(""):
        raise gloo
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunFailed, match=r"from there\. \(Connection closed by peer \[::1\]:1\)$"), failures_named(""):
        raise gloo
    with pytest.raises(RunFailed, match="from there"), failures_named(""):
        raise torch.distributed.DistBackendError("NCCL error: remote process exited")
    with pytest.raises(RuntimeError, match="size mismatch"), failures_named(""):
        raise RuntimeError("size mismatch")


def test_processes_that_see_other_files_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [{"outputs/a": "step 8", "data": "1f"}, {"outputs/a": "no checkpoint", "data": "1f"}]
    monkeypatch.setattr("hw3.common.distributed.gather", lambda value: seen)
    with pytest.raises(UserError, match=r"\noutputs/a: process 1 reads no checkpoint, process 0 step 8$"):
        check_same(seen[0])


def test_the_timeout_outlasts_a_slow_disk_and_may_change(mini_recipe: Path, straight: Path, tmp_path: Path) -> None:
    for overrides, seconds in (([], TIMEOUT), (["training.ddp_timeout=60"], 60)):
        recipe = load_recipe(mini_recipe, overrides)
        speed = Speed(step_layout(recipe, 1), False, False, False, recipe.training["optim"])
        config = sft_config(recipe, speed, tmp_path / "run")
        assert config.ddp_timeout == seconds
    assert TIMEOUT == 600
    again = [*SETTINGS, "training.ddp_timeout=60"]
    assert "is complete" in hw3("train", mini_recipe, "--run", straight, *again)[0]
