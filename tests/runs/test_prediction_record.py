"""The JSON form of metrics of predictions."""

import json
from pathlib import Path

import pytest

from hw3.common.errors import UserError
from hw3.data.fingerprint import DatasetFingerprint
from hw3.data.rows import Row
from hw3.evaluation.translation_metrics import metrics_of_copying
from hw3.runs.prediction_record import PredictionRecord
from hw3.runs.results_file import PromptReference


def make_record() -> PredictionRecord:
    copying = metrics_of_copying([Row("a", "今天下雨。\n翻譯成文言文：", "今日雨。")])
    return PredictionRecord(
        key="key",
        run="run",
        data=DatasetFingerprint(path="eval.json", sha256="eval hash", rows=1),
        name="checkpoint-4",
        checkpoint="checkpoint-4",
        adapter_sha256="abc",
        shots=0,
        prompt=PromptReference(name="own", sha256="own"),
        generation={"do_sample": False, "eos_token_id": [1]},
        seconds=1.5,
        rows_per_second=0.667,
        unfinished_ids=["a"],
        predictions_sha256="predictions hash",
        groups=copying,
        copy_input=copying,
    )


def test_prediction_record_is_equal_after_writing_and_reading(tmp_path: Path) -> None:
    record = make_record()
    record.write(tmp_path / "record.json")
    read = PredictionRecord.read(tmp_path / "record.json")
    assert read == record and read.to_json() == record.to_json()
    stored = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    assert stored["schema"] == 1
    assert set(stored["groups"]) == {"all", "m2c"}
    assert list(stored["groups"]["m2c"]) == [
        "rows", "bleu", "chrf", "exact_match", "copy_rate", "length_ratio", "unfinished",
    ]  # fmt: skip


def test_prediction_record_refuses_an_unknown_metric(tmp_path: Path) -> None:
    stored = json.loads(make_record().to_json())
    stored["groups"]["all"]["ter"] = 1.0
    (tmp_path / "record.json").write_text(json.dumps(stored), encoding="utf-8")
    with pytest.raises(UserError, match=r"groups\.all\.ter: Unexpected keyword argument"):
        PredictionRecord.read(tmp_path / "record.json")
