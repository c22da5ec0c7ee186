"""`predictions/<file stem>/<checkpoint>.quality.json`: how predictions were made, and their metrics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from hw3.common.errors import UserError
from hw3.data.fingerprint import DatasetFingerprint
from hw3.runs.file_model import FileModel, describe_validation_error
from hw3.runs.results_file import PromptReference


@dataclass(frozen=True, slots=True)
class TranslationMetrics:
    """Metrics of a group of predictions.

    Attributes:
        rows: number of rows.
        bleu: character BLEU-4 of the group as one corpus, 0-100 (Papineni et al., 2002; sacrebleu, `tokenize="char"`,
            because Chinese text has no spaces between words; exponential smoothing).
        chrf: chrF2 of the group as one corpus, 0-100 (Popovic, 2015; sacrebleu).
        exact_match: share of predictions equal to the reference.
        copy_rate: share of predictions equal to the sentence to translate.
        length_ratio: characters of the predictions divided by characters of the references.
        unfinished: share of predictions cut at `max_new_tokens`.
    """

    rows: int
    bleu: float
    chrf: float
    exact_match: float
    copy_rate: float
    length_ratio: float
    unfinished: float


class PredictionRecord(FileModel):
    """How the predictions of one file were made, and their metrics.

    Attributes:
        key: hash of everything that the predictions depend on.
        run: path of the run folder.
        data: the file of rows.
        name: file name of the predictions: `base`, `base+4`, `checkpoint-100`.
        checkpoint: folder name of a checkpoint of the run, path of another adapter, None for the base model.
        adapter_sha256: hash of the checkpoint's weights; None for the base model.
        shots: number of few-shot examples.
        prompt: the prompt.
        generation: the recipe's `generation` section, with the limits and stop ids that were used.
        seconds: time to generate.
        rows_per_second: rows generated per second.
        unfinished_ids: ids of predictions cut at their limit.
        predictions_sha256: hash of the file of predictions.
        groups: metrics by group: `all`, `m2c`, `c2m`; empty without references.
        copy_input: metrics of copying the input, by group.
    """

    key: str
    schema_version: Literal[1] = Field(1, alias="schema")
    run: str
    data: DatasetFingerprint
    name: str
    checkpoint: str | None
    adapter_sha256: str | None
    shots: int
    prompt: PromptReference
    generation: dict[str, Any]
    seconds: float
    rows_per_second: float
    unfinished_ids: list[str]
    predictions_sha256: str
    groups: dict[str, TranslationMetrics]
    copy_input: dict[str, TranslationMetrics]


class _Prediction(FileModel):
    id: str
    output: str


_PREDICTIONS = TypeAdapter(list[_Prediction])


def read_outputs(predictions_path: Path) -> dict[str, str]:
    """Read a file of predictions; return the outputs by row id.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return {row.id: row.output for row in _PREDICTIONS.validate_json(predictions_path.read_bytes())}
    except ValidationError as error:
        problem = describe_validation_error(error)
        raise UserError(f"{predictions_path}: {problem}; delete it and run hw3 predict again") from error
