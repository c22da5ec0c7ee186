"""docs/study.md: its sentences name values of result files, in both languages, and the outputs that were read exist."""

import json
import string

import yaml
from document_blocks import study
from helpers import REPOSITORY

FOLDER = REPOSITORY / "docs/study"


def read_names(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def test_sentences_name_the_same_values_in_both_languages() -> None:
    sections = yaml.safe_load((FOLDER / "text.yaml").read_text(encoding="utf-8"))
    values = study.compute_values()
    for section, texts in sections.items():
        names = {language: read_names(text) for language, text in texts.items()}
        assert names["en"] == names["zh"] <= values.keys(), section


def test_every_row_that_was_read_has_known_errors_and_an_output() -> None:
    reading = json.loads((FOLDER / "reading.json").read_text(encoding="utf-8"))
    outputs = {row["id"] for row in json.loads((FOLDER / "predictions/best.json").read_text(encoding="utf-8"))}
    assert len(reading["kinds"]) == 20
    assert sum(row_id.endswith("m2c") for row_id in reading["kinds"]) == 10
    assert {*reading["kinds"], *reading["side_by_side"]} <= outputs
    assert {kind for kinds in reading["kinds"].values() for kind in kinds} <= reading["titles"].keys()


def test_published_scores_and_predictions_are_those_of_the_published_run() -> None:
    published = json.loads((REPOSITORY / "docs/tiny/results.json").read_text(encoding="utf-8"))
    results = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    record = json.loads((FOLDER / "predictions/best.quality.json").read_text(encoding="utf-8"))
    best = published["best"]["step"]
    hashes = {entry["step"]: entry["adapter_sha256"] for entry in published["entries"]}
    assert results["best"]["step"] == best
    assert record["adapter_sha256"] == hashes[best]
    assert {entry["adapter_sha256"] for entry in results["entries"] if entry["step"] == best} == {hashes[best]}
