"""`hw3 predict` with a model that was trained for a few steps: files, interruption, checkpoints and mistakes."""

import hashlib
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import REPOSITORY, hw3

from hw3.common.errors import UserError
from hw3.data.rows import read_rows
from hw3.generation.predict import predict_run
from hw3.runs.run import Run

pytestmark = pytest.mark.usefixtures("in_repository")


def load(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_predict_writes_outputs_in_input_order_with_their_metrics(
    trained: Path, first_output: tuple[str, str], best: str
) -> None:
    rows = read_rows(trained / "twelve.json")
    folder = trained / "run/predictions/twelve"
    assert sorted(file.name for file in folder.iterdir()) == [f"{best}.json", f"{best}.quality.json"]
    text = (folder / f"{best}.json").read_text(encoding="utf-8")
    predictions = json.loads(text)
    assert text == json.dumps(predictions, ensure_ascii=False, indent=2) + "\n"
    assert [list(prediction) for prediction in predictions] == [["id", "output"]] * 12
    assert [prediction["id"] for prediction in predictions] == [row.id for row in rows]
    record = load(folder / f"{best}.quality.json")
    assert record["data"] == {
        "path": "twelve.json",
        "sha256": sha256((trained / "twelve.json").read_bytes()),
        "rows": 12,
    }
    assert (record["schema"], record["name"], record["checkpoint"], record["shots"]) == (1, best, best, 0)
    assert record["prompt"]["name"] == "study" and len(record["adapter_sha256"]) == 64
    assert record["generation"]["do_sample"] is False and record["generation"]["eos_token_id"] == [1]
    low, high = record["generation"]["max_new_tokens"]
    assert 32 <= low < high <= 172
    assert record["predictions_sha256"] == sha256(text.encode())
    assert {name: metrics["rows"] for name, metrics in record["groups"].items()} == {"all": 12, "m2c": 6, "c2m": 6}
    assert record["copy_input"]["all"]["copy_rate"] == 1.0
    assert record["groups"]["all"]["unfinished"] == len(record["unfinished_ids"]) / 12
    stdout, stderr = first_output
    assert f"{best}, the best of those scored" in stderr and "greedy, at most" in stderr
    assert "BLEU" in stdout and stdout.endswith(f"{best}.json: 12 predictions of {best}\n")
    (stored,) = Run(trained / "run").read_prediction_records()
    assert stored[0] == folder / f"{best}.json" and json.loads(stored[1].to_json()) == record


def test_predict_leaves_complete_predictions_unchanged(run: Path) -> None:
    files = sorted((run / "predictions/twelve").iterdir())
    before = [(file.read_bytes(), file.stat().st_mtime_ns) for file in files]
    stdout, stderr = hw3("predict", run, "--output", run / "outputs.json")
    assert "already complete" in stderr and "BLEU" in stdout
    assert [(file.read_bytes(), file.stat().st_mtime_ns) for file in files] == before
    assert (run / "outputs.json").read_bytes() == files[0].read_bytes()


def test_predict_compares_with_the_references_of_the_input_file(
    trained: Path, run: Path, tmp_path: Path, best: str
) -> None:
    outputs = {row["id"]: row["output"] for row in load(run / f"predictions/twelve/{best}.json")}
    rows = [row | {"output": outputs[row["id"]] or "無"} for row in load(trained / "twelve.json")]
    (tmp_path / "twelve.json").write_text(json.dumps(rows), encoding="utf-8")
    shutil.rmtree(run / "eval")
    (run / "predictions/twelve").rename(run / "predictions/moved")
    _, notices = hw3("predict", run, tmp_path / "twelve.json", "--checkpoint", best)
    assert "already complete" not in notices
    record = load(run / f"predictions/twelve/{best}.quality.json")
    assert record["groups"]["all"]["exact_match"] == 1.0


def test_predict_continues_partial_predictions(run: Path, best: str) -> None:
    """A call was killed: two predictions are saved, one that no model would generate, and an incomplete line."""
    folder = run / "predictions/twelve"
    expected, key = load(folder / f"{best}.json"), load(folder / f"{best}.quality.json")["key"]
    (folder / f"{best}.json").unlink()
    partial = folder / f".{best}.partial.jsonl"

    def partial_file(key: str) -> str:
        first = {"id": expected[3]["id"], "output": "留", "finished": True, "seconds": 1.0}
        second = {"id": expected[0]["id"], "output": expected[0]["output"], "finished": True, "seconds": 1.0}
        return "".join(json.dumps(line) + "\n" for line in ({"key": key}, first, second)) + '{"id": "'

    partial.write_text(partial_file(key), encoding="utf-8")
    _, notices = hw3("predict", run)
    assert "12 rows of" in notices and "2 already predicted" in notices and not partial.exists()
    assert load(folder / f"{best}.json") == [*expected[:3], {"id": expected[3]["id"], "output": "留"}, *expected[4:]]
    assert load(folder / f"{best}.quality.json")["seconds"] > 2
    # Partial predictions with another key, and predictions that were edited, are generated again.
    partial.write_text(partial_file("0" * 16), encoding="utf-8")
    (folder / f"{best}.json").write_text("[]", encoding="utf-8")
    assert "already predicted" not in hw3("predict", run)[1]
    assert load(folder / f"{best}.json") == expected


def test_predict_saves_finished_predictions_on_ctrl_c(run: Path, tmp_path: Path, best: str) -> None:
    rows = [row | {"id": f"{row['id']}-{n}"} for n in range(20) for row in load(REPOSITORY / "data/eval.json")]
    file = tmp_path / "many.json"
    file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    partial = run / f"predictions/many/.{best}.partial.jsonl"

    def interrupt_after_three_predictions() -> None:
        while not partial.exists() or partial.read_text(encoding="utf-8").count("\n") < 4:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    interrupter = threading.Thread(target=interrupt_after_three_predictions, daemon=True)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # training in this process installed another one
    try:
        interrupter.start()
        _, notices = hw3("predict", run, file, expected=130)
    finally:
        signal.signal(signal.SIGINT, before)
    interrupter.join()
    lines = partial.read_text(encoding="utf-8").splitlines()
    assert 4 <= len(lines) < len(rows) and not partial.with_name(f"{best}.json").exists()
    saved = len(lines) - 1
    assert f"stopped: {saved} of {len(rows)} predictions are saved; run the same command to continue" in notices


def test_predict_accepts_rows_without_outputs(trained: Path, run: Path, tmp_path: Path, best: str) -> None:
    rows = [{"id": row["id"], "instruction": row["instruction"]} for row in load(trained / "twelve.json")]
    (tmp_path / "private.json").write_text(json.dumps(rows), encoding="utf-8")
    shown, _ = hw3("predict", run, "--output", tmp_path / "new/prediction.json", tmp_path / "private.json")
    assert "BLEU" not in shown
    assert load(tmp_path / "new/prediction.json") == load(run / f"predictions/twelve/{best}.json")
    record = load(run / f"predictions/private/{best}.quality.json")
    assert record["groups"] == {} == record["copy_input"]


def test_predict_with_the_base_model_few_shot_examples_and_beams(run: Path) -> None:
    settings = ["generation.max_new_tokens=5", "generation.num_beams=2"]
    _, notices = hw3("predict", run, "--checkpoint", "base", "--shots", "1", *settings)
    assert "base, without an adapter" in notices and "num_beams 2, at most 5 new tokens" in notices
    record = load(run / "predictions/twelve/base+1.quality.json")
    assert (record["checkpoint"], record["adapter_sha256"], record["shots"]) == (None, None, 1)
    assert record["generation"]["max_new_tokens"] == 5 and record["generation"]["num_beams"] == 2
    assert record["groups"]["all"]["unfinished"] > 0.5
    assert all(len(row["output"]) <= 5 for row in load(run / "predictions/twelve/base+1.json"))


def test_predict_gives_another_file_of_the_same_name_its_own_folder(
    trained: Path, run: Path, tmp_path: Path, best: str
) -> None:
    other = tmp_path / "twelve.json"
    other.write_text(json.dumps(load(trained / "twelve.json")[:2]), encoding="utf-8")
    hw3("predict", run, other)
    assert len(load(run / f"predictions/twelve-{sha256(other.read_bytes())[:8]}/{best}.json")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.json"], "nothing.json: no such file"),
        (
            ["--checkpoint", "checkpoint-11"],
            "no complete checkpoint checkpoint-11; there are checkpoint-5, checkpoint-1",
        ),
        (
            ["--checkpoint", "docs"],
            "docs: not a PEFT adapter: adapter_config.json and adapter_model.safetensors missing",
        ),
        (["--shots", "5"], "--shots 5: the prompt has 4 few-shot examples; give a number from 0 to 4"),
        (["--shots", "-1"], "--shots -1: the prompt has 4 few-shot examples"),
        (["--output", "docs"], "--output docs: is a folder; give the name of a file"),
        (["training.seed=1"], "training.seed=1: only generation.key=value may be set here"),
        (["generation.num_beam=1"], "generation.num_beam: no such key; did you mean num_beams?"),
        (["a.json", "b.json"], "a.json, b.json: several input files; give one file per call"),
        (
            ["--text", "甲", "--template", "翻譯"],
            "--template '翻譯': found {x} 0 times; it must stand exactly once, where the text goes",
        ),
        (["--text", " "], "--text: is empty"),
        (["--text", "甲\udce4"], "--text: not UTF-8 text"),
        (["--text", "甲", "data/eval.json"], "data/eval.json: its rows are complete instructions"),
        (["--text", "甲", "--output", "x.json"], "--output is for a file of rows"),
    ],
)
def test_predict_with_a_wrong_argument_writes_nothing(run: Path, arguments: list[str], message: str) -> None:
    before = sorted(run.rglob("*"))
    assert message in hw3("predict", run, *arguments, expected=2)[1]
    assert sorted(run.rglob("*")) == before


