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

from hw3.errors import UserError
from hw3.files import write_atomically
from hw3.perplexity import RowScore
from hw3.schema import EvaluationSection
from hw3.statistics import paired_difference

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


def print_results(results: Results, against: str | None, settings: EvaluationSection) -> None:
    """The table of all entries, each compared row by row with one of them, and what the best one's mean hangs on.

    Args:
        results: what has been scored.
        against: a checkpoint's name, or `base`; the best checkpoint if None.
        settings: of the bootstrap.

    Raises:
        UserError: no entry is of that name.
    """
    reference = _reference(results, against)
    data, best = results.head["data"], results.best()
    print(f"\n{data['rows']} rows of {data['path']}")
    print(
        f"{'':<16}  {'shots':>5}  {'prompt':<14}  {'mean ppl':>9}  {'95 % interval':>19}  {'token ppl':>9}  "
        f"{'bits/char':>9}"
        + (f"  against {entry_name(reference)}: difference, interval, better/worse" if reference else "")
    )
    for entry in results.entries:
        low, high = entry["mean_perplexity_ci95"]
        compared = ""
        if reference is not None and entry is not reference:
            pair = paired_difference(
                results.rows[reference["key"]],
                results.rows[entry["key"]],
                samples=settings.bootstrap_samples,
                seed=settings.bootstrap_seed,
            )
            compared = "  {:+.3f} [{:+.2f}, {:+.2f}] {}/{}".format(pair.difference, *pair.ci95, pair.better, pair.worse)
        print(
            f"{entry['checkpoint'] or 'base':<16}  {entry['shots']:>5}  {entry['prompt']['name']:<14}  "
            f"{entry['mean_perplexity']:>9.3f}  {f'[{low:.2f}, {high:.2f}]':>19}  {entry['token_perplexity']:>9.3f}  "
            f"{entry['bits_per_character']:>9.3f}{compared}"
        )
    if reference is None:
        return
    print(f"\n{entry_name(reference)} by direction and output length:")
    for name, group in [*reference["by_direction"].items(), *reference["by_length"].items()]:
        name = {"m2c": "modern to Classical", "c2m": "Classical to modern"}.get(name, f"{name} characters")
        print(f"  {name:<20}  {group['mean_perplexity']:>9.3f}  {group['rows']} rows")
    share = sum(row["share"] for row in reference["heaviest"])
    print(f"  its ten heaviest rows are {share:.0%} of the mean, the first {reference['heaviest'][0]['id']}")
    if unknown := reference["unknown_tokens"]:
        tokens = reference["tokens"]
        print(f"  {unknown} of {tokens} output tokens are unknown to the tokenizer ({unknown / tokens:.2%})")
    if best is not None:
        print(
            f"best: {best['checkpoint']}, mean perplexity {best['mean_perplexity']:.3f}, chosen on {best['chosen_on']}"
        )


def _reference(results: Results, against: str | None) -> dict[str, Any] | None:
    if against is None:
        return results.best_entry() or next(iter(results.entries), None)
    for entry in results.entries:
        if entry_name(entry) == against:
            return entry
    names = ", ".join(dict.fromkeys(map(entry_name, results.entries)))
    raise UserError(f"--against {against}: nothing of that name has been scored; there are {names}")


def entry_name(entry: dict[str, Any]) -> str:
    """`base`, `base+4` with four worked examples, `checkpoint-100`."""
    name = entry["checkpoint"] or "base"
    return f"{name}+{entry['shots']}" if entry["shots"] else name
