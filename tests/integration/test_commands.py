"""`hw3 train` and `hw3 check` as a user runs them: messages, exit statuses, signals, resuming, two processes."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ENVIRONMENT, REPOSITORY, hw3, write_rows

from hw3.cli import main
from hw3.config.recipe import load_recipe
from hw3.modeling.devices import find_device_problems
from hw3.runs.checkpoints import find_complete_checkpoints, find_incomplete_checkpoints

# Runs `hw3` and kills the process while checkpoint 8 is being written: weights and optimizer state are saved, the rest
# is not.
KILLED_IN_A_CHECKPOINT = """
import os, signal, sys
from transformers import Trainer
save = Trainer._save_rng_state
def kill_self(self, folder):
    if folder.endswith("checkpoint-8"):
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, folder)
Trainer._save_rng_state = kill_self
from hw3.cli import main
sys.exit(main(sys.argv[1:]))
"""


def last_weights(run: Path) -> bytes:
    return (find_complete_checkpoints(run)[-1].path / "adapter_model.safetensors").read_bytes()


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.learning_rat=1"], "command line: training.learning_rat: no such key; did you mean learning_rate?"),
        (["model.pretrained_model_name_or_path=nobody/nothing"], "is not in the local cache and the Hub cannot be"),
        (["model.pretrained_model_name_or_path=./nothing"], "there is no folder ./nothing"),
        (["data.max_length=20"], "too long: 22 tokens, limit 20"),
        (["training.per_device_train_batch_size=64"], "44 rows do not fill one step of 64 rows"),
        (["training.use_cpu=false"], 'SET="training.use_cpu=true training.bf16=false model.dtype=float32'),
        (["lora.target_modules=[nothing]"], "lora: Target modules"),
        (["training.report_to=wandbb"], 'command line: training.report_to: found "wandbb": wandbb is not supported'),
        (["model.attn_implementation=flash_attention_2"], "model.attn_implementation:"),
    ],
)
def test_train_reports_a_mistake_and_writes_nothing(
    mini_recipe: Path, tmp_path: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(mini_recipe), "--run", str(tmp_path / "run"), *overrides]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_process_reports_a_mistake_without_a_traceback(mini_recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hw3", "train", str(mini_recipe), "--run", str(tmp_path / "run"), "lora.r=0"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 2
    assert done.stderr == "hw3: command line: lora.r: found 0, expected a number greater than or equal to 1\n"


def test_train_names_three_ways_to_get_missing_course_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if (REPOSITORY / "data/homework").exists():
        pytest.skip("data/homework exists")
    on_cpu = ["training.use_cpu=true", "training.bf16=false"]
    assert main(["train", "recipes/gemma/qlora.yaml", "--run", str(tmp_path / "run"), *on_cpu]) == 2
    stderr = capsys.readouterr().err
    assert "qlora.yaml:30: data.train: data/homework/train.json: no such file\n" in stderr
    assert "qlora.yaml:31: data.eval: data/homework/public_test.json: no such file\nThree ways to get data:" in stderr
    assert "2. build a similar set from a public corpus: make data CORPUS=..." in stderr
    assert "3. use the sample in this repository: make train MODEL=gemma TRAIN=data/train.json" in stderr


def test_check_without_the_base_model_reports_all_other_problems(
    mini_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base model is missing from the local cache; everything that does not need it is checked."""
    arguments = [
        "check",
        str(mini_recipe),
        "--run",
        str(tmp_path / "run"),
        "model.pretrained_model_name_or_path=some/base",
    ]
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    files = f"44 rows of {tmp_path}/train.json, 10 rows of {tmp_path}/eval.json"
    assert out.endswith(
        f"no mistake in {files}; tokens, lengths, memory and time are not known without the base model\n"
    )
    assert err.startswith("hw3: model.pretrained_model_name_or_path: there is no folder some/base, it is not in the ")
    assert err.count("\n") == 1
    # A first round reports what needs no library.
    assert main([*arguments, "--processes", "3", "data.eval=none.json", "training.report_to=wandbb"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    processes, file = err.splitlines()
    assert processes.startswith("hw3: training: 8 rows per step")
    assert file == "command line: data.eval: none.json: no such file"
    assert main([*arguments, "training.report_to=wandbb", "lora.layers_pattern=h"]) == 2
    beginnings = ["hw3: model.pretrained_model_name_or_path", "lora", "command line: training.report_to: found "]
    for line, beginning in zip(capsys.readouterr().err.splitlines(), beginnings, strict=True):
        assert line.removeprefix(f"{mini_recipe}:9: ").startswith(beginning)


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)],
)
def test_signal_saves_a_checkpoint_from_which_the_run_resumes_exactly(
    mini_recipe: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-u", "-m", "hw3", "train", str(mini_recipe)]
    command += ["--run", str(run), "training.max_steps=100000"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=REPOSITORY
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step"):
            process.send_signal(number)
            break
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == status
    stopped = find_complete_checkpoints(run)[-1]
    assert stopped.resumable and f"stopped at step {stopped.step} of 100000" in rest
    # Only the length differs, so an uninterrupted run to the same step has the same weights.
    hw3("train", mini_recipe, "--run", tmp_path / "uninterrupted", f"training.max_steps={stopped.step}")
    assert last_weights(run) == last_weights(tmp_path / "uninterrupted")
    hw3("train", mini_recipe, "--run", run, f"training.max_steps={stopped.step + 3}")
    hw3("train", mini_recipe, "--run", tmp_path / "uninterrupted", f"training.max_steps={stopped.step + 3}")
    assert last_weights(run) == last_weights(tmp_path / "uninterrupted")


def test_sigusr2_saves_a_checkpoint_and_continues_while_a_second_writer_is_refused(
    mini_recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = ["train", str(mini_recipe), "--run", str(run), "training.max_steps=100000"]
    command = [sys.executable, "-u", "-m", "hw3", *arguments, "training.save_steps=100000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=REPOSITORY) as process:
        assert process.stderr is not None
        saved_at = 0
        for line in process.stderr:
            if line.startswith("step") and not saved_at:
                process.send_signal(signal.SIGUSR2)
            if match := re.fullmatch(r"SIGUSR2: saving step (\d+), then continuing\n", line):
                saved_at = int(match[1])
            if line.startswith("step") and saved_at and (run / f"checkpoint-{saved_at}/COMPLETE.json").exists():
                break
        _, stderr = hw3(*arguments, "training.learning_rate=0.5", expected=2)
        assert f"{run}: process {process.pid} on " in stderr and "is writing to it" in stderr
        hw3("eval", run)  # readers do not wait
        assert process.poll() is None
        process.kill()
    assert [checkpoint.step for checkpoint in find_complete_checkpoints(run)] == [saved_at]
    hw3("train", mini_recipe, "--run", run, f"training.max_steps={saved_at + 3}")


def test_closed_pipe_saves_a_checkpoint_and_stops(mini_recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-u", "-m", "hw3", "train", str(mini_recipe), "--run", str(run)]
    command += ["training.max_steps=100000", "training.save_steps=100000"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=REPOSITORY
    )
    assert process.stderr is not None and process.stdout is not None
    next(line for line in process.stderr if line.startswith("step"))
    process.stderr.close()
    assert process.wait(timeout=60) == 143
    (checkpoint,) = find_complete_checkpoints(run)
    assert process.stdout.read() == f"stopped at step {checkpoint.step} of 100000; run the same command to resume\n"


def test_second_signal_ends_the_process_at_once(mini_recipe: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from hw3.training.callbacks import SignalCallback\n"
        "stop = SignalCallback()\n"
        "with stop.installed():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('one', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('two', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert (done.returncode, done.stdout) == (130, "one\n")


def test_run_killed_while_saving_resumes_from_the_last_complete_checkpoint(
    mini_recipe: Path, tmp_path: Path, finished_run: Path
) -> None:
    run = tmp_path / "run"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_IN_A_CHECKPOINT, "train", str(mini_recipe), "--run", str(run)],
        capture_output=True, env=ENVIRONMENT, cwd=REPOSITORY,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL
    assert [checkpoint.step for checkpoint in find_complete_checkpoints(run)] == [4]
    assert [folder.name for folder in find_incomplete_checkpoints(run)] == ["checkpoint-8"]
    _, stderr = hw3("train", mini_recipe, "--run", run)
    assert f"resuming {run} from step 4 of 12" in stderr
    assert last_weights(run) == last_weights(finished_run)
    assert "is complete: step 12 of 12" in hw3("train", mini_recipe, "--run", run)[0]


def test_optimizer_state_stays_in_the_last_two_checkpoints(finished_run: Path) -> None:
    assert [(c.step, c.resumable) for c in find_complete_checkpoints(finished_run)] == [
        (4, False),
        (8, True),
        (12, True),
    ]
    names = sorted(file.name for file in (finished_run / "checkpoint-4").iterdir())
    assert names == ["COMPLETE.json", "adapter_config.json", "adapter_model.safetensors", "trainer_state.json"]
    record = json.loads((finished_run / "checkpoint-12/COMPLETE.json").read_text(encoding="utf-8"))
    assert set(record["resume_files"]) == {"trainer_accumulators.json", "optimizer.pt", "rng_state.pth", "scheduler.pt"}


def test_truncated_file_makes_a_checkpoint_incomplete(finished_run: Path) -> None:
    file = finished_run / "checkpoint-12/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    (finished_run / "checkpoint-8/optimizer.pt").unlink()
    assert [(c.step, c.resumable) for c in find_complete_checkpoints(finished_run)] == [(4, False), (8, False)]


def test_resume_refuses_changed_settings_and_data(mini_recipe: Path, tmp_path: Path, finished_run: Path) -> None:
    _, stderr = hw3("train", mini_recipe, "--run", finished_run, "training.learning_rate=0.02", "lora.r=8", expected=2)
    assert "lora.r: 4 in the folder, 8 now" in stderr
    assert "training.learning_rate: 0.01 in the folder, 0.02 now" in stderr
    assert f"RUN={finished_run}-2" in stderr
    allowed = ["training.max_steps=16", "training.save_steps=2", "training.logging_steps=1", "speed=lean"]
    hw3("train", mini_recipe, "--run", finished_run, *allowed)
    assert [checkpoint.step for checkpoint in find_complete_checkpoints(finished_run)] == [4, 8, 12, 14, 16]
    write_rows(tmp_path / "train.json", 45)
    assert "changed since" in hw3("train", mini_recipe, "--run", finished_run, *allowed, expected=2)[1]


def test_resume_refuses_a_changed_base_model(mini_recipe: Path, tmp_path: Path, finished_run: Path) -> None:
    base = Path(load_recipe(mini_recipe).model.pretrained_model_name_or_path)
    before = (base / "model.safetensors").read_bytes()
    try:
        (base / "model.safetensors").write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        assert (
            "changed since" in hw3("train", mini_recipe, "--run", finished_run, "training.max_steps=16", expected=2)[1]
        )
    finally:
        (base / "model.safetensors").write_bytes(before)


def test_train_refuses_folders_of_other_programs(mini_recipe: Path, tmp_path: Path) -> None:
    other = tmp_path / "other/checkpoint-500"
    other.mkdir(parents=True)
    (other / "model.bin").write_text("theirs", encoding="utf-8")
    assert "was not written by this project" in hw3("train", mini_recipe, "--run", tmp_path / "other", expected=2)[1]
    assert (other / "model.bin").exists() and not (tmp_path / "other/recipe.yaml").exists()
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert "is a file" in hw3("train", mini_recipe, "--run", tmp_path / "file/run", expected=2)[1]


def test_save_total_limit_keeps_the_latest_checkpoints(mini_recipe: Path, tmp_path: Path) -> None:
    hw3("train", mini_recipe, "--run", tmp_path / "run", "training.save_steps=2", "training.save_total_limit=3")
    assert [checkpoint.step for checkpoint in find_complete_checkpoints(tmp_path / "run")] == [8, 10, 12]


def test_train_checks_disk_space_before_it_writes(
    mini_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    stderr = hw3("train", mini_recipe, "--run", tmp_path / "run", expected=2)[1]
    assert "disk: checkpoints need 0.3 MiB, 0.0 MiB free; free some space, raise training.save_steps" in stderr
    assert not (tmp_path / "run").exists()


def test_message_for_a_gpu_without_bfloat16_gives_settings_that_work(
    mini_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(mini_recipe, ["training.use_cpu=false", "training.bf16=true"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Old GPU")
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: including_emulation)
    (problem,) = find_device_problems(recipe, 1)
    assert problem.startswith("Old GPU does not support bfloat16")
    settings = problem.partition('SET="')[2].rstrip('"').split()
    monkeypatch.setattr("hw3.modeling.loading.torch.cuda.device_count", lambda: 4)
    fitting = load_recipe(mini_recipe, ["training.use_cpu=false", "training.bf16=true", *settings])
    assert find_device_problems(fitting, 4) == []
    assert find_device_problems(fitting, 8) == ["8 processes need a GPU each, but this machine has 4; use GPUS=4"]
    spread = load_recipe(mini_recipe, ["training.use_cpu=false", *settings, "model.device_map=auto"])
    assert "conflicts with one process per GPU" in find_device_problems(spread, 2)[0]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_train_like_one(mini_recipe: Path, tmp_path: Path, accumulation: int) -> None:
    """Each step sees the same rows; losses in float32 agree to 1e-5."""
    layout = [
        f"training.per_device_train_batch_size={8 // accumulation}",
        f"training.gradient_accumulation_steps={accumulation}",
        "training.logging_steps=1",
        "lora.lora_dropout=0.0",
        "quantization=null",
        "training.learning_rate=0.001",
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    hw3("train", mini_recipe, "--run", one, *layout)
    launch = ["accelerate.commands.launch", "--config_file", "accelerate_configs/cpu2.yaml", "--num_processes", "2",
              "--main_process_port", "0", "-m", "hw3"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", *launch, "train", str(mini_recipe), "--run", str(two), *layout],
        capture_output=True, text=True, env=ENVIRONMENT, cwd=REPOSITORY,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((two / "manifest.json").read_text(encoding="utf-8"))["layout"]["processes"] == 2
    losses = []
    for run in (one, two):
        state = json.loads((find_complete_checkpoints(run)[-1].path / "trainer_state.json").read_text(encoding="utf-8"))
        losses.append([(log["step"], log["loss"], log["num_tokens"]) for log in state["log_history"] if "loss" in log])
    assert len(losses[0]) == 12
    for (step, loss, tokens), (other_step, other_loss, other_tokens) in zip(*losses, strict=True):
        assert (other_step, other_tokens) == (step, tokens)
        assert other_loss == pytest.approx(loss, abs=1e-5)


def test_check_prints_masks_and_steps(mini_recipe: Path) -> None:
    stdout, _ = hw3("check", mini_recipe, "--show-masks", "2")
    assert "-<bos>/2 -天/14 -地/15" in stdout and "+<eos>/1" in stdout and ".<pad>/0" in stdout
    assert "12 steps of 8 rows, 2.4 epochs; one process takes 8 rows x 1" in stdout
    _, stderr = hw3("check", mini_recipe, "--processes", "3", expected=2)
    assert "cannot be divided among 3 processes" in stderr
