"""`hw3 compare`: answers of base, checkpoints and models side by side, from the files that predict and eval wrote."""

from __future__ import annotations

import itertools
import json
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from hw3.common.errors import UserError
from hw3.common.hashing import file_sha256
from hw3.data.rows import Row, read_rows
from hw3.data.templates import match
from hw3.evaluation.results import RESULTS, ROWS
from hw3.evaluation.translation_metrics import EXPLAINED, shown
from hw3.generation.predict import QUALITY
from hw3.runs.checkpoints import complete_checkpoints
from hw3.runs.open_run import recipe_of
from hw3.runs.run_dir import RECIPE, portable

# The row whose two answers the study prints.
STUDY_ROW = "87945a20-f869-4be9-b586-f5ce20ddd78b"
# Around what differs: colours on a terminal, brackets elsewhere.
COLOURS = ("\033[1;31m", "\033[0m")
BRACKETS = ("【", "】")


@dataclass(frozen=True, slots=True)
class Answers:
    """One run's base or checkpoint on one file.

    Attributes:
        run: the run folder.
        name: `base`, `base+4`, `checkpoint-100`.
        texts: answers by row id.
        quality: their record, as predict wrote it.
        perplexities: of the references by row id; empty where they have not been scored.
        mean_perplexity: the mean of those.
    """

    run: Path
    name: str
    texts: Mapping[str, str]
    quality: Mapping[str, Any]
    perplexities: Mapping[str, float]
    mean_perplexity: float | None


def compare_runs(
    names: Sequence[str],
    *,
    ids: Sequence[str] = (),
    data: Path | None = None,
    most: int = 10,
    colour: bool | None = None,
) -> int:
    """Print answers side by side: those that differ most from one another first, or the rows asked for.

    Args:
        names: run folders, for all their answers, or `RUN/base`, `RUN/checkpoint-100` for one.
        ids: the rows to print; if empty, sorted by disagreement.
        data: the file of rows; the one that all have answered if None.
        most: how many rows to print without `ids`; 0 for all.
        colour: mark what differs in colour; if None, on a terminal.

    Returns:
        0.

    Raises:
        UserError: a run or its answers are missing, with the command that makes them; a row is not in the file.
    """
    if most < 0:
        raise UserError(f"--rows {most}: give how many rows to show, 0 for all")
    asked = [_asked(name) for name in names]
    path = _data_file(asked, data)
    rows = {row.id: row for row in read_rows(path, need_output=False)}
    unknown = [id for id in ids if id not in rows]
    if unknown:
        raise UserError(*(f"--id {id}: no such row in {path}" for id in unknown))
    columns = _unique(column for run, name in asked for column in _answers(run, name, path))
    labels = _labels(columns)
    print(f"{len(rows)} rows of {path}")
    _print_figures(columns, labels)
    disagreement = {id: disagreement_of([column.texts[id] for column in columns], row) for id, row in rows.items()}
    chosen = list(ids) or sorted(rows, key=lambda id: -disagreement[id])[: most or None]
    if not ids and len(dict.fromkeys(column.run for column in columns)) > 1 and STUDY_ROW in rows:
        chosen = list(dict.fromkeys([STUDY_ROW, *chosen]))
    marks = COLOURS if (sys.stdout.isatty() if colour is None else colour) else BRACKETS
    for id in chosen:
        note = ", the study's own row" if id == STUDY_ROW else ""
        print(f"\n{id}  disagreement {disagreement[id]:.2f}{note}")
        print("\n".join(side_by_side(rows[id], columns, labels, marks)))
    if not ids and len(chosen) < len(rows):
        print(f"\n{len(chosen)} of {len(rows)} rows, those that differ most first; --rows 0 shows all, --id one")
    return 0


def disagreement_of(texts: Sequence[str], row: Row) -> float:
    """How much answers to one row differ: 1 less the share of characters in common, 0 alike and 1 wholly different.

    The mean over pairs of answers; of a single answer, how much it differs from the reference.
    """
    if len(texts) == 1:
        texts = [*texts, texts[0] if row.output is None else row.output]
    pairs = list(itertools.combinations(texts, 2))
    return sum(1 - SequenceMatcher(None, a, b, autojunk=False).ratio() for a, b in pairs) / len(pairs)