def test_predict_refuses_a_run_that_has_changed(run: Path, tmp_path: Path) -> None:
    assert "no such run; train it first" in hw3("predict", tmp_path / "none", expected=2)[1]
    recipe = (run / "recipe.yaml").read_text(encoding="utf-8")
    (run / "recipe.yaml").write_text(recipe.replace("train: data/train.json", "train: gone.json"), encoding="utf-8")
    assert "or give a limit: generation.max_new_tokens=512" in hw3("predict", run, expected=2)[1]
    (run / "recipe.yaml").write_text(recipe.replace("ASSISTANT：", "答："), encoding="utf-8")
    assert "prompt changed since the checkpoints were trained" in hw3("predict", run, expected=2)[1]
    assert hw3("predict", run, "--allow-mismatch", "generation.max_new_tokens=2")[0]


@pytest.mark.parametrize("output", ["rows.json", "link.json", "run/recipe.yaml", "run/manifest.json", "pipe"])
def test_predict_refuses_an_output_that_would_replace_something_else(run: Path, trained: Path, output: str) -> None:
    folder = run.parent
    shutil.copyfile(trained / "twelve.json", folder / "rows.json")
    (folder / "link.json").symlink_to("rows.json")
    os.mkfifo(folder / "pipe")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hw3("predict", run, folder / "rows.json", "--output", folder / output, expected=2)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    with pytest.raises(UserError, match=f"--output {folder / output}: "):
        predict_run(Run(run), folder / "rows.json", output=folder / output)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
