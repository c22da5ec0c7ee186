"""The commands as processes: exit statuses, signals, kill -9 in the middle of a write, two processes, results kept."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from helpers import ENVIRONMENT, REPOSITORY, hw3, write_rows

from hw3.cli import main
from hw3.config.recipe import load_recipe
from hw3.modeling.devices import device_problems
from hw3.runs.checkpoints import complete_checkpoints, torn_checkpoints
from hw3.training.train import train

# Ends itself with SIGKILL while checkpoint 8 is being written: weights and optimizer are there, the rest is not.
KILLED_IN_A_CHECKPOINT = """
import os, signal, sys
from transformers import Trainer
save = Trainer._save_rng_state
def killed(self, folder):
    if folder.endswith("checkpoint-8"):
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, folder)
Trainer._save_rng_state = killed
from hw3.cli import main
from hw3.modeling.devices import device_problems
sys.exit(main(sys.argv[1:]))
"""

# Ends itself with SIGKILL when the third entry has been scored and not yet written.
KILLED_IN_A_SWEEP = """
import os, signal, sys
from hw3.evaluation.results import Results
add = Results.add
def killed(self, entry, scores):
    if len(self.entries) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, entry, scores)
Results.add = killed
from hw3.cli import main
main(sys.argv[1:])
"""


def last_weights(run: Path) -> bytes:
    return (complete_checkpoints(run)[-1].path / "adapter_model.safetensors").read_bytes()


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture
def straight(mini_recipe: Path, tmp_path: Path) -> Path:
    """The run that nothing happened to."""
    assert train(load_recipe(mini_recipe), tmp_path / "straight") == 0
    return tmp_path / "straight"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.learning_rat=1"], "command line: training.learning_rat: no such key; did you mean learning_rate?"),
        (["model.pretrained_model_name_or_path=nobody/nothing"], "is not in the local cache and the hub cannot be"),
        (["model.pretrained_model_name_or_path=./nothing"], "there is no folder ./nothing"),
        (["data.max_length=20"], "over-long:"),
        (["training.per_device_train_batch_size=64"], "44 rows do not fill one step of 64 rows"),
        (["training.use_cpu=false"], 'SET="training.use_cpu=true training.bf16=false model.dtype=float32'),
        (["lora.target_modules=[nothing]"], "lora: Target modules"),
        (["training.report_to=wandbb"], "training.report_to: wandbb:"),
        (["model.attn_implementation=flash_attention_2"], "model.attn_implementation:"),
    ],
)
def test_mistakes_end_with_2_and_write_nothing(
    mini_recipe: Path, tmp_path: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(mini_recipe), "--run", str(tmp_path / "run"), *overrides]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_mistake_ends_the_process_with_2_and_no_traceback(mini_recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hw3", "train", str(mini_recipe), "--run", str(tmp_path / "run"), "lora.r=0"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 2
    assert done.stderr == "hw3: command line: lora.r: found 0: a number greater than or equal to 1 is needed\n"


def test_absent_course_files_give_three_ways_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if (REPOSITORY / "data/homework").exists():
        pytest.skip("data/homework is there")
    on_cpu = ["training.use_cpu=true", "training.bf16=false"]
    assert main(["train", "recipes/gemma/qlora.yaml", "--run", str(tmp_path / "run"), *on_cpu]) == 2
    shown = capsys.readouterr().err
    assert "no such file: data/homework/train.json, data/homework/public_test.json. Three ways on:" in shown
    assert "2. build a set like it from a public corpus: make data CORPUS=..." in shown
    assert "3. use the sample in this repository: make train MODEL=gemma TRAIN=data/train.json" in shown


def test_check_without_the_base_says_what_else_is_right_or_wrong(
    mini_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One message with the base and every other problem; what needs no base has been looked at."""
    words = ["check", str(mini_recipe), "--run", str(tmp_path / "run"), "model.pretrained_model_name_or_path=some/base"]
    assert main(words) == 2
    out, err = capsys.readouterr()
    files = f"44 rows of {tmp_path}/train.json, 10 rows of {tmp_path}/eval.json"
    assert out.endswith(f"no mistake in {files}; tokens, lengths, memory and time cannot be told without the base\n")
    assert err.startswith("hw3: model.pretrained_model_name_or_path: there is no folder some/base, it is not in the ")
    assert err.count("\n") == 1
    assert main([*words, "--processes", "3", "data.eval=none.json", "training.report_to=wandbb"]) == 2
    out, err = capsys.readouterr()
    assert "no mistake" not in out
    beginnings = ["hw3: training: 8 rows a step", "training.report_to: wandbb", "data.eval: none.json: no such file"]
    for line, beginning in zip(err.splitlines(), [*beginnings, "model.pretrained_model_name_or_path"], strict=True):
        assert line.startswith(beginning)


