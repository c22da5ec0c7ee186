"""`hw3 verify`: an intact run, and one problem of each kind."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import REPOSITORY, hw3


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture
def scored_run(finished_run: Path) -> Path:
    hw3("eval", finished_run)
    hw3("predict", finished_run, "--checkpoint", "checkpoint-8")
    return finished_run


def flip_bit(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def edit_json(file: Path, *keys: str | int, factor: float) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    part = content
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] *= factor
    file.write_text(json.dumps(content), encoding="utf-8")


def test_verify_finds_each_kind_of_problem(scored_run: Path, tmp_path: Path) -> None:
    """The problems are made one after the other, so each call reports those before as well."""
    stdout, stderr = hw3("verify", scored_run)
    lines = stdout.splitlines()
    assert lines[0] == "checkpoints: the checksums of 3 compared"
    assert lines[1] == "data files: 2 of 2 compared with the manifest"
    assert lines[2] == "predictions: the checksums of 1 files compared"
    assert lines[3].endswith("eval/eval: the figures of 4 entries computed again from their rows")
    assert lines[4].endswith("10 rows scored again; the largest difference of a perplexity is 0")
    assert lines[5] == f"{scored_run}: intact" and stderr == ""

    results = scored_run / "eval/eval/results.json"
    edit_json(results, "entries", 1, "mean_perplexity", factor=0.9)
    _, stderr = hw3("verify", scored_run, expected=1)
    assert "checkpoint-4, prompt" in stderr and "mean_perplexity is " in stderr and ", but the rows give " in stderr

    (predictions,) = scored_run.glob("predictions/*/checkpoint-8.json")
    predictions.write_text(predictions.read_text(encoding="utf-8").replace("\n", " \n"), encoding="utf-8")
    flip_bit(scored_run / "checkpoint-12/optimizer.pt")
    flip_bit(scored_run / "checkpoint-4/trainer_state.json")
    rows = tmp_path / "train.json"
    rows.write_text(rows.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    stdout, stderr = hw3("verify", scored_run, expected=1)
    assert f"{predictions}: edited since it was generated" in stderr
    assert "checkpoint-12/optimizer.pt: does not have its recorded checksum" in stderr
    assert "checkpoint-4/trainer_state.json: does not have its recorded checksum" in stderr
    assert "train.json: has changed since the run began" in stderr
    assert stdout.splitlines()[-1] == f"{scored_run}: {len(stderr.splitlines())} problems, listed above"


def test_verify_finds_scores_that_the_checkpoint_does_not_have(scored_run: Path) -> None:
    """One row's log-likelihood is edited in `rows.parquet`, and `results.json` is made to agree."""
    file = scored_run / "eval/eval/rows.parquet"
    table = pq.read_table(file)
    records = table.to_pylist()
    for record in records:
        record["nll"] *= 1.01
        record["perplexity"] **= 1.01
    pq.write_table(pa.Table.from_pylist(records, schema=table.schema), file)
    _, stderr = hw3("verify", scored_run, expected=1)
    assert "has another perplexity than the saved one, by " in stderr


def test_verify_needs_a_run(tmp_path: Path) -> None:
    _, stderr = hw3("verify", tmp_path, expected=2)
    assert "no such run" in stderr
