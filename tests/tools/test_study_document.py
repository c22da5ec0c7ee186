"""docs/study.md: its sentences agree with the records in both languages, and the outputs that were read are theirs."""

import json
import string

import pytest
import yaml
from document_blocks import study
from document_blocks.study_values import compute_values, load_study, read_errors
from helpers import REPOSITORY

FOLDER = REPOSITORY / "docs/study"
MAX_BYTES = 2 * 2**20  # of the folder, in every clone of the repository


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def read_fields(sentences: str | list[str]) -> set[str]:
    text = sentences if isinstance(sentences, str) else "\n".join(sentences)
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def test_sentences_name_the_same_values_in_both_languages() -> None:
    sections = yaml.safe_load((FOLDER / "text.yaml").read_text(encoding="utf-8"))
    for name, section in sections.items():
        assert read_fields(section["en"]) == read_fields(section["zh"]), name


def test_sentences_agree_with_the_records() -> None:
    sections = yaml.safe_load((FOLDER / "text.yaml").read_text(encoding="utf-8"))
    for name in sections:
        for language in ("en", "zh"):
            assert "{" not in study.text(name, language)


def test_a_claim_that_does_not_hold_is_reported() -> None:
    values = {"first": {"a b": 4.5}, "second": 5.0, "name": "r 64, alpha/r 4"}
    study.check_claims("section", ["{first[a b]} < {second} < 6", "{name} == r 64, alpha/r 4"], values)
    with pytest.raises(ValueError, match=r"section is no longer true: \{second\} < \{first\[a b\]\} is 5\.0 < 4\.5"):
        study.check_claims("section", ["{second} < {first[a b]}"], values)
    with pytest.raises(ValueError, match="no longer true"):
        study.check_claims("section", ["{first[a b]} < {second} < 5"], values)


def test_outputs_that_were_read_are_predictions_of_the_study() -> None:
    errors = read_errors()
    for model, rows in errors["outputs"].items():
        predicted = load_study().predictions(model)["best"]["outputs"]
        assert {row_id: row["output"] for row_id, row in rows.items()} == {row_id: predicted[row_id] for row_id in rows}
        assert len(rows) == 20
        assert sum(row_id.endswith("m2c") for row_id in rows) == 10
        assert {kind for row in rows.values() for kind in row["kinds"]} <= errors["kinds"].keys()


def test_only_rows_of_this_repository_are_quoted() -> None:
    sample = {row["id"] for row in json.loads((REPOSITORY / "data/eval.json").read_text(encoding="utf-8"))}
    for model in load_study().models:
        for run in load_study().select(model.name):
            for name, predictions in run.get("predictions", {}).items():
                assert predictions.get("outputs", {}).keys() <= sample, name


def test_grid_counts_every_other_setting_once() -> None:
    for model in ("tiny", "smollm2"):
        settings = compute_values()[model]["settings"]
        assert settings["worse"] + settings["better"] + settings["similar"] == settings["others"]
        assert settings["others"] == settings["count"] - 1


def test_published_records_and_pictures_stay_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < MAX_BYTES
