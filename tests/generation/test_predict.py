"""Answers of the small model, a few steps tuned: files, resuming, what is chosen, lines and mistakes."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import ENVIRONMENT, REPOSITORY, hw3

from hw3.data.rows import read_rows
from hw3.evaluation.selection import choose_checkpoint
from hw3.generation.generator import Answerer
from hw3.generation.interactive import lines_are_meant, one_file
from hw3.runs.open_run import recipe_of


@pytest.fixture(scope="module", autouse=True)
def in_repository() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of the tiny recipe, scored and with answers to twelve rows."""
    folder = tmp_path_factory.mktemp("predict")
    rows = json.loads((REPOSITORY / "data/eval.json").read_text(encoding="utf-8"))[:12]
    (folder / "twelve.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    settings = ["training.max_steps=10", "training.save_steps=5", f"data.eval={folder / 'twelve.json'}"]
    hw3("train", "recipes/tiny/qlora.yaml", "--run", folder / "run", *settings)
    assert "the last: none is scored yet" in choose_checkpoint(folder / "run", recipe_of(folder / "run"), "best")[1]
    hw3("eval", folder / "run")
    return folder


@pytest.fixture(scope="module")
def said(trained: Path) -> str:
    """What the first call printed."""
    return hw3("predict", trained / "run")[0]


@pytest.fixture
def run(trained: Path, said: str, tmp_path: Path) -> Path:
    """A copy to change."""
    return shutil.copytree(trained / "run", tmp_path / "run")


def load(file: Path) -> object:
    return json.loads(file.read_text(encoding="utf-8"))


def best(run: Path) -> str:
    return load(run / "eval/twelve/results.json")["best"]["checkpoint"]


def test_answers_in_input_order_with_their_quality(trained: Path, said: str) -> None:
    rows, name = read_rows(trained / "twelve.json"), best(trained / "run")
    folder = trained / "run/predictions/twelve"
    assert sorted(file.name for file in folder.iterdir()) == [f"{name}.json", f"{name}.quality.json"]
    text = (folder / f"{name}.json").read_text(encoding="utf-8")
    answers = json.loads(text)
    assert text == json.dumps(answers, ensure_ascii=False, indent=2) + "\n"
    assert [list(answer) for answer in answers] == [["id", "output"]] * 12
    assert [answer["id"] for answer in answers] == [row.id for row in rows]
    record = load(folder / f"{name}.quality.json")
    sha256 = hashlib.sha256((trained / "twelve.json").read_bytes()).hexdigest()
    assert record["data"] == {"path": "twelve.json", "sha256": sha256, "rows": 12}
    assert (record["schema"], record["name"], record["checkpoint"], record["shots"]) == (1, name, name, 0)
    assert record["prompt"]["name"] == "study" and len(record["adapter_sha256"]) == 64
    assert record["generation"]["do_sample"] is False and record["generation"]["eos_token_id"] == [1]
    least, most = record["generation"]["max_new_tokens"]
    assert 32 <= least < most <= 172
    assert record["predictions_sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert {name: figures["rows"] for name, figures in record["groups"].items()} == {"all": 12, "m2c": 6, "c2m": 6}
    assert record["copy_input"]["all"]["copy_rate"] == 1.0
    assert record["groups"]["all"]["unfinished"] == len(record["unfinished_ids"]) / 12
    assert f"{name}, the best of those scored" in said and "greedy, at most" in said
    assert "BLEU" in said and said.endswith(f"{name}.json: 12 answers of {name}\n")


def test_a_second_call_makes_nothing_again(run: Path) -> None:
    files = sorted((run / "predictions/twelve").iterdir())
    before = [(file.read_bytes(), file.stat().st_mtime_ns) for file in files]
    shown, _ = hw3("predict", run, "--output", run / "answers.json")
    assert "is there already" in shown and "BLEU" in shown
    assert [(file.read_bytes(), file.stat().st_mtime_ns) for file in files] == before
    assert (run / "answers.json").read_bytes() == files[0].read_bytes()


def test_new_references_are_compared_without_new_answers(trained: Path, run: Path, tmp_path: Path) -> None:
    answers = {answer["id"]: answer["output"] for answer in load(run / f"predictions/twelve/{best(run)}.json")}
    rows = [row | {"output": answers[row["id"]] or "無"} for row in load(trained / "twelve.json")]
    (tmp_path / "twelve.json").write_text(json.dumps(rows), encoding="utf-8")
    shutil.rmtree(run / "eval")
    (run / "predictions/twelve").rename(run / "predictions/moved")
    shown, _ = hw3("predict", run, tmp_path / "twelve.json", "--checkpoint", best(trained / "run"))
    assert "is there already" not in shown  # another file of that name
    record = load(run / f"predictions/twelve/{best(trained / 'run')}.quality.json")
    assert record["groups"]["all"]["exact_match"] == 1.0


def test_kept_answers_are_not_made_again(run: Path) -> None:
    """A call was killed: two answers are there, one that no model would give, and half a line."""
    name = best(run)
    folder = run / "predictions/twelve"
    wanted, key = load(folder / f"{name}.json"), load(folder / f"{name}.quality.json")["key"]
    (folder / f"{name}.json").unlink()
    partial = folder / f".{name}.partial.jsonl"

    def kept(key: str) -> str:
        first = {"id": wanted[3]["id"], "output": "留", "finished": True, "seconds": 1.0}
        second = {"id": wanted[0]["id"], "output": wanted[0]["output"], "finished": True, "seconds": 1.0}
        return "".join(json.dumps(line) + "\n" for line in ({"key": key}, first, second)) + '{"id": "'

    partial.write_text(kept(key), encoding="utf-8")
    shown, _ = hw3("predict", run)
    assert "12 rows of" in shown and "2 done before" in shown and not partial.exists()
    assert load(folder / f"{name}.json") == [*wanted[:3], {"id": wanted[3]["id"], "output": "留"}, *wanted[4:]]
    assert load(folder / f"{name}.quality.json")["seconds"] > 2
    # Of another key, and edited by hand: neither is taken over.
    partial.write_text(kept("0" * 16), encoding="utf-8")
    (folder / f"{name}.json").write_text("[]", encoding="utf-8")
    assert "done before" not in hw3("predict", run)[0]
    assert load(folder / f"{name}.json") == wanted


def test_ctrl_c_keeps_what_is_done(run: Path, tmp_path: Path) -> None:
    rows = [row | {"id": f"{row['id']}-{n}"} for n in range(20) for row in load(REPOSITORY / "data/eval.json")]
    file = tmp_path / "many.json"
    file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    partial = run / f"predictions/many/.{best(run)}.partial.jsonl"

    def press() -> None:
        while not partial.exists() or partial.read_text(encoding="utf-8").count("\n") < 4:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press, daemon=True)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # training in this process has left its own
    try:
        presser.start()
        shown, _ = hw3("predict", run, file, expected=130)
    finally:
        signal.signal(signal.SIGINT, before)
    presser.join()
    lines = partial.read_text(encoding="utf-8").splitlines()
    assert 4 <= len(lines) < len(rows) and not partial.with_name(f"{best(run)}.json").exists()
    assert f"stopped: {len(lines) - 1} of {len(rows)} answers kept; the same command goes on" in shown


def test_rows_without_outputs(trained: Path, run: Path, tmp_path: Path) -> None:
    rows = [{"id": row["id"], "instruction": row["instruction"]} for row in load(trained / "twelve.json")]
    (tmp_path / "private.json").write_text(json.dumps(rows), encoding="utf-8")
    shown, _ = hw3("predict", run, "--output", tmp_path / "new/prediction.json", tmp_path / "private.json")
    assert "BLEU" not in shown
    answers = load(tmp_path / "new/prediction.json")
    assert answers == load(run / f"predictions/twelve/{best(run)}.json")
    record = load(run / f"predictions/private/{best(run)}.quality.json")
    assert record["groups"] == {} == record["copy_input"]


def test_the_base_worked_examples_and_ways_to_generate(run: Path) -> None:
    settings = ["generation.max_new_tokens=5", "generation.num_beams=2"]
    shown, _ = hw3("predict", run, "--checkpoint", "base", "--shots", "1", *settings)
    assert "base, without an adapter" in shown and "num_beams 2, at most 5 new tokens" in shown
    record = load(run / "predictions/twelve/base+1.quality.json")
    assert (record["checkpoint"], record["adapter_sha256"], record["shots"]) == (None, None, 1)
    assert record["generation"]["max_new_tokens"] == 5 and record["generation"]["num_beams"] == 2
    assert record["groups"]["all"]["unfinished"] > 0.5
    assert all(len(answer["output"]) <= 5 for answer in load(run / "predictions/twelve/base+1.json"))


def test_another_file_of_the_same_name_has_a_folder_of_its_own(trained: Path, run: Path, tmp_path: Path) -> None:
    other = tmp_path / "twelve.json"
    other.write_text(json.dumps(load(trained / "twelve.json")[:2]), encoding="utf-8")
    hw3("predict", run, other)
    digest = hashlib.sha256(other.read_bytes()).hexdigest()[:8]
    assert len(load(run / f"predictions/twelve-{digest}/{best(run)}.json")) == 2


def test_which_checkpoint(run: Path, tmp_path: Path) -> None:
    def chosen(name: str) -> tuple[str | None, str]:
        checkpoint, line = choose_checkpoint(run, recipe_of(run), name)
        return checkpoint and checkpoint.name, line

    assert chosen("base") == (None, "base, without an adapter")
    assert chosen("last") == ("checkpoint-10", "checkpoint-10, the last of 2")
    assert chosen("checkpoint-5")[0] == chosen(str(run / "checkpoint-5"))[0] == "checkpoint-5"
    shutil.copytree(run / "checkpoint-5", tmp_path / "elsewhere")
    other = Answerer.of(run, [], str(tmp_path / "elsewhere"), 1, False)
    assert other.checkpoint.name == "elsewhere" and other.name == f"elsewhere-{other.checkpoint.sha256[:8]}+1"
    results = load(run / "eval/twelve/results.json")
    assert chosen("best")[0] == results["best"]["checkpoint"]
    # A best one that has been trained anew since is the best no longer.
    for entry in results["entries"]:
        entry["adapter_sha256"] = "0" * 64
    (run / "eval/twelve/results.json").write_text(json.dumps(results), encoding="utf-8")
    assert chosen("best")[0] == "checkpoint-10"


def test_one_text_and_lines(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, err = hw3("predict", run, "--text", "今日無雨。", "--direction", "c2m")
    assert plain.endswith("\n") and plain.count("\n") == 1 and len(plain) > 2
    assert "the best of those scored" in err  # answers alone on standard output
    assert hw3("predict", run, "--text", "今日無雨。\n翻譯成現代文：")[0] == plain
    assert hw3("predict", run, "--text", "今日無雨。", "--template", "{x}\\n翻譯成現代文：")[0] == plain
    back = hw3("predict", run, "--text", "今天沒有下雨。", "--direction", "m2c")[0]
    assert back == hw3("predict", run, "--text", "今天沒有下雨。\n翻譯成文言文：")[0]
    monkeypatch.setattr("sys.stdin", io.StringIO("今日無雨。\n\n今日無雨。\n"))
    shown, _ = hw3("predict", run, "-", "--direction", "c2m")
    assert shown == f"{plain}\n{plain}"


def test_lines_that_are_piped_in(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They need no more than the run's name."""
    ours, kept = os.pipe(), os.dup(0)
    os.write(ours[1], "今日無雨。\n翻譯成現代文：\n".encode())
    os.close(ours[1])
    os.dup2(ours[0], 0)
    try:
        with open(ours[0], encoding="utf-8") as lines:
            monkeypatch.setattr("sys.stdin", lines)
            assert hw3("predict", run)[0].count("\n") == 2
            assert "standard input: no line came" in hw3("predict", run, expected=2)[1]
    finally:
        os.dup2(kept, 0)
        os.close(kept)


def test_a_terminal_shows_a_sign(run: Path) -> None:
    main, terminal = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "hw3", "predict", str(run), "--direction", "c2m"],
        stdin=terminal, stdout=terminal, stderr=subprocess.DEVNULL,
        env=ENVIRONMENT | {"TERM": "dumb"}, cwd=REPOSITORY,
    ) as process:  # fmt: skip
        os.close(terminal)
        shown = b""
        while b"> " not in shown:
            shown += os.read(main, 1000)
        os.write(main, "今日無雨。\n".encode())
        while shown.count(b"> ") < 2:
            shown += os.read(main, 1000)
        os.write(main, b"\x04")
        assert process.wait(timeout=60) == 0
    lines = shown.decode().replace("\r", "").split("\n")
    assert lines[0] == "> 今日無雨。" and len(lines) == 3 and lines[2].startswith("> ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing.json"], "nothing.json: no such file"),
        (
            ["--checkpoint", "checkpoint-11"],
            "no complete checkpoint checkpoint-11; there are checkpoint-5, checkpoint-1",
        ),
        (["--checkpoint", "docs"], "docs: no PEFT adapter: adapter_config.json and adapter_model.safetensors missing"),
        (["--shots", "5"], "--shots 5: the prompt has 4 worked examples; give a number from 0 to that"),
        (["--shots", "-1"], "--shots -1: the prompt has 4 worked examples"),
        (["--output", "docs"], "docs: is a folder; give a file's name"),
        (["training.seed=1"], "training.seed=1: only generation.key=value may be set here"),
        (["generation.num_beam=1"], "generation.num_beam: no such key; did you mean num_beams?"),
        (["a.json", "b.json"], "a.json, b.json: one file at a time"),
        (["--text", "甲", "--template", "翻譯"], "--template '翻譯': must hold {x}, where the text goes, exactly once"),
        (["--text", " "], "--text: is empty"),
        (["--text", "甲\udce4"], "--text: not UTF-8 text"),
        (["--text", "甲", "data/eval.json"], "data/eval.json: its rows are worded already"),
        (["--text", "甲", "--output", "x.json"], "--output is for a file's rows"),
    ],
)
def test_mistakes_write_nothing(run: Path, words: list[str], message: str) -> None:
    before = sorted(run.rglob("*"))
    assert message in hw3("predict", run, *words, expected=2)[1]
    assert sorted(run.rglob("*")) == before


