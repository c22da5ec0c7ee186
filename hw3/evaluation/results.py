"""The scores of a run on one data file, with the scores of every row: `results.json` and `rows.parquet`."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hw3.common.atomic_io import write_atomically
from hw3.common.errors import UserError, first_line
from hw3.common.text import escape_invisible
from hw3.config.schema import BestBy
from hw3.data.fingerprint import DatasetFingerprint
from hw3.evaluation.perplexity import MAX_NLL_PER_TOKEN, RowScore, summarize
from hw3.runs.lock import LOCK_FILE, writing_lock
from hw3.runs.results_file import (
    BestCheckpoint,
    ResultsFile,
    ScoreEntry,
    ScoringSettings,
    finetuned_entries,
    select_best_entry,
)
from hw3.runs.run import RESULTS_FILE, ROWS_FILE

logger = logging.getLogger(__name__)

_ROWS_SCHEMA = pa.schema(
    [
        ("entry", pa.string()),
        ("id", pa.string()),
        ("nll", pa.float64()),
        ("tokens", pa.int64()),
        ("characters", pa.int64()),
        ("perplexity", pa.float64()),
    ]
)


@dataclass
class EvalResults:
    """The scores of a run on one data file.

    Attributes:
        folder: `RUN/eval/<file stem>`.
        run_name: path of the run folder.
        started: when the run began, from its manifest; None before training.
        data: the data file.
        settings: how its rows are scored.
        prompt_sha256: hash of the run's own prompt, under which the best checkpoint is selected.
        best_by: the figure that selects the best checkpoint.
        entries: the entries, in the order of `results.json`.
        row_scores: scores of the rows by the entry's key.
        selector: the results that select the best checkpoint: these, or those on a dev file.
        changed: whether the files were written since loading.
        dropped_keys: keys of entries that `drop_damaged` and `drop_stale` have dropped.
    """

    folder: Path
    run_name: str
    started: str | None
    data: DatasetFingerprint
    settings: ScoringSettings
    prompt_sha256: str
    best_by: BestBy = "mean_perplexity"
    entries: list[ScoreEntry] = field(default_factory=list)
    row_scores: dict[str, list[RowScore]] = field(default_factory=dict)
    selector: EvalResults | None = None
    changed: bool = False
    dropped_keys: set[str] = field(default_factory=set)

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        run_name: str,
        started: str | None,
        data: DatasetFingerprint,
        settings: ScoringSettings,
        prompt_sha256: str,
        best_by: BestBy = "mean_perplexity",
    ) -> EvalResults:
        """Load the entries that are still valid.

        Entries of other rows or settings are dropped, and so are entries of checkpoints from an earlier run in the
        same folder.

        Raises:
            UserError: the files exist but cannot be read.
        """
        results = cls(
            folder=folder,
            run_name=run_name,
            started=started,
            data=data,
            settings=settings,
            prompt_sha256=prompt_sha256,
            best_by=best_by,
        )
        try:
            stored = ResultsFile.read(folder / RESULTS_FILE)
            row_scores = _read_rows(folder)
        except FileNotFoundError:
            return results
        if stored.data.sha256 != data.sha256 or stored.settings != settings:
            return results
        _check_row_counts(folder, stored.entries, row_scores)
        results.row_scores = row_scores
        same_run = stored.started == started
        results._set_entries(
            entry for entry in stored.entries if entry.key in results.row_scores and (same_run or entry.is_base)
        )
        return results

    @classmethod
    def read(
        cls, folder: Path, prompt_sha256: str, started: str | None, best_by: BestBy = "mean_perplexity"
    ) -> EvalResults:
        """Read the files for a command that scores nothing, whatever they were scored with.

        Args:
            folder: `RUN/eval/<file stem>`.
            prompt_sha256: hash of the run's own prompt.
            started: when the run began. Entries of checkpoints from an earlier run are dropped.
            best_by: the figure that selects the best checkpoint.

        Raises:
            UserError: the files cannot be read.
        """
        try:
            stored = ResultsFile.read(folder / RESULTS_FILE)
        except OSError as error:
            raise UserError(f"{folder / RESULTS_FILE}: {error.strerror}; score again: hw3 eval") from error
        return cls.load(
            folder,
            run_name=stored.run,
            started=started,
            data=stored.data,
            settings=stored.settings,
            prompt_sha256=prompt_sha256,
            best_by=best_by,
        )

    def drop_damaged(self) -> None:
        """Drop entries whose main figures do not follow from their rows, so that they are scored again."""
        damaged = []
        for entry in self.entries:
            figures = asdict(summarize(self.row_scores[entry.key]))
            # Another machine's exponential function may round differently.
            if not all(math.isclose(getattr(entry, name), value) for name, value in figures.items()):
                damaged.append(entry.key)
                logger.warning(
                    f"{self.folder / RESULTS_FILE}: the figures of {entry.label} are not those of its rows, so it is "
                    "scored again"
                )
        self._set_entries(entry for entry in self.entries if entry.key not in damaged)
        self.dropped_keys.update(damaged)

    def drop_stale(self, checkpoints: Mapping[str, str]) -> None:
        """Drop entries of checkpoints that have been trained again.

        Args:
            checkpoints: hash by name of the complete checkpoints.
        """
        before = {entry.key for entry in self.entries}
        self._set_entries(
            entry
            for entry in self.entries
            if not entry.is_run_checkpoint
            or entry.checkpoint is None
            or checkpoints.get(entry.checkpoint, entry.adapter_sha256) == entry.adapter_sha256
        )
        self.dropped_keys |= before - {entry.key for entry in self.entries}

    def add(self, entry: ScoreEntry, scores: Sequence[RowScore]) -> None:
        """Add an entry with the scores of its rows, and write both files. Another process may have added it since."""
        if entry.key not in self.row_scores:
            self._insert(entry, scores)
            self.write()

    def _insert(self, entry: ScoreEntry, scores: Sequence[RowScore]) -> None:
        self.entries.append(entry)
        self.entries.sort(key=lambda entry: (entry.prompt.name, entry.shots, entry.step, entry.key))
        self.row_scores[entry.key] = list(scores)

    def select_on(self, other: EvalResults) -> None:
        """Select the best checkpoint by the scores on another file.

        If a checkpoint is selected on the same file that its score is reported on, the score is biased downwards.
        """
        self.selector = other

    def best_entry(self) -> ScoreEntry | None:
        """Return the entry of the best checkpoint on this file; None if there is none."""
        best = select_best_entry((self.selector or self).entries, self.prompt_sha256, self.best_by)
        if best is None:
            return None
        return next(
            (e for e in finetuned_entries(self.entries, self.prompt_sha256) if e.checkpoint == best.checkpoint), None
        )

    def best_checkpoint(self) -> BestCheckpoint | None:
        """Return `best` of `results.json`."""
        entry = self.best_entry()
        if entry is None or entry.checkpoint is None:
            return None
        return BestCheckpoint(
            step=entry.step,
            checkpoint=entry.checkpoint,
            mean_perplexity=entry.mean_perplexity,
            chosen_on=(self.selector or self).data.path,
            chosen_by=self.best_by,
        )

    def read_stored_best(self) -> BestCheckpoint | None:
        """Return `best` as it is in `results.json`."""
        return ResultsFile.read(self.folder / RESULTS_FILE).best

    def write(self) -> None:
        """Write both files, unless they would stay the same. Entries that other processes have added are kept."""
        if not self.entries or self._stored_text() == self._to_json():
            return
        self.changed = True
        self.folder.mkdir(parents=True, exist_ok=True)
        with writing_lock(self.folder / LOCK_FILE):
            self._add_stored_entries()
            # Rows first: an entry without rows is scored again, rows without an entry are never read.
            self._write_rows()
            write_atomically(self.folder / RESULTS_FILE, self._to_json())

    def _to_json(self) -> str:
        results_file = ResultsFile(
            run=self.run_name,
            started=self.started,
            data=self.data,
            settings=self.settings,
            entries=self.entries,
            best=self.best_checkpoint(),
        )
        return results_file.to_json()

    def _stored_text(self) -> str | None:
        path = self.folder / RESULTS_FILE
        return path.read_text(encoding="utf-8") if path.exists() else None

    def _add_stored_entries(self) -> None:
        """Add the entries that another `hw3 eval` has written since these results were loaded."""
        stored = EvalResults.load(
            self.folder,
            run_name=self.run_name,
            started=self.started,
            data=self.data,
            settings=self.settings,
            prompt_sha256=self.prompt_sha256,
        )
        for entry in stored.entries:
            if entry.key not in self.row_scores and entry.key not in self.dropped_keys:
                self._insert(entry, stored.row_scores[entry.key])

    def _write_rows(self) -> None:
        records = [
            (entry.key, score.id, score.nll, score.tokens, score.characters, score.perplexity)
            for entry in self.entries
            for score in self.row_scores[entry.key]
        ]
        columns = [
            arrow_column(column, kind)
            for column, kind in zip(zip(*records, strict=True), _ROWS_SCHEMA.types, strict=True)
        ]
        content = io.BytesIO()
        pq.write_table(pa.Table.from_arrays(columns, schema=_ROWS_SCHEMA), content, write_page_checksum=True)
        write_atomically(self.folder / ROWS_FILE, content.getvalue())

    def _set_entries(self, entries: Iterable[ScoreEntry]) -> None:
        self.entries = list(entries)
        keys = {entry.key for entry in self.entries}
        self.row_scores = {key: scores for key, scores in self.row_scores.items() if key in keys}


def _read_rows(folder: Path) -> dict[str, list[RowScore]]:
    """Read `rows.parquet`; return the scores of the rows by the entry's key.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the file cannot be read, or its checksums, columns or values are wrong.
    """
    try:
        with pq.ParquetFile(folder / ROWS_FILE, page_checksum_verification=True) as file:
            table = file.read()
        records = table.to_pylist()
        _check_rows(table.schema, records)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        problem = escape_invisible(first_line(error))[:200]
        raise UserError(f"{folder / ROWS_FILE}: cannot be read: {problem}; delete the folder to score again") from error
    row_scores: dict[str, list[RowScore]] = {}
    for record in records:
        score = RowScore(record["id"], record["nll"], record["tokens"], record["characters"])
        row_scores.setdefault(record["entry"], []).append(score)
    return row_scores


def _check_rows(schema: pa.Schema, records: Sequence[Mapping[str, Any]]) -> None:
    """Check columns and values; Parquet's checksums do not cover the names of columns.

    Raises:
        ValueError: a column has another name or type, a value is missing, or a row's perplexity is not defined.
    """
    if not schema.equals(_ROWS_SCHEMA):
        found, expected = (", ".join(f"{column.name} {column.type}" for column in s) for s in (schema, _ROWS_SCHEMA))
        raise ValueError(f"columns are {found}; expected {expected}")
    for record in records:
        if None in record.values():
            raise ValueError("a value is missing")
        nll, tokens, characters = record["nll"], record["tokens"], record["characters"]
        if min(tokens, characters) < 1 or not abs(nll) <= MAX_NLL_PER_TOKEN * tokens:  # also for NaN
            raise ValueError(f"row {record['id']} has nll {nll}, {tokens} tokens, {characters} characters")


def _check_row_counts(
    folder: Path, entries: Sequence[ScoreEntry], row_scores: Mapping[str, Sequence[RowScore]]
) -> None:
    """Check that no rows of an entry are missing. An entry without any rows is scored again.

    Raises:
        UserError: some rows of an entry are missing.
    """
    for entry in entries:
        rows = len(row_scores.get(entry.key, ()))
        if 0 < rows < entry.rows:
            raise UserError(
                f"{folder / ROWS_FILE}: has {rows} rows of {entry.label}, expected {entry.rows}; delete the folder to "
                "score again"
            )


def arrow_column(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Build a column as `pa.array` does, without its import of pandas (hundreds of files, to recognize a Series)."""
    if kind == pa.string():
        builder = pa.lib.StringBuilder()
        builder.append_values(values)
        return builder.finish()
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.array(values, kind.to_pandas_dtype()))])