def mark(text: str, other: str, marks: tuple[str, str]) -> str:
    """A text with what it does not share with another between marks; nothing of it can act on a terminal."""
    before, after = marks
    blocks = SequenceMatcher(None, other, text, autojunk=False).get_matching_blocks()
    pieces, end = [], 0
    for block in blocks:
        if block.b > end:
            pieces.append(f"{before}{harmless(text[end : block.b])}{after}")
        pieces.append(harmless(text[block.b : block.b + block.size]))
        end = block.b + block.size
    return "".join(pieces)


def harmless(text: str) -> str:
    """Line ends as ⏎; control and formatting characters, which could move the cursor or turn text around, as codes."""
    return "".join(
        "⏎" if character == "\n" else f"\\u{ord(character):04x}" if _acts(character) else character
        for character in text
    )


def _acts(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def side_by_side(row: Row, columns: Sequence[Answers], labels: Sequence[str], marks: tuple[str, str]) -> list[str]:
    """Lines of one row: the input, the reference, and every answer, marked where it differs from the reference.

    Without a reference answers are marked where they differ from the first.
    """
    width = max(len("reference"), *map(len, labels))
    found = match(row.instruction)
    ways = {"m2c": "to Classical", "c2m": "to modern"}
    lines = [f"  {'input':<{width}}  {'':>9}  {harmless(found[1] if found else row.instruction)}"]
    if found:
        lines[0] += f"  ({ways[found[0].direction]})"
    against = row.output
    if against is not None:
        lines.append(f"  {'reference':<{width}}  {'':>9}  {harmless(against)}")
    for column, label in zip(columns, labels, strict=True):
        perplexity = column.perplexities.get(row.id)
        text = column.texts[row.id]
        against = text if against is None else against
        figure = "" if perplexity is None else f"ppl {perplexity:.2f}"
        lines.append(f"  {label:<{width}}  {figure:>9}  {mark(text, against, marks) or '(nothing)'}")
    return lines


def _asked(name: str) -> tuple[Path, str | None]:
    """A run folder, and the one of its answers that is meant, if it is one."""
    path = Path(name)
    if (path / RECIPE).is_file():
        return path, None
    if (path.parent / RECIPE).is_file():
        return path.parent, path.name
    raise UserError(f"{name}: no such run; give a run folder, or one with /base or /checkpoint-100 behind it")


def _records(run: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Every file of answers of a run with its record."""
    files = sorted(run.glob(f"predictions/*/*{QUALITY}"))
    found = [(file.with_name(file.name.removesuffix(QUALITY) + ".json"), _read(file)) for file in files]
    return [(file, record) for file, record in found if file.exists()]


def _data_file(asked: Sequence[tuple[Path, str | None]], data: Path | None) -> Path:
    """The file of rows to compare on: the one given, or the one that all runs have answered.

    Raises:
        UserError: there is none, or several and the first run's `data.eval` is not among them.
    """
    if data is not None:
        return data
    eval_file = Path(recipe_of(asked[0][0]).data.eval)
    answered = [
        {record["data"]["sha256"]: record["data"]["path"] for _, record in _records(run)}
        for run in dict.fromkeys(run for run, _ in asked)
    ]
    common = {sha256: path for sha256, path in answered[0].items() if all(sha256 in other for other in answered[1:])}
    if not common or (eval_file.is_file() and file_sha256(eval_file) in common):
        return eval_file
    paths = sorted({Path(path) for path in common.values()})
    if len(paths) == 1 and paths[0].is_file() and file_sha256(paths[0]) in common:
        return paths[0]
    raise UserError(f"answers are there to {', '.join(map(str, paths))}; say which file: --data FILE")


def _answers(run: Path, name: str | None, path: Path) -> list[Answers]:
    """All of a run's answers to a file, or those of one name.

    Raises:
        UserError: there are none, or the checkpoint has been trained anew since; with the command that makes them.
    """
    sha256 = file_sha256(path) if path.is_file() else None
    found = [
        (file, record)
        for file, record in _records(run)
        if record["data"]["sha256"] == sha256 and name in (None, record["name"])
    ]
    options = ""
    if name is not None:
        checkpoint, _, shots = name.partition("+")
        options = f" --checkpoint {checkpoint}" + (f" --shots {shots}" if shots else "")
    if not found:
        raise UserError(
            f"{run}: no answers{f' of {name}' if name else ''} to {path} yet: hw3 predict {run} {path}{options}"
        )
    now = {checkpoint.name: checkpoint.sha256 for checkpoint in complete_checkpoints(run)}
    columns = []
    for file, record in sorted(found, key=lambda pair: _order(pair[1]["name"])):
        own = record["name"].partition("+")[0]  # an adapter from elsewhere is never called like one of the run's
        if now.get(own, record["adapter_sha256"]) != record["adapter_sha256"]:
            raise UserError(
                f"{portable(file)}: {record['checkpoint']} has been trained anew since: hw3 predict {run} {path} "
                f"--checkpoint {record['checkpoint']}"
            )
        if file_sha256(file) != record["predictions_sha256"]:
            raise UserError(f"{portable(file)}: changed since it was made: hw3 predict {run} {path}{options}")
        texts = {answer["id"]: answer["output"] for answer in _read(file)}
        columns.append(Answers(run, record["name"], texts, record, *_perplexities(run, record)))
    return columns


def _order(name: str) -> tuple[bool, int, str]:
    """The base first, then checkpoints by step."""
    digits = "".join(filter(str.isdigit, name.partition("+")[0]))
    return not name.startswith("base"), int(digits or 0), name


def _perplexities(run: Path, record: Mapping[str, Any]) -> tuple[dict[str, float], float | None]:
    """Row perplexities of the same rows under the same weights and prompt, and their mean."""
    for file in sorted(run.glob(f"eval/*/{RESULTS}")):
        results = _read(file)
        if results["data"]["sha256"] != record["data"]["sha256"]:
            continue
        for entry in results["entries"]:
            same = all(entry[key] == record[key] for key in ("adapter_sha256", "shots"))
            if same and entry["prompt"]["sha256"] == record["prompt"]["sha256"] and entry["example_ids"] is None:
                lines = pq.read_table(file.with_name(ROWS), filters=[("entry", "=", entry["key"])]).to_pylist()
                return {line["id"]: line["perplexity"] for line in lines}, entry["mean_perplexity"]
    return {}, None


def _unique(columns: Any) -> list[Answers]:
    """A run given twice, whole and in part, is shown once."""
    return list({(column.run.resolve(), column.name): column for column in columns}.values())


def _labels(columns: Sequence[Answers]) -> list[str]:
    """Names, with the run's before them where there are several; its path where runs share a name."""
    runs = list(dict.fromkeys(column.run for column in columns))
    if len(runs) == 1:
        return [column.name for column in columns]
    clash = len({run.resolve().name for run in runs}) < len(runs)
    return [f"{column.run if clash else column.run.resolve().name}/{column.name}" for column in columns]


def _print_figures(columns: Sequence[Answers], labels: Sequence[str]) -> None:
    width = max(len("copying the input"), *map(len, labels))
    print(f"{'':<{width}}  {'mean ppl':>9}" + "".join(f"{title:>12}" for title, _ in EXPLAINED.values()))
    for column, label in zip(columns, labels, strict=True):
        mean = "-" if column.mean_perplexity is None else f"{column.mean_perplexity:.3f}"
        print(f"{label:<{width}}  {mean:>9}{_cells(column.quality['groups'])}")
    print(f"{'copying the input':<{width}}  {'-':>9}{_cells(columns[0].quality['copy_input'])}")
    missing = [str(run) for run in dict.fromkeys(column.run for column in columns if column.mean_perplexity is None)]
    if missing and columns[0].quality["groups"]:
        print(f"not all are scored; row perplexities come from hw3 eval ({', '.join(missing)})")


def _cells(groups: Mapping[str, Mapping[str, float]]) -> str:
    figures = groups.get("all")
    return "".join(f"{shown(key, figures[key]) if figures else '-':>12}" for key in EXPLAINED)


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: cannot be read ({error}); delete it and make it again") from error