def test_a_run_that_has_changed_or_cannot_be_used(run: Path, tmp_path: Path) -> None:
    assert "no such run; train it first" in hw3("predict", tmp_path / "none", expected=2)[1]
    recipe = (run / "recipe.yaml").read_text(encoding="utf-8")
    (run / "recipe.yaml").write_text(recipe.replace("train: data/train.json", "train: gone.json"), encoding="utf-8")
    assert "Without them give a limit: generation.max_new_tokens=512" in hw3("predict", run, expected=2)[1]
    (run / "recipe.yaml").write_text(recipe.replace("ASSISTANT：", "答："), encoding="utf-8")
    assert "prompt changed since the checkpoints were trained" in hw3("predict", run, expected=2)[1]
    assert hw3("predict", run, "--anyway", "generation.max_new_tokens=2")[0]


def test_what_a_call_is_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none = {"text": None, "direction": None, "template": None}
    assert lines_are_meant(Path("-"), None, **none)
    assert lines_are_meant(None, None, **none | {"direction": "m2c"})
    assert not lines_are_meant(Path("rows.json"), None, **none)
    assert not lines_are_meant(None, Path("out.json"), **none)
    assert one_file(["a.json", "generation.num_beams=2"]) == (Path("a.json"), ["generation.num_beams=2"])
    assert one_file(["-"]) == (Path("-"), [])
    (tmp_path / "a=b.json").touch()
    assert one_file([str(tmp_path / "a=b.json")]) == (tmp_path / "a=b.json", [])