@pytest.mark.parametrize(
    "words", [["train"], ["trian", "x.yaml"], ["train", "x.yaml", "--runn", "y"], ["eval", "x", "a=b"]]
)
def test_options_are_strict(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_writes_a_checkpoint_and_the_run_goes_on(
    mini_recipe: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-u", "-m", "hw3", "train", str(mini_recipe)]
    command += ["--run", str(run), "training.max_steps=100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=REPOSITORY)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step"):
            process.send_signal(number)
            break
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == status
    stopped = complete_checkpoints(run)[-1]
    assert stopped.resumable and f"stopped at step {stopped.step} of 100000" in rest
    # Nothing but the length has changed, so a straight run to the same step has the same weights.
    hw3("train", mini_recipe, "--run", tmp_path / "alone", f"training.max_steps={stopped.step}")
    assert last_weights(run) == last_weights(tmp_path / "alone")
    hw3("train", mini_recipe, "--run", run, f"training.max_steps={stopped.step + 3}")
    hw3("train", mini_recipe, "--run", tmp_path / "alone", f"training.max_steps={stopped.step + 3}")
    assert last_weights(run) == last_weights(tmp_path / "alone")


def test_a_second_signal_ends_the_process_at_once(mini_recipe: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from hw3.training.callbacks import StopOnSignal\n"
        "stop = StopOnSignal(None)\n"
        "with stop.installed():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('one', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('two', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert (done.returncode, done.stdout) == (130, "one\n")


def test_killed_while_writing_a_checkpoint(mini_recipe: Path, tmp_path: Path, straight: Path) -> None:
    run = tmp_path / "run"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_IN_A_CHECKPOINT, "train", str(mini_recipe), "--run", str(run)],
        capture_output=True, env=ENVIRONMENT, cwd=REPOSITORY,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL
    assert [checkpoint.step for checkpoint in complete_checkpoints(run)] == [4]
    assert [folder.name for folder in torn_checkpoints(run)] == ["checkpoint-8"]
    shown, _ = hw3("train", mini_recipe, "--run", run)
    assert f"resuming {run} from step 4 of 12" in shown
    assert last_weights(run) == last_weights(straight)
    assert "is complete: step 12 of 12" in hw3("train", mini_recipe, "--run", run)[0]


def test_state_stays_in_the_last_two_checkpoints(straight: Path) -> None:
    assert [(c.step, c.resumable) for c in complete_checkpoints(straight)] == [(4, False), (8, True), (12, True)]
    names = sorted(file.name for file in (straight / "checkpoint-4").iterdir())
    assert names == ["COMPLETE.json", "adapter_config.json", "adapter_model.safetensors", "trainer_state.json"]
    record = json.loads((straight / "checkpoint-12/COMPLETE.json").read_text())
    assert set(record["resume_files"]) == {"accumulated.json", "optimizer.pt", "rng_state.pth", "scheduler.pt"}


def test_a_cut_file_makes_a_checkpoint_incomplete(straight: Path) -> None:
    file = straight / "checkpoint-12/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    (straight / "checkpoint-8/optimizer.pt").unlink()
    assert [(c.step, c.resumable) for c in complete_checkpoints(straight)] == [(4, False), (8, False)]


def test_resume_refuses_another_run(mini_recipe: Path, tmp_path: Path, straight: Path) -> None:
    _, said = hw3("train", mini_recipe, "--run", straight, "training.learning_rate=0.02", "lora.r=8", expected=2)
    assert "lora.r: 4 there, 8 now" in said
    assert "training.learning_rate: 0.01 there, 0.02 now" in said
    assert f"RUN={straight}-2" in said
    free = ["training.max_steps=16", "training.save_steps=2", "training.logging_steps=1", "speed=lean"]
    hw3("train", mini_recipe, "--run", straight, *free)
    assert [checkpoint.step for checkpoint in complete_checkpoints(straight)] == [4, 8, 12, 14, 16]
    write_rows(tmp_path / "train.json", 45)
    assert "changed since" in hw3("train", mini_recipe, "--run", straight, *free, expected=2)[1]


def test_resume_refuses_another_base(mini_recipe: Path, tmp_path: Path, straight: Path) -> None:
    base = Path(load_recipe(mini_recipe).model.pretrained_model_name_or_path)
    before = (base / "model.safetensors").read_bytes()
    try:
        (base / "model.safetensors").write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        assert "changed since" in hw3("train", mini_recipe, "--run", straight, "training.max_steps=16", expected=2)[1]
    finally:
        (base / "model.safetensors").write_bytes(before)


def test_foreign_folders_are_left_alone(mini_recipe: Path, tmp_path: Path) -> None:
    other = tmp_path / "other/checkpoint-500"
    other.mkdir(parents=True)
    (other / "model.bin").write_text("theirs")
    assert "is not this project's" in hw3("train", mini_recipe, "--run", tmp_path / "other", expected=2)[1]
    assert (other / "model.bin").exists() and not (tmp_path / "other/recipe.yaml").exists()
    (tmp_path / "file").write_text("")
    assert "is a file" in hw3("train", mini_recipe, "--run", tmp_path / "file/run", expected=2)[1]


def test_save_total_limit_keeps_the_newest_by_step(mini_recipe: Path, tmp_path: Path) -> None:
    hw3("train", mini_recipe, "--run", tmp_path / "run", "training.save_steps=2", "training.save_total_limit=3")
    assert [checkpoint.step for checkpoint in complete_checkpoints(tmp_path / "run")] == [8, 10, 12]


def test_disk_is_checked_before_anything_is_written(
    mini_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    said = hw3("train", mini_recipe, "--run", tmp_path / "run", expected=2)[1]
    assert "disk: checkpoints take 0.3 MiB, 0.0 MiB free; free some, raise training.save_steps" in said
    assert not (tmp_path / "run").exists()


def test_a_gpu_without_bfloat16_gets_the_settings_that_work(mini_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(mini_recipe, ["training.use_cpu=false", "training.bf16=true"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Old GPU")
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: including_emulation)
    (problem,) = device_problems(recipe, 1)
    assert problem.startswith("Old GPU has no bfloat16")
    settings = problem.partition('SET="')[2].rstrip('"').split()
    monkeypatch.setattr("hw3.modeling.loading.torch.cuda.device_count", lambda: 4)
    fitting = load_recipe(mini_recipe, ["training.use_cpu=false", "training.bf16=true", *settings])
    assert device_problems(fitting, 4) == []
    assert device_problems(fitting, 8) == ["8 processes, but 4 GPUs here; set GPUS to that or less"]
    spread = load_recipe(mini_recipe, ["training.use_cpu=false", *settings, "model.device_map=auto"])
    assert "clashes with one process a GPU" in device_problems(spread, 2)[0]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_equal_one(mini_recipe: Path, tmp_path: Path, accumulation: int) -> None:
    """The same rows in every step: losses to 1e-5, in float32."""
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
    assert json.loads((two / "manifest.json").read_text())["layout"]["processes"] == 2
    losses = []
    for run in (one, two):
        state = json.loads((complete_checkpoints(run)[-1].path / "trainer_state.json").read_text())
        losses.append([(log["step"], log["loss"], log["num_tokens"]) for log in state["log_history"] if "loss" in log])
    assert len(losses[0]) == 12
    for (step, loss, tokens), (other_step, other_loss, other_tokens) in zip(*losses, strict=True):
        assert (other_step, other_tokens) == (step, tokens)
        assert other_loss == pytest.approx(loss, abs=1e-5)


def test_eval_scores_what_is_new_and_keeps_the_rest(mini_recipe: Path, tmp_path: Path, straight: Path) -> None:
    shutil.copytree(straight / "checkpoint-12", straight / "checkpoint-13")
    (straight / "checkpoint-13/COMPLETE.json").unlink()
    shown, _ = hw3("eval", straight)
    assert "checkpoint-13: not complete, left out" in shown
    folder = straight / "eval/eval"
    results = json.loads((folder / "results.json").read_text())
    assert [(entry["step"], entry["checkpoint"]) for entry in results["entries"]] == [
        (0, None), (4, "checkpoint-4"), (8, "checkpoint-8"), (12, "checkpoint-12"),
    ]  # fmt: skip
    best = min(results["entries"][1:], key=lambda entry: entry["mean_perplexity"])
    assert results["best"]["step"] == best["step"] and results["best"]["mean_perplexity"] == best["mean_perplexity"]
    for entry in results["entries"]:
        low, high = entry["mean_perplexity_ci95"]
        assert low < entry["mean_perplexity"] < high
    rows = pq.read_table(folder / "rows.parquet").to_pylist()
    assert len(rows) == 40 and set(rows[0]) == {"entry", "id", "nll", "tokens", "characters", "perplexity"}
    first = [row for row in rows if row["entry"] == results["entries"][0]["key"]]
    assert sum(row["perplexity"] for row in first) / 10 == pytest.approx(results["entries"][0]["mean_perplexity"])
    assert (folder / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"

    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}
    hw3("eval", straight)
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()} == before

    hw3("train", mini_recipe, "--run", straight, "training.max_steps=16")
    assert "1 of 5 entries to score" in hw3("eval", straight)[0]
    before = (folder / "results.json").read_bytes()
    shown, _ = hw3("eval", straight, "--shots", "0", "0", "--against", "base")
    assert (folder / "results.json").read_bytes() == before
    assert "against base: difference, interval, better/worse" in shown
    assert "nothing of that name" in hw3("eval", straight, "--against", "checkpoint-5", expected=2)[1]


def test_a_new_run_in_the_folder_forgets_the_old_scores(mini_recipe: Path, straight: Path) -> None:
    hw3("eval", straight)
    for checkpoint in complete_checkpoints(straight):
        shutil.rmtree(checkpoint.path)
    hw3("train", mini_recipe, "--run", straight, "training.max_steps=4", "training.learning_rate=0.001")
    shown, _ = hw3("eval", straight)
    assert "1 of 2 entries to score" in shown
    results = json.loads((straight / "eval/eval/results.json").read_text())
    assert [entry["checkpoint"] for entry in results["entries"]] == [None, "checkpoint-4"]


def test_a_sweep_that_is_killed_loses_one_entry(straight: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    shutil.copytree(straight, killed)
    done = subprocess.run(
        [sys.executable, "-c", KILLED_IN_A_SWEEP, "eval", str(killed)], capture_output=True, env=ENVIRONMENT,
        cwd=REPOSITORY,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    kept = json.loads((killed / "eval/eval/results.json").read_text())["entries"]
    assert [entry["checkpoint"] for entry in kept] == [None, "checkpoint-4"]
    shown, _ = hw3("eval", killed)
    assert "2 of 4 entries to score" in shown
    hw3("eval", straight)
    results = [json.loads((run / "eval/eval/results.json").read_text()) for run in (killed, straight)]
    for result in results:
        del result["run"]
        for entry in result["entries"]:
            del entry["seconds"]
    assert results[0] == results[1] and results[0]["entries"][:2] == [
        {key: value for key, value in entry.items() if key != "seconds"} for entry in kept
    ]


def test_prompts_are_compared(straight: Path) -> None:
    prompts = [REPOSITORY / f"recipes/prompts/{name}.yaml" for name in ("bare", "course_default")]
    hw3("eval", straight, "--base-only", "--prompt", *prompts)
    entries = json.loads((straight / "eval/eval/results.json").read_text())["entries"]
    assert [entry["prompt"]["name"] for entry in entries] == ["bare", "course_default", "recipe"]
    assert len({entry["mean_perplexity"] for entry in entries}) == 3
    shown, _ = hw3("eval", straight, "--base-only", "--prompt", *prompts)
    assert "to score" not in shown


def test_dev_chooses_and_eval_reports(mini_recipe: Path, tmp_path: Path) -> None:
    dev = write_rows(tmp_path / "dev.json", 6, start=200)
    hw3("train", mini_recipe, "--run", tmp_path / "run", f"data.dev={dev}")
    hw3("eval", tmp_path / "run")
    chosen = json.loads((tmp_path / "run/eval/dev/results.json").read_text())
    reported = json.loads((tmp_path / "run/eval/eval/results.json").read_text())
    tuned = {entry["checkpoint"]: entry["mean_perplexity"] for entry in chosen["entries"] if entry["checkpoint"]}
    best = min(tuned, key=tuned.__getitem__)
    assert chosen["best"]["checkpoint"] == reported["best"]["checkpoint"] == best
    own = {entry["checkpoint"]: entry["mean_perplexity"] for entry in reported["entries"]}
    assert reported["best"]["mean_perplexity"] == own[best] and reported["best"]["chosen_on"] == "dev.json"


def test_two_files_of_one_name_keep_apart(straight: Path, tmp_path: Path) -> None:
    hw3("eval", straight)
    (tmp_path / "other").mkdir()
    other = write_rows(tmp_path / "other/eval.json", 5, start=300)
    hw3("eval", straight, "--data", other)
    folders = sorted(folder.name for folder in (straight / "eval").iterdir())
    assert len(folders) == 2 and folders[0] == "eval" and folders[1].startswith("eval-")


def test_any_adapter_folder_is_scored_and_a_bad_one_is_named(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight / "checkpoint-8", tmp_path / "theirs")
    for name in ("COMPLETE.json", "trainer_state.json"):
        (tmp_path / "theirs" / name).unlink()
    hw3("eval", straight, "--adapter", tmp_path / "theirs")
    entries = json.loads((straight / "eval/eval/results.json").read_text())["entries"]
    scores = {entry["checkpoint"]: entry["mean_perplexity"] for entry in entries}
    # The same content is the same entry: nothing is scored twice.
    assert len(scores) == 4 and scores["checkpoint-8"] != scores["checkpoint-4"]
    (tmp_path / "theirs/adapter_model.safetensors").write_bytes(b"cut")
    shown, _ = hw3("eval", straight, "--adapter", tmp_path / "theirs")
    assert "cannot be read" in shown and "left out" in shown
    assert "no PEFT adapter" in hw3("eval", straight, "--adapter", tmp_path, expected=2)[1]


def test_checkpoints_trained_under_another_prompt_are_refused(straight: Path) -> None:
    recipe = straight / "recipe.yaml"
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("天地玄黃", "宇宙洪荒"), encoding="utf-8")
    assert "prompt changed since the checkpoints were trained" in hw3("eval", straight, expected=2)[1]
    hw3("eval", straight, "--anyway")


def test_drawn_examples(mini_recipe: Path, straight: Path) -> None:
    hw3("eval", straight, "--base-only", "--shots", "1", "2", "--examples", "train")
    entries = json.loads((straight / "eval/eval/results.json").read_text())["entries"]
    ids = {entry["shots"]: entry["example_ids"] for entry in entries}
    assert ids[2][:1] == ids[1] and ids[2][1].startswith("row-")


def test_shots_make_the_run_folder(mini_recipe: Path, tmp_path: Path) -> None:
    run, examples = tmp_path / "run", "prompt.examples=[{instruction: 甲, output: 乙}, {instruction: 丙, output: 丁}]"
    recipe = tmp_path / "shots.yaml"
    recipe.write_text(load_recipe(mini_recipe, [examples]).to_yaml(), encoding="utf-8")
    hw3("eval", run, "--recipe", recipe, "--base-only", "--shots", "0", "1", "2")
    results = json.loads((run / "eval/eval/results.json").read_text())
    assert [(entry["shots"], entry["checkpoint"]) for entry in results["entries"]] == [(0, None), (1, None), (2, None)]
    assert results["best"] is None
    assert "--shots 3: the prompt has 2 worked examples" in hw3("eval", run, "--shots", "3", expected=2)[1]
    # A folder without a complete checkpoint counts as new.
    hw3("train", recipe, "--run", run)
    assert "no such run" in hw3("eval", tmp_path / "none", expected=2)[1]


def test_check_shows_lengths_and_mask(mini_recipe: Path) -> None:
    shown, _ = hw3("check", mini_recipe, "--mask", "2")
    assert "-<bos>/2 -天/14 -地/15" in shown and "+<eos>/1" in shown and ".<pad>/0" in shown
    assert "12 steps of 8 rows, 2.4 times through the file; one process takes 8 rows x 1" in shown
    _, said = hw3("check", mini_recipe, "--processes", "3", expected=2)
    assert "do not divide among 3 processes" in said
