"""The results of a run on one data file: `results.json` and `rows.parquet`, replaced atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hw3.errors import UserError
from hw3.perplexity import RowScore
from hw3.run_folder import write_json

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
        entries: one a base or checkpoint, shots and prompt, in the order that `results.json` keeps.
        rows: row scores by an entry's key.
        recipe_prompt: hash of the run's own prompt, under which the best checkpoint is chosen.
    """

    folder: Path
    head: dict[str, Any]
    recipe_prompt: str
    entries: list[dict[str, Any]] = field(default_factory=list)
    rows: dict[str, list[RowScore]] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path, head: dict[str, Any], recipe_prompt: str) -> Results:
        """Read what is there. Scores of another content of the data file are left behind.

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
        if stored["data"]["sha256"] != head["data"]["sha256"]:
            return results
        for line in table.to_pylist():
            score = RowScore(line["id"], line["nll"], line["tokens"], line["characters"])
            results.rows.setdefault(line["entry"], []).append(score)
        results.entries = [entry for entry in stored["entries"] if entry["key"] in results.rows]
        return results

    def keys(self) -> set[str]:
        """Keys of the entries scored so far."""
        return {entry["key"] for entry in self.entries}

    def drop_replaced(self, adapters: dict[str, str]) -> None:
        """Forget scores of checkpoints that have since been written anew.

        Args:
            adapters: content hash by checkpoint name, of the complete checkpoints there are now.
        """
        self.entries = [
            entry
            for entry in self.entries
            if adapters.get(entry["checkpoint"], entry["adapter_sha256"]) == entry["adapter_sha256"]
        ]
        keys = self.keys()
        self.rows = {key: rows for key, rows in self.rows.items() if key in keys}

    def add(self, entry: dict[str, Any], scores: Sequence[RowScore]) -> None:
        """Add one entry and replace both files."""
        self.entries.append(entry)
        self.entries.sort(key=lambda entry: (entry["prompt"]["name"], entry["shots"], entry["step"], entry["key"]))
        self.rows[entry["key"]] = list(scores)
        self._write()

    def best(self) -> dict[str, Any] | None:
        """The tuned zero-shot entry under the recipe's prompt with the lowest score, the earliest of equals."""
        tuned = [
            entry
            for entry in self.entries
            if entry["checkpoint"] is not None
            and entry["shots"] == 0
            and entry["prompt"]["sha256"] == self.recipe_prompt
        ]
        if not tuned:
            return None
        best = min(tuned, key=lambda entry: (entry["mean_perplexity"], entry["step"]))
        chosen_on = self.head["data"]["path"]
        return {key: best[key] for key in ("step", "checkpoint", "mean_perplexity")} | {"chosen_on": chosen_on}

    def _write(self) -> None:
        lines = [
            (entry["key"], score.id, score.nll, score.tokens, score.characters, score.perplexity)
            for entry in self.entries
            for score in self.rows[entry["key"]]
        ]
        columns = [
            pa.array(column, type=kind) for column, kind in zip(zip(*lines, strict=True), _SCHEMA.types, strict=True)
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        # Rows first: an entry without rows is scored again, rows without an entry are never read.
        partial = self.folder / f".{ROWS}.{os.getpid()}"
        pq.write_table(pa.Table.from_arrays(columns, schema=_SCHEMA), partial)
        os.replace(partial, self.folder / ROWS)
        write_json(self.folder / RESULTS, self.head | {"entries": self.entries, "best": self.best()})
