"""Partial predictions: one file per process, continued by a later call."""

import json
from dataclasses import asdict
from pathlib import Path

from hw3.generation.partial_predictions import PartialPredictions, Prediction, remove_partial_predictions

FIRST = Prediction("1", "甲", finished=True, seconds=0.5)
SECOND = Prediction("2", "乙", finished=False, seconds=0.25)


def write_lines(path: Path, *lines: dict[str, object], incomplete: str = "") -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + incomplete, encoding="utf-8")


def test_open_takes_over_the_files_of_all_processes(tmp_path: Path) -> None:
    own, other = tmp_path / ".base.partial.jsonl", tmp_path / ".base.partial-1.jsonl"
    write_lines(own, {"key": "key"}, asdict(FIRST), incomplete='{"id": "3')
    write_lines(other, {"key": "key"}, asdict(SECOND))
    partial = PartialPredictions.open(tmp_path / "base.json", "key")
    assert partial.path == own and partial.by_id == {"1": FIRST, "2": SECOND}
    key, *predictions = (json.loads(line) for line in own.read_text(encoding="utf-8").splitlines())
    assert key == {"key": "key"} and sorted(line["id"] for line in predictions) == ["1", "2"]
    assert not other.exists()


def test_open_drops_predictions_with_another_key(tmp_path: Path) -> None:
    write_lines(tmp_path / ".base.partial.jsonl", {"key": "old"}, asdict(FIRST))
    partial = PartialPredictions.open(tmp_path / "base.json", "new")
    assert partial.by_id == {} and partial.path.read_text(encoding="utf-8") == '{"key": "new"}\n'


def test_add_saves_a_prediction_at_once(tmp_path: Path) -> None:
    partial = PartialPredictions.open(tmp_path / "base.json", "key")
    with partial.path.open("a", encoding="utf-8") as file:
        partial.add(FIRST, file)
        assert PartialPredictions.open(tmp_path / "base.json", "key").by_id == {"1": FIRST}


def test_remove_partial_predictions_leaves_other_systems(tmp_path: Path) -> None:
    for name in ("base", "base+4"):
        PartialPredictions.open(tmp_path / f"{name}.json", "key")
    remove_partial_predictions(tmp_path / "base.json")
    assert [file.name for file in tmp_path.iterdir()] == [".base+4.partial.jsonl"]


def test_open_drops_damaged_predictions(tmp_path: Path) -> None:
    partial = PartialPredictions.open(tmp_path / "base.json", "key")
    with partial.path.open("a", encoding="utf-8") as file:
        partial.add(FIRST, file)
        partial.add(SECOND, file)
    partial.path.write_text(partial.path.read_text(encoding="utf-8").replace("乙", "乞"), encoding="utf-8")
    assert PartialPredictions.open(tmp_path / "base.json", "key").by_id == {"1": FIRST}
    for damaged in ("[]\n", "[" * 10_000 + "\n", '{"key": "key"}\n{"id": []}\n', '{"key": "key"}\n[]\n'):
        partial.path.write_text(damaged, encoding="utf-8")
        assert PartialPredictions.open(tmp_path / "base.json", "key").by_id == {}
