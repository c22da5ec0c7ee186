"""`hw3 predict`: a checkpoint's answers to a file of rows, kept as they come, resumed, and measured."""

from __future__ import annotations

import glob
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hw3.common.atomic_io import write_atomically, write_json
from hw3.common.distributed import gather, own_share, rank, world_size
from hw3.common.errors import UserError
from hw3.common.hashing import file_sha256
from hw3.config.recipe import Recipe
from hw3.data.rows import Row, read_rows
from hw3.data.tokenization import EncodedRow
from hw3.evaluation.translation_metrics import copy_input, print_quality, quality
from hw3.generation.batch_generate import Answer, generate
from hw3.generation.generator import Answerer
from hw3.runs.open_run import content_key, encode_rows, prompt_name
from hw3.runs.run_dir import data_facts, is_other_file, portable

QUALITY = ".quality.json"


def predict_run(
    run: Path,
    file: Path | None = None,
    *,
    overrides: list[str] | None = None,
    checkpoint: str = "best",
    shots: int = 0,
    output: Path | None = None,
    anyway: bool = False,
) -> int:
    """Answer every row of a file, keep the answers in the run folder, print what they are worth.

    Writes `RUN/predictions/<file stem>/<checkpoint>.json` and `<checkpoint>.quality.json`. Answers are kept as they
    come; a call that was stopped goes on where it was, and one that finds everything done makes nothing again.

    Args:
        run: the run folder.
        file: rows, with or without outputs; the recipe's `data.eval` if None.
        overrides: `generation.key=value` assignments.
        checkpoint: `best`, `last`, `base`, a checkpoint's name, or the path of one or of any PEFT adapter.
        shots: number of worked examples in the prompt.
        output: where to write the answers as well.
        anyway: use checkpoints that were trained under another prompt or quantization.

    Returns:
        0.

    Raises:
        UserError: there is no such run, checkpoint or file, or they do not fit.
    """
    if output is not None and output.is_dir():
        raise UserError(f"{output}: is a folder; give a file's name")
    answerer = Answerer.of(run, overrides, checkpoint, shots, anyway)
    path = file or Path(answerer.recipe.data.eval)
    rows = read_rows(path, need_output=False)
    print(answerer.chosen)
    encoded = encode_rows(answerer.encoder, rows, answerer.examples, answerer.config, str(path))
    limits = [answerer.limit(row, ids) for row, ids in zip(rows, encoded, strict=True)]
    data = data_facts(path, rows)
    target = predictions_folder(run, path, data) / f"{answerer.name}.json"
    key = content_key(
        answerer.content
        | {
            "rows": [(row.id, row.instruction) for row in rows],
            "limits": limits,
            "generation": answerer.recipe.generation.model_dump(exclude_none=True),
            "seed": answerer.recipe.seed if answerer.recipe.generation.do_sample else None,
        }
    )
    # The first process decides, and alone writes the answers: another one may read files that it has begun to replace.
    record = gather(_finished(target, key))[0]
    if record is None:
        kept = Partial.open(target, key)
        _answer(answerer, rows, encoded, limits, kept, path)
        for answers in gather(kept.answers):
            kept.answers |= answers
    if rank() != 0:
        return 0
    if record is None:
        record = _record(answerer, run, limits, kept)
        texts = [{"id": row.id, "output": kept.answers[row.id]["output"]} for row in rows]
        write_json(target, texts)
        record = {"key": key, **record, "predictions_sha256": file_sha256(target)}
    else:
        print(f"{portable(target)}: is there already")
        texts = json.loads(target.read_text(encoding="utf-8"))
    unfinished = frozenset(record["unfinished_ids"])
    record |= {
        "data": data,
        "groups": quality(rows, {text["id"]: text["output"] for text in texts}, unfinished),
        "copy_input": copy_input(rows),
    }
    _write_if_changed(target.with_suffix(QUALITY), record)
    for partial in Partial.paths_of(target):
        partial.unlink(missing_ok=True)
    if record["groups"]:
        print_quality(record["groups"], record["copy_input"])
    elif unfinished:
        print(f"{len(unfinished)} answers were cut because the model did not end them, the first {min(unfinished)}")
    if output is not None:
        try:
            write_atomically(output, target.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{output}: {error.strerror}; the answers are in {portable(target)}") from error
    print(f"{output or portable(target)}: {len(rows)} answers of {answerer.name}")
    return 0


def predictions_folder(run: Path, path: Path, data: dict[str, Any]) -> Path:
    """`predictions/<stem>`; with a part of the hash where that is another file's of the same name."""
    folder = run / "predictions" / path.stem
    for record in sorted(folder.glob(f"*{QUALITY}")):
        stored = json.loads(record.read_text(encoding="utf-8"))["data"]
        if is_other_file(stored, data, path):
            return folder.with_name(f"{folder.name}-{data['sha256'][:8]}")
    return folder


@dataclass
class Partial:
    """Answers of a call that has not ended, one JSON object a line behind one with their key; a file a process."""

    path: Path
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)

    @staticmethod
    def path_of(target: Path, process: int = 0) -> Path:
        """Beside the file that they will become."""
        return target.with_name(f".{target.stem}.partial{f'-{process}' if process else ''}.jsonl")

    @staticmethod
    def paths_of(target: Path) -> list[Path]:
        """Of every process that has left one."""
        return sorted(target.parent.glob(f".{glob.escape(target.stem)}.partial*.jsonl"))

    @classmethod
    def open(cls, target: Path, key: str) -> Partial:
        """What is there of the same key; everything else is begun anew.

        The first process takes over the files of all, as there may have been more or fewer of them.
        """
        partial = cls(cls.path_of(target, rank()))
        if rank() == 0:
            left = cls.paths_of(target)
            for path in left:
                partial.answers |= _answers_in(path, key)
            partial._begin(key)
            for path in left:
                if path != partial.path:
                    path.unlink()
        partial.answers = gather(partial.answers)[0]
        if rank() != 0:
            cls(partial.path)._begin(key)
        return partial

    def _begin(self, key: str) -> None:
        # Without what a crash cut, so that new lines begin at a line's start.
        written = [{"key": key}, *self.answers.values()]
        write_atomically(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in written))


