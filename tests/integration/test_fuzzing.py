"""Any file that a user may give, or damage, is read or refused with one message: no other exception, nothing changed.

`--hypothesis-profile long` tries twenty times as many files, and refuses what takes longer than five seconds.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import REPOSITORY, save_adapter
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from tiny_models import build_llama

from hw3.common.errors import UserError
from hw3.config.recipe import load_recipe
from hw3.corpus.tables import read_table
from hw3.data.rows import read_rows
from hw3.modeling.adapter_io import InvalidAdapterError
from hw3.modeling.adapter_slot import AdapterSlot
from hw3.runs.checkpoints import CheckpointRecord
from hw3.runs.file_model import FileModel
from hw3.runs.manifest import Manifest
from hw3.runs.prediction_record import PredictionRecord, read_outputs
from hw3.runs.results_file import ResultsFile

TEXT = st.text(max_size=8) | st.sampled_from(["", "\0", "\r", '"', "\x1b[31m", "\u2028", "{instruction}", "1e999"])
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -1, 0, 2**63, math.nan, math.inf])
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
JSON_TEXTS = st.sampled_from(
    ["", "[", "[]", "{}", "null", "[" * 20_000, '{"a":' * 20_000, f'{{"step": {"9" * 5_000}}}']
)
RECIPE = REPOSITORY / "recipes/tiny/qlora.yaml"
LIBRARY_FIELDS = json.loads((REPOSITORY / "hw3/config/library_fields.json").read_text(encoding="utf-8"))
SECTIONS = {"training": "SFTConfig", "lora": "LoraConfig"}
KEYS = [f"{section}.{field}" for section, name in SECTIONS.items() for field in LIBRARY_FIELDS[name]]
KEYS += [
    "quantization.bnb_4bit_quant_type",
    "generation.num_beams",
    "model.dtype",
    "data.max_length",
    "data.train",
    "prompt.turn",
    "prompt.examples",
    "speed",
    "evaluation",
    "x",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzzing")


@given(st.lists(st.dictionaries(st.sampled_from(["id", "instruction", "output", "x"]), TEXT | JSON_VALUES), max_size=3))
def test_rows_are_read_unchanged_or_refused(folder: Path, records: list[dict[str, Any]]) -> None:
    path = folder / "rows.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    try:
        rows = read_rows(path)
    except UserError:
        return
    expected = [(record["id"], record["instruction"], record["output"]) for record in records]
    assert [(row.id, row.instruction, row.output) for row in rows] == expected


@given(st.binary(max_size=60) | JSON_TEXTS.map(str.encode), st.sampled_from(["json", "jsonl", "csv", "tsv"]))
def test_any_file_of_rows_is_read_or_refused(folder: Path, content: bytes, suffix: str) -> None:
    path = folder / f"any.{suffix}"
    path.write_bytes(content)
    for read in (read_rows, read_table):
        with contextlib.suppress(UserError):
            read(path)


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
def test_csv_fields_are_read_unchanged(folder: Path, cells: list[tuple[str, str]]) -> None:
    path = folder / "table.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("old", "new"), *cells])
    try:
        table = read_table(path)
    except UserError:
        assert any("\0" in text for row in cells for text in row)
        return
    assert [tuple(values.values()) for _, values in table.rows] == cells


@given(st.sampled_from(KEYS), JSON_VALUES)
def test_any_override_is_refused_or_reads_back(folder: Path, key: str, value: Any) -> None:
    try:
        recipe = load_recipe(RECIPE, [f"{key}={json.dumps(value)}"])
    except UserError:
        return
    path = folder / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(path).to_yaml() == recipe.to_yaml()


@given(
    st.sampled_from([CheckpointRecord, Manifest, ResultsFile, PredictionRecord]),
    JSON_TEXTS | JSON_VALUES.map(json.dumps),
)
def test_any_stored_file_is_refused(folder: Path, model: type[FileModel], text: str) -> None:
    path = folder / "stored.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"stored\.json: cannot be read: .*; delete the file"):
        model.read(path)


@given(JSON_TEXTS | JSON_VALUES.map(json.dumps))
def test_any_file_of_predictions_is_read_or_refused(folder: Path, text: str) -> None:
    path = folder / "predictions.json"
    path.write_text(text, encoding="utf-8")
    try:
        assert read_outputs(path) == {}
    except UserError as error:
        assert len(error.problems) == 1


@pytest.fixture(scope="module")
def slot() -> AdapterSlot:
    return AdapterSlot(build_llama(), build_llama)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["q_proj"])
    return save_adapter(build_llama(), tmp_path_factory.mktemp("adapter"), config)


@given(st.data())
def test_any_adapter_is_loaded_or_refused(folder: Path, adapter: Path, slot: AdapterSlot, data: st.DataObject) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    changes = data.draw(st.dictionaries(st.sampled_from(sorted(settings)), JSON_VALUES, max_size=2))
    text = data.draw(st.just(json.dumps(settings | changes)) | JSON_TEXTS)
    copy = folder / "adapter"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(adapter, copy)
    (copy / "adapter_config.json").write_text(text, encoding="utf-8")
    with contextlib.suppress(InvalidAdapterError):
        slot.load(copy)
    slot.load(adapter)  # what was refused has left nothing behind
