"""The results of a run on one data file: `results.json` and `rows.parquet`, replaced atomically; the printed tables."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hw3.common.atomic_io import write_atomically
from hw3.common.errors import UserError
from hw3.evaluation.perplexity import RowScore

RESULTS = "results.json"
ROWS = "rows.parquet"
_SCHEMA = pa.schema(
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
class Results:
    """What has been scored of a run on one data file.

    Attributes:
        folder: `RUN/eval/<file stem>`.
        head: `schema`, `run`, `data`, `settings`.
        recipe_prompt: hash of the run's own prompt, under which the best checkpoint is chosen.
        entries: one a base or checkpoint, shots and prompt, in the order that `results.json` keeps.
        rows: row scores by an entry's key.
        chosen_on: the results that choose the best checkpoint, these or a dev file's.
        changed: whether anything has been written since loading.
    """

    folder: Path
    head: dict[str, Any]
    recipe_prompt: str
    entries: list[dict[str, Any]] = field(default_factory=list)
    rows: dict[str, list[RowScore]] = field(default_factory=dict)
    chosen_on: Results | None = None
    changed: bool = False

    @classmethod
    def load(cls, folder: Path, head: dict[str, Any], recipe_prompt: str) -> Results:
        """Read what is there. Scores of other rows, another base, or an earlier run in the folder are left behind.

        Raises:
            UserError: the files are there but cannot be read.
        """
        results = cls(folder, head, recipe_prompt)
        try:
            stored = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
            table = pq.read_table(folder / ROWS, schema=_SCHEMA)
        except FileNotFoundError:
            return results
        except (ValueError, pa.ArrowException) as error:
            raise UserError(f"{folder}: cannot be read ({error}); delete the folder to score again") from error
        if stored["data"]["sha256"] != head["data"]["sha256"] or stored["settings"] != head["settings"]:
            return results
        for line in table.to_pylist():
            score = RowScore(line["id"], line["nll"], line["tokens"], line["characters"])
            results.rows.setdefault(line["entry"], []).append(score)
        same_run = stored["started"] == head["started"]
        results._keep(
            [
                entry
                for entry in stored["entries"]
                if entry["key"] in results.rows and (same_run or entry["checkpoint"] is None)
            ]
        )
        return results

    @classmethod
    def read(cls, folder: Path, recipe_prompt: str, started: str | None) -> Results:
        """The files as they stand, for commands that score nothing.

        Args:
            folder: `RUN/eval/<file stem>`.
            recipe_prompt: hash of the run's own prompt.
            started: when the run began, by its manifest; scores of checkpoints of an earlier one are left behind.

        Raises:
            UserError: they cannot be read.
        """
        try:
            stored = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
            head = {key: stored[key] for key in ("schema", "run", "data", "settings")} | {"started": started}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / RESULTS}: cannot be read ({error}); score again: hw3 eval") from error
        return cls.load(folder, head, recipe_prompt)

    def _keep(self, entries: list[dict[str, Any]]) -> None:
        self.entries = entries
        keys = {entry["key"] for entry in entries}
        self.rows = {key: rows for key, rows in self.rows.items() if key in keys}

    def drop_replaced(self, adapters: dict[str, str]) -> None:
        """Forget scores of checkpoints that have since been written anew.

        Args:
            adapters: content hash by checkpoint name, of the complete checkpoints there are now.
        """
        self._keep(
            [
                entry
                for entry in self.entries
                if adapters.get(entry["checkpoint"], entry["adapter_sha256"]) == entry["adapter_sha256"]
            ]
        )

    def add(self, entry: dict[str, Any], scores: Sequence[RowScore]) -> None:
        """Add one entry and replace both files."""
        self.entries.append(entry)
        self.entries.sort(key=lambda entry: (entry["prompt"]["name"], entry["shots"], entry["step"], entry["key"]))
        self.rows[entry["key"]] = list(scores)
        self.write()

    def choose_on(self, other: Results) -> None:
        """Let another file's scores choose the best checkpoint, since choosing and reporting on one file flatters."""
        self.chosen_on = other

    def best_entry(self) -> dict[str, Any] | None:
        """The run's tuned zero-shot entry under its own prompt with the lowest score, the earliest of equals."""
        chooser = self if self.chosen_on is None else self.chosen_on
        tuned = chooser._tuned()
        if not tuned:
            return None
        best = min(tuned, key=lambda entry: (entry["mean_perplexity"], entry["step"]))
        return next((entry for entry in self._tuned() if entry["checkpoint"] == best["checkpoint"]), None)

    def _tuned(self) -> list[dict[str, Any]]:
        return [
            entry
            for entry in self.entries
            if (entry["checkpoint"] or "").startswith("checkpoint-")
            and entry["shots"] == 0
            and entry["prompt"]["sha256"] == self.recipe_prompt
        ]

    def best(self) -> dict[str, Any] | None:
        """`best` of `results.json`."""
        entry = self.best_entry()
        if entry is None:
            return None
        chooser = self if self.chosen_on is None else self.chosen_on
        return {key: entry[key] for key in ("step", "checkpoint", "mean_perplexity")} | {
            "chosen_on": chooser.head["data"]["path"]
        }

    def write(self) -> None:
        """Replace both files, if they would change."""
        if not self.entries:
            return
        values = self.head | {"entries": self.entries, "best": self.best()}
        text = json.dumps(values, ensure_ascii=False, indent=2) + "\n"
        file = self.folder / RESULTS
        if file.exists() and file.read_text(encoding="utf-8") == text:
            return
        self.changed = True
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [
            (entry["key"], score.id, score.nll, score.tokens, score.characters, score.perplexity)
            for entry in self.entries
            for score in self.rows[entry["key"]]
        ]
        columns = [_column(column, kind) for column, kind in zip(zip(*lines, strict=True), _SCHEMA.types, strict=True)]
        # Rows first: an entry without rows is scored again, rows without an entry are never read.
        partial = self.folder / f".{ROWS}.{os.getpid()}"
        pq.write_table(pa.Table.from_arrays(columns, schema=_SCHEMA), partial)
        os.replace(partial, self.folder / ROWS)
        write_atomically(file, text)


def _column(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """As `pa.array`, which would import pandas, hundreds of files, to ask whether the values are one of its series."""
    if kind == pa.string():
        builder = pa.lib.StringBuilder()
        builder.append_values(values)
        return builder.finish()
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.array(values, kind.to_pandas_dtype()))])


def entry_name(entry: dict[str, Any]) -> str:
    """`base`, `base+4` with four worked examples, `checkpoint-100`."""
    name = entry["checkpoint"] or "base"
    return f"{name}+{entry['shots']}" if entry["shots"] else name
