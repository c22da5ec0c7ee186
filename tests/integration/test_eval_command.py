"""`hw3 eval` as a user runs it: what is scored, what is saved, and what is refused."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from helpers import ENVIRONMENT, REPOSITORY, hw3, write_rows

from hw3.config.recipe import load_recipe
from hw3.runs.checkpoints import find_complete_checkpoints

# Runs `hw3` and kills the process when the third entry has been scored but not yet written.
KILLED_WHILE_SCORING = """
import os, signal, sys
from hw3.evaluation.results import EvalResults
add = EvalResults.add
def kill_self(self, entry, scores):
    if len(self.entries) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, entry, scores)
EvalResults.add = kill_self
from hw3.cli import main
main(sys.argv[1:])
"""


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def test_eval_refuses_a_recipe_without_base_only(mini_recipe: Path, finished_run: Path) -> None:
    _, stderr = hw3("eval", finished_run, "--recipe", mini_recipe, expected=2)
    assert f"--recipe {mini_recipe}: --recipe needs --base-only" in stderr


def test_eval_scores_only_what_is_new(mini_recipe: Path, tmp_path: Path, finished_run: Path) -> None:
    shutil.copytree(finished_run / "checkpoint-12", finished_run / "checkpoint-13")
    (finished_run / "checkpoint-13/COMPLETE.json").rename(finished_run / "checkpoint-13/.incomplete")
    _, stderr = hw3("eval", finished_run)
    assert "checkpoint-13: incomplete, skipped" in stderr
    folder = finished_run / "eval/eval"
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
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
    hw3("eval", finished_run)
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()} == before

    hw3("train", mini_recipe, "--run", finished_run, "training.max_steps=16")
    assert "1 of 5 entries to score" in hw3("eval", finished_run)[1]
    before = (folder / "results.json").read_bytes()
    stdout, _ = hw3("eval", finished_run, "--shots", "0", "0", "--baseline", "base")
    assert (folder / "results.json").read_bytes() == before
    assert "compared with base: difference, interval, better/worse" in stdout
    assert "no entry with this name" in hw3("eval", finished_run, "--baseline", "checkpoint-5", expected=2)[1]


def test_eval_drops_the_scores_of_an_earlier_run_in_the_folder(mini_recipe: Path, finished_run: Path) -> None:
    hw3("eval", finished_run)
    for checkpoint in find_complete_checkpoints(finished_run):
        shutil.rmtree(checkpoint.path)
    hw3("train", mini_recipe, "--run", finished_run, "training.max_steps=4", "training.learning_rate=0.001")
    _, stderr = hw3("eval", finished_run)
    assert "1 of 2 entries to score" in stderr
    results = json.loads((finished_run / "eval/eval/results.json").read_text(encoding="utf-8"))
    assert [entry["checkpoint"] for entry in results["entries"]] == [None, "checkpoint-4"]


def test_killed_eval_scores_only_the_unfinished_entries_again(finished_run: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    shutil.copytree(finished_run, killed)
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SCORING, "eval", str(killed)], capture_output=True, env=ENVIRONMENT,
        cwd=REPOSITORY,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    saved = json.loads((killed / "eval/eval/results.json").read_text(encoding="utf-8"))["entries"]
    assert [entry["checkpoint"] for entry in saved] == [None, "checkpoint-4"]
    _, stderr = hw3("eval", killed)
    assert "2 of 4 entries to score" in stderr
    hw3("eval", finished_run)
    results = [
        json.loads((run / "eval/eval/results.json").read_text(encoding="utf-8")) for run in (killed, finished_run)
    ]
    for result in results:
        del result["run"]
        for entry in result["entries"]:
            del entry["seconds"]
    assert results[0] == results[1] and results[0]["entries"][:2] == [
        {key: value for key, value in entry.items() if key != "seconds"} for entry in saved
    ]


def test_eval_ranks_all_prompts_of_the_base_model_before_training(
    mini_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "recipes/prompts"
    prompts.mkdir(parents=True)
    for name in ("bare", "zh_short", "chat_template"):
        shutil.copy(REPOSITORY / f"recipes/prompts/{name}.yaml", prompts)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(load_recipe(mini_recipe, ["prompt=recipes/prompts/study.yaml"]).to_yaml(), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    options = ["--recipe", recipe, "--checkpoint", "base", "--shots", "0", "1"]
    stdout, stderr = hw3("eval", "run", *options, "--prompt", "all")
    assert stderr.count("skipped prompts: chat_template: prompt.chat_template: the tokenizer of ") == 1
    assert "6 of 8 entries to score" in stderr
    entries = json.loads(Path("run/eval/eval/results.json").read_text(encoding="utf-8"))["entries"]
    ranked = sorted(entries, key=lambda entry: entry["mean_perplexity"])
    lines = [line.split() for line in stdout.splitlines()[3:-1]]
    assert [line[:4] for line in lines] == [
        [entry["prompt"]["name"], str(entry["shots"]), "base", f"{entry['mean_perplexity']:.3f}"] for entry in ranked
    ]
    assert {entry["prompt"]["name"] for entry in entries} == {"bare", "zh_short", "recipe"}
    assert f"compared with {ranked[0]['prompt']['name']}" in stdout
    assert all(entry["prompt_tokens"] > 10 * entry["rows"] for entry in entries)
    assert "has no chat template" in hw3("eval", "run", *options, "--prompt", "chat_template", expected=2)[1]
    assert "; did you mean zh_short?" in hw3("eval", "run", *options, "--prompt", "zhshort", expected=2)[1]


def test_eval_scores_only_the_named_checkpoint(finished_run: Path) -> None:
    hw3("eval", finished_run, "--checkpoint", "checkpoint-8")
    _, stderr = hw3("eval", finished_run, "--checkpoint", "best", "--prompt", "bare")
    assert "checkpoint: checkpoint-8, the best of those scored" in stderr
    entries = json.loads((finished_run / "eval/eval/results.json").read_text(encoding="utf-8"))["entries"]
    assert [(entry["checkpoint"], entry["prompt"]["name"]) for entry in entries] == [
        (None, "bare"), ("checkpoint-8", "bare"), (None, "recipe"), ("checkpoint-8", "recipe"),
    ]  # fmt: skip
    assert (
        "no complete checkpoint checkpoint-5"
        in hw3("eval", finished_run, "--checkpoint", "checkpoint-5", expected=2)[1]
    )


def test_eval_compares_prompts(finished_run: Path) -> None:
    prompts = [REPOSITORY / f"recipes/prompts/{name}.yaml" for name in ("bare", "course_default")]
    hw3("eval", finished_run, "--base-only", "--prompt", *prompts)
    entries = json.loads((finished_run / "eval/eval/results.json").read_text(encoding="utf-8"))["entries"]
    assert [entry["prompt"]["name"] for entry in entries] == ["bare", "course_default", "recipe"]
    assert len({entry["mean_perplexity"] for entry in entries}) == 3
    _, stderr = hw3("eval", finished_run, "--base-only", "--prompt", *prompts)
    assert "to score" not in stderr


def test_best_checkpoint_is_selected_on_dev_and_reported_on_eval(mini_recipe: Path, tmp_path: Path) -> None:
    dev = write_rows(tmp_path / "dev.json", 6, start=200)
    hw3("train", mini_recipe, "--run", tmp_path / "run", f"data.dev={dev}")
    hw3("eval", tmp_path / "run")
    chosen = json.loads((tmp_path / "run/eval/dev/results.json").read_text(encoding="utf-8"))
    reported = json.loads((tmp_path / "run/eval/eval/results.json").read_text(encoding="utf-8"))
    by_checkpoint = {
        entry["checkpoint"]: entry["mean_perplexity"] for entry in chosen["entries"] if entry["checkpoint"]
    }
    best = min(by_checkpoint, key=by_checkpoint.__getitem__)
    assert chosen["best"]["checkpoint"] == reported["best"]["checkpoint"] == best
    own = {entry["checkpoint"]: entry["mean_perplexity"] for entry in reported["entries"]}
    assert reported["best"]["mean_perplexity"] == own[best] and reported["best"]["chosen_on"] == "dev.json"


def test_data_files_of_the_same_name_have_separate_results(finished_run: Path, tmp_path: Path) -> None:
    hw3("eval", finished_run)
    (tmp_path / "other").mkdir()
    other = write_rows(tmp_path / "other/eval.json", 5, start=300)
    hw3("eval", finished_run, "--data", other)
    folders = sorted(folder.name for folder in (finished_run / "eval").iterdir())
    assert len(folders) == 2 and folders[0] == "eval" and folders[1].startswith("eval-")


def test_eval_scores_other_adapter_folders_and_skips_invalid_ones(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run / "checkpoint-8", tmp_path / "theirs")
    for name in ("COMPLETE.json", "trainer_state.json"):
        (tmp_path / "theirs" / name).unlink()
    hw3("eval", finished_run, "--adapter", tmp_path / "theirs")
    entries = json.loads((finished_run / "eval/eval/results.json").read_text(encoding="utf-8"))["entries"]
    scores = {entry["checkpoint"]: entry["mean_perplexity"] for entry in entries}
    # An adapter with the same content is the same entry and is not scored twice.
    assert len(scores) == 4 and scores["checkpoint-8"] != scores["checkpoint-4"]
    (tmp_path / "theirs/adapter_model.safetensors").write_bytes(b"cut")
    _, stderr = hw3("eval", finished_run, "--adapter", tmp_path / "theirs", expected=1)
    assert "cannot be read" in stderr and "skipped" in stderr
    assert "not a PEFT adapter" in hw3("eval", finished_run, "--adapter", tmp_path, expected=2)[1]


def test_eval_refuses_checkpoints_trained_with_another_prompt(finished_run: Path) -> None:
    recipe = finished_run / "recipe.yaml"
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("天地玄黃", "宇宙洪荒"), encoding="utf-8")
    assert "prompt changed since the checkpoints were trained" in hw3("eval", finished_run, expected=2)[1]
    hw3("eval", finished_run, "--allow-mismatch")


def test_sampled_few_shot_examples_are_nested(mini_recipe: Path, finished_run: Path) -> None:
    hw3("eval", finished_run, "--base-only", "--shots", "1", "2", "--examples", "train")
    entries = json.loads((finished_run / "eval/eval/results.json").read_text(encoding="utf-8"))["entries"]
    ids = {entry["shots"]: entry["example_ids"] for entry in entries}
    assert ids[2][:1] == ids[1] and ids[2][1].startswith("row-")


def test_eval_of_the_base_model_creates_the_run_folder(mini_recipe: Path, tmp_path: Path) -> None:
    run, examples = tmp_path / "run", "prompt.examples=[{instruction: 甲, output: 乙}, {instruction: 丙, output: 丁}]"
    recipe = tmp_path / "shots.yaml"
    recipe.write_text(load_recipe(mini_recipe, [examples]).to_yaml(), encoding="utf-8")
    hw3("eval", run, "--recipe", recipe, "--base-only", "--shots", "0", "1", "2")
    results = json.loads((run / "eval/eval/results.json").read_text(encoding="utf-8"))
    assert [(entry["shots"], entry["checkpoint"]) for entry in results["entries"]] == [(0, None), (1, None), (2, None)]
    assert results["best"] is None
    assert "--shots 3: the prompt has 2 few-shot examples" in hw3("eval", run, "--shots", "3", expected=2)[1]
    # A folder without a complete checkpoint counts as new.
    hw3("train", recipe, "--run", run)
    assert "no such run" in hw3("eval", tmp_path / "none", expected=2)[1]


def test_evals_at_the_same_time_keep_all_entries(finished_run: Path) -> None:
    command = [sys.executable, "-m", "hw3", "eval", str(finished_run)]
    prompts = [["--base-only", "--prompt", f"recipes/prompts/{name}.yaml"] for name in ("bare", "course_default")]
    processes = [
        subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, env=ENVIRONMENT, cwd=REPOSITORY)
        for options in ([], *prompts)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    entries = json.loads((finished_run / "eval/eval/results.json").read_text(encoding="utf-8"))["entries"]
    assert sorted(entry["step"] for entry in entries) == [0, 0, 0, 4, 8, 12]
    assert {entry["prompt"]["name"] for entry in entries} >= {"bare", "course_default"}
    assert len(pq.read_table(finished_run / "eval/eval/rows.parquet")) == 60