def _answers_in(path: Path, key: str) -> dict[str, dict[str, Any]]:
    """The answers of one partial file, up to where a crash cut it; none where the key is another."""
    if not path.exists():
        return {}
    lines = []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return {line["id"]: line for line in lines[1:]} if lines and lines[0] == {"key": key} else {}


def _answer(
    answerer: Answerer, rows: list[Row], encoded: list[EncodedRow], limits: list[int], kept: Partial, path: Path
) -> None:
    """Generate this process's share of what is missing, each answer kept as soon as it is there."""
    pending = [number for number, row in enumerate(rows) if row.id not in kept.answers]
    done = f", {len(rows) - len(pending)} done before" if kept.answers else ""
    shared = f", shared by {world_size()} processes" if world_size() > 1 else ""
    print(f"{len(rows)} rows of {path}{done}{shared}; {_way(answerer.recipe)}, at most {_span(limits)} new tokens")
    pending = [pending[at] for at in sorted(own_share([limits[number] for number in pending]))]
    if not pending:
        return
    model, config = answerer.model, answerer.generation
    if config.do_sample:
        torch.manual_seed(answerer.recipe.seed + rank())
    before = len(kept.answers)
    began = time.perf_counter()
    with (
        kept.path.open("a", encoding="utf-8") as file,
        tqdm(
            total=before + len(pending),
            initial=before,
            desc=answerer.name,
            unit="row",
            disable=True if rank() else None,  # on the first process's terminal alone
            leave=False,
        ) as bar,
    ):

        def keep(place: int, answer: Answer) -> None:
            nonlocal began
            row, now = rows[pending[place]], time.perf_counter()
            line = {"id": row.id, "output": answerer.encoder.decode(answer.ids), "finished": answer.finished}
            line["seconds"] = round((now - began) / world_size(), 6)  # the sum over all processes is the time it took
            began = now
            kept.answers[row.id] = line
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            bar.update()

        try:
            generate(
                model,
                [encoded[number] for number in pending],
                limits=[limits[number] for number in pending],
                config=config,
                on_answer=keep,
            )
        except KeyboardInterrupt:
            bar.close()
            kept_here = f"{len(kept.answers)} of {len(rows)} answers kept"
            others = " beside those of the other processes" if world_size() > 1 else ""
            print(f"stopped: {kept_here}{others}; the same command goes on", flush=True)
            raise
        os.fsync(file.fileno())


def _way(recipe: Recipe) -> str:
    values = recipe.generation.model_dump(exclude_defaults=True, exclude={"max_new_tokens"})
    return ", ".join(f"{key} {value}" for key, value in values.items()) or "greedy"


def _span(limits: list[int]) -> str:
    least, most = min(limits), max(limits)
    return str(most) if least == most else f"{least} to {most}"


def _record(answerer: Answerer, run: Path, limits: list[int], kept: Partial) -> dict[str, Any]:
    """What the answers are and how they were made, for `<name>.quality.json`."""
    seconds = sum(line["seconds"] for line in kept.answers.values())
    least, most = min(limits), max(limits)
    return {
        "schema": 1,
        "run": portable(run),
        "data": {},
        "name": answerer.name,
        "checkpoint": None if answerer.checkpoint is None else answerer.checkpoint.name,
        "adapter_sha256": None if answerer.checkpoint is None else answerer.checkpoint.sha256,
        "shots": len(answerer.examples),
        "prompt": {"name": prompt_name(answerer.recipe.prompt), "sha256": answerer.recipe.prompt.sha256},
        "generation": answerer.recipe.generation.model_dump(exclude_none=True)
        | {
            "max_new_tokens": most if least == most else [least, most],
            "eos_token_id": answerer.generation.eos_token_id,
        },
        "seconds": round(seconds, 3),
        "rows_per_second": round(len(kept.answers) / seconds, 3),
        "unfinished_ids": sorted(id for id, line in kept.answers.items() if not line["finished"]),
    }


def _finished(target: Path, key: str) -> dict[str, Any] | None:
    """The record of answers that are there under the same key and unchanged; None if there are none."""
    try:
        record = json.loads(target.with_suffix(QUALITY).read_text(encoding="utf-8"))
        unchanged = file_sha256(target) == record["predictions_sha256"]
    except (OSError, ValueError, KeyError):
        return None
    return record if unchanged and record["key"] == key else None


def _write_if_changed(path: Path, record: dict[str, Any]) -> None:
    text = json.dumps(record, ensure_ascii=False, indent=2) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text)
