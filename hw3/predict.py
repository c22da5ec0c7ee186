"""`hw3 predict`: a checkpoint's answers to a file of rows, kept and resumed; or to one sentence, at once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hw3.corpus.templates import TEMPLATES, Direction
from hw3.encoding import EncodedRow, Encoder
from hw3.errors import UserError
from hw3.generation import Answer, AnswerLengths, generate, generation_config, stop_ids
from hw3.inference import (
    content_key,
    content_of,
    encode_rows,
    load_checkpoint,
    load_for_inference,
    prompt_content,
    prompt_name,
    recipe_of,
    tokenizer_of,
)
from hw3.model import AdapterSlot, BadAdapter, load_config
from hw3.perplexity import check_head
from hw3.prompt import Example
from hw3.quality import copy_input, print_quality, quality
from hw3.recipe import Recipe
from hw3.results import RESULTS
from hw3.rows import Row, file_sha256, read_rows
from hw3.run_folder import (
    Checkpoint,
    adapter_folder,
    check_trained_as,
    complete_checkpoints,
    portable,
    write_atomically,
    write_json,
)

TEXT = "{x}"
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
    subject = Subject.of(run, overrides, checkpoint, shots, anyway)
    path = file or Path(subject.recipe.data.eval)
    rows = read_rows(path, need_output=False)
    print(subject.chosen)
    encoded = encode_rows(subject.encoder, rows, subject.examples, subject.config, str(path))
    limits = [subject.limit(row, ids) for row, ids in zip(rows, encoded, strict=True)]
    data = {"path": portable(path), "sha256": file_sha256(path), "rows": len(rows)}
    target = predictions_folder(run, path, data) / f"{subject.name}.json"
    key = content_key(
        subject.content
        | {
            "rows": [(row.id, row.instruction) for row in rows],
            "limits": limits,
            "generation": subject.recipe.generation.model_dump(exclude_none=True),
            "seed": subject.recipe.seed if subject.recipe.generation.do_sample else None,
        }
    )
    record = _finished(target, key)
    if record is None:
        kept = Partial.open(target, key)
        _answer(subject, rows, encoded, limits, kept, path)
        record = _record(subject, run, limits, kept)
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
    Partial.path_of(target).unlink(missing_ok=True)
    if record["groups"]:
        print_quality(record["groups"], record["copy_input"])
    elif unfinished:
        print(f"{len(unfinished)} answers were cut because the model did not end them, the first {min(unfinished)}")
    if output is not None:
        try:
            write_atomically(output, target.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{output}: {error.strerror}; the answers are in {portable(target)}") from error
    print(f"{output or portable(target)}: {len(rows)} answers of {subject.name}")
    return 0


def answer_lines(
    run: Path,
    *,
    text: str | None = None,
    direction: Direction | None = None,
    template: str | None = None,
    overrides: list[str] | None = None,
    checkpoint: str = "best",
    shots: int = 0,
    anyway: bool = False,
) -> int:
    """Answer one text, or every line of standard input as it comes; one line in, one answer out.

    Args:
        run: the run folder.
        text: the text; lines are read if None.
        direction: `m2c` or `c2m`, to word the request plainly.
        template: a wording of one's own, with `{x}` for the text; `\\n` in it is a new line. Without it and a direction
            the text is the whole instruction.
        overrides: `generation.key=value` assignments.
        checkpoint: as for `predict_run`.
        shots: as for `predict_run`.
        anyway: as for `predict_run`.

    Raises:
        UserError: the template has no single `{x}`, or a line is not UTF-8; otherwise as `predict_run`.
    """
    wording = _wording(direction, template)
    subject = Subject.of(run, overrides, checkpoint, shots, anyway)
    print(subject.chosen, file=sys.stderr)
    _ = subject.model  # before a line is asked for
    if text is not None:
        print(subject.answer(wording.replace(TEXT, text)))
        return 0
    came = False
    for line in _lines():
        came = True
        answer = subject.answer(wording.replace(TEXT, line)) if line.strip() else ""
        # Line for line, whatever the model wrote.
        print(" ".join(answer.splitlines()), flush=True)
    if not came and not sys.stdin.isatty():
        raise UserError("standard input: no line came; give lines, a FILE of rows, or --text")
    return 0


def one_file(words: list[str]) -> tuple[Path | None, list[str]]:
    """The file among a command line's words, if any, and its `key=value` assignments.

    Raises:
        UserError: there are several files.
    """
    files = [word for word in words if "=" not in word or Path(word).is_file()]
    if len(files) > 1:
        raise UserError(f"{', '.join(files)}: one file at a time")
    return (Path(files[0]) if files else None), [word for word in words if word not in files]


def lines_are_meant(
    file: Path | None, output: Path | None, *, text: str | None, direction: str | None, template: str | None
) -> bool:
    """Whether a call is about a text or lines: for `-`, a text or a wording, or where lines are piped in.

    Raises:
        UserError: a file of rows is given as well, or one to write.
    """
    worded = any(word is not None for word in (text, direction, template))
    if worded and str(file) not in ("None", "-"):
        raise UserError(f"{file}: its rows are worded already; --text, --direction and --template are about lines")
    if (worded or str(file) == "-") and output is not None:
        raise UserError("--output is for a file's rows; answers to lines go to standard output")
    if file is not None or output is not None or worded:
        return worded or str(file) == "-"
    try:
        mode = os.fstat(0).st_mode
    except OSError:  # closed
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _wording(direction: Direction | None, template: str | None) -> str:
    if template is None:
        return next((plain.text for plain in TEMPLATES if plain.direction == direction), TEXT)
    template = template.replace("\\n", "\n")
    if template.count(TEXT) != 1:
        raise UserError(f"--template {template!r}: must hold {TEXT}, where the text goes, exactly once")
    return template


def _lines() -> Iterator[str]:
    """Lines of standard input; the prompt sign shows on a terminal only."""
    sign = ""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with contextlib.suppress(ImportError):  # editing and history for input(), where there is any
            import readline  # noqa: F401
        sign = "> "
    while True:
        try:
            line = input(sign)
            line.encode()
        except EOFError:
            return
        except UnicodeError:
            raise UserError("standard input: not UTF-8 text") from None
        yield line


@dataclass(frozen=True)
class Subject:
    """What answers: a run's base, one of its checkpoints or another adapter, a prompt; loaded when first needed.

    Attributes:
        run: the run folder.
        recipe: the run's, overrides applied.
        checkpoint: None for the base.
        chosen: one line on which it is and why.
        encoder: the run's tokenizer and prompt.
        config: the base's configuration.
        examples: worked examples in the prompt.
        content: what its answers depend on, by content.
    """

    run: Path
    recipe: Recipe
    checkpoint: Checkpoint | None
    chosen: str
    encoder: Encoder
    config: Any
    examples: list[Example]
    content: dict[str, Any]

    @classmethod
    def of(cls, run: Path, overrides: list[str] | None, checkpoint: str, shots: int, anyway: bool) -> Subject:
        """Find it; nothing large is loaded.

        Raises:
            UserError: there is no such run or checkpoint, or the prompt has fewer worked examples.
        """
        foreign = [word for word in overrides or [] if not word.strip().startswith("generation.")]
        if foreign:
            raise UserError(f"{foreign[0]}: only generation.key=value may be set here; the rest is the run's own")
        recipe = recipe_of(run, overrides=overrides)
        chosen, why = choose_checkpoint(run, recipe, checkpoint)
        if chosen is not None and not anyway:
            check_trained_as(run, recipe)
        there = recipe.prompt.examples
        if not 0 <= shots <= len(there):
            raise UserError(
                f"--shots {shots}: the prompt has {len(there)} worked examples; give a number from 0 to that"
            )
        examples = there[:shots]
        tokenizer = tokenizer_of(run, recipe)
        config = load_config(recipe.model)
        content = content_of(recipe, tokenizer, config) | prompt_content(recipe.prompt, examples)
        content["adapter"] = None if chosen is None else chosen.sha256
        return cls(run, recipe, chosen, why, Encoder(tokenizer, recipe.prompt), config, examples, content)

    @property
    def name(self) -> str:
        """Of the file of answers: `base`, `base+4`, `checkpoint-100`."""
        name = "base" if self.checkpoint is None else self.checkpoint.name.replace("/", "_")
        return f"{name}+{len(self.examples)}" if self.examples else name

    @cached_property
    def lengths(self) -> AnswerLengths:
        """Limits from the training rows."""
        path = Path(self.recipe.data.train)
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; the longest answers are estimated from the training rows. Without them give a "
                "limit: generation.max_new_tokens=512"
            )
        return AnswerLengths(read_rows(path), self.encoder)

    def limit(self, row: Row, encoded: EncodedRow) -> int:
        """Most new tokens of one answer; the prompt leaves room for one at least."""
        most = self.config.get_text_config().max_position_embeddings - len(encoded.prompt_ids)
        if most < 1:
            raise UserError(f"row {row.id}: its prompt fills the positions that the model knows; shorten it")
        return min(most, self.recipe.generation.max_new_tokens or self.lengths.limit(row.instruction))

    @cached_property
    def model(self) -> Any:
        """The base with the checkpoint's weights in it."""
        model = load_for_inference(self.recipe, dequantized=self.content["dequantized"])
        check_head(model, self.encoder.encode(Row("", TEMPLATES[0].text, None)))
        if self.checkpoint is not None:
            try:
                load_checkpoint(AdapterSlot(model), model, self.checkpoint.path)
            except BadAdapter as error:
                raise UserError(str(error)) from error
        return model

    @cached_property
    def generation(self) -> Any:
        """How the model generates."""
        return generation_config(self.recipe.generation, stop_ids(self.model, self.encoder.eos_id))

    def answer(self, instruction: str) -> str:
        """The answer to one instruction."""
        row = Row("text", instruction, None)
        encoded = self.encoder.encode(row, self.examples)
        limit = self.limit(row, encoded)
        answers: list[Answer] = []
        config = self.generation  # before the model's own settings go
        generate(self.model, [encoded], limits=[limit], config=config, on_answer=lambda _, one: answers.append(one))
        return self.encoder.decode(answers[0].ids)


def choose_checkpoint(run: Path, recipe: Recipe, name: str) -> tuple[Checkpoint | None, str]:
    """The checkpoint that a name stands for, None for the base, and one line that says which and why.

    Raises:
        UserError: there is none; names those there are.
    """
    if name == "base":
        return None, "base, without an adapter"
    complete = {checkpoint.name: checkpoint for checkpoint in complete_checkpoints(run)}
    for path in (Path(name), run / name):
        if path.is_dir() and path.resolve().parent != run.resolve():
            other = adapter_folder(path)
            return other, other.name
    if name not in ("best", "last"):
        name = Path(name).name
        if name not in complete:
            there = ", ".join(complete) or "none yet"
            raise UserError(f"{run}: no complete checkpoint {name}; there are {there}; or best, last, base, or a path")
        return complete[name], name
    if not complete:
        raise UserError(f"{run}: no complete checkpoint yet; train on (hw3 train), or ask for base (--checkpoint base)")
    last = list(complete.values())[-1]
    if name == "last":
        return last, f"{last.name}, the last of {len(complete)}"
    best = best_of(run, recipe, complete)
    if best is None:
        return last, f"{last.name}, the last: none is scored yet (hw3 eval {portable(run)} finds the best)"
    score = f"mean perplexity {best['mean_perplexity']:.3f} on {best['chosen_on']}"
    return complete[best["checkpoint"]], f"{best['checkpoint']}, the best of those scored: {score}"


def best_of(run: Path, recipe: Recipe, complete: dict[str, Checkpoint]) -> dict[str, Any] | None:
    """`best` of the run's results: of the recipe's `data.eval`, or else of any other file.

    Args:
        run: the run folder.
        recipe: the run's.
        complete: the checkpoints there are, by name; one that is gone or was written anew is not the best.
    """
    found = []
    for file in sorted(run.glob(f"eval/*/{RESULTS}")):
        stored = json.loads(file.read_text(encoding="utf-8"))
        scored = {(entry["checkpoint"], entry["adapter_sha256"]) for entry in stored["entries"]}
        name = (stored["best"] or {}).get("checkpoint")
        if name in complete and (name, complete[name].sha256) in scored:
            found.append((stored["data"]["path"] != portable(Path(recipe.data.eval)), stored["best"]))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def predictions_folder(run: Path, path: Path, data: dict[str, Any]) -> Path:
    """`predictions/<stem>`; with a part of the hash where that is another file's of the same name."""
    folder = run / "predictions" / path.stem
    for record in sorted(folder.glob(f"*{QUALITY}")):
        stored = json.loads(record.read_text(encoding="utf-8"))["data"]
        # Of a file outside the working directory only the name is known, and names repeat.
        edited = stored["path"] == data["path"] and path.resolve().is_relative_to(Path.cwd())
        if not edited and stored["sha256"] != data["sha256"]:
            return folder.with_name(f"{folder.name}-{data['sha256'][:8]}")
    return folder


@dataclass
class Partial:
    """Answers of a call that has not ended, one JSON object a line behind one with their key."""

    path: Path
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)

    @staticmethod
    def path_of(target: Path) -> Path:
        """Beside the file that they will become."""
        return target.with_name(f".{target.stem}.partial.jsonl")

    @classmethod
    def open(cls, target: Path, key: str) -> Partial:
        """What is there of the same key; everything else is begun anew."""
        partial = cls(cls.path_of(target))
        lines = []
        if partial.path.exists():
            for line in partial.path.read_text(encoding="utf-8").split("\n")[:-1]:
                try:
                    lines.append(json.loads(line))
                except ValueError:
                    break  # cut by a crash
        if lines and lines[0] == {"key": key}:
            partial.answers = {line["id"]: line for line in lines[1:]}
        # Without what a crash cut, so that new lines begin at a line's start.
        written = [{"key": key}, *partial.answers.values()]
        write_atomically(partial.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in written))
        return partial


def _answer(
    subject: Subject, rows: list[Row], encoded: list[EncodedRow], limits: list[int], kept: Partial, path: Path
) -> None:
    """Generate what is missing, each answer kept as soon as it is there."""
    pending = [number for number, row in enumerate(rows) if row.id not in kept.answers]
    done = f", {len(rows) - len(pending)} done before" if kept.answers else ""
    print(f"{len(rows)} rows of {path}{done}; {_way(subject.recipe)}, at most {_span(limits)} new tokens")
    if not pending:
        return
    model, config = subject.model, subject.generation
    if config.do_sample:
        torch.manual_seed(subject.recipe.seed)
    began = time.perf_counter()
    with (
        kept.path.open("a", encoding="utf-8") as file,
        tqdm(
            total=len(rows), initial=len(rows) - len(pending), desc=subject.name, unit="row", disable=None, leave=False
        ) as bar,
    ):

        def keep(place: int, answer: Answer) -> None:
            nonlocal began
            row, now = rows[pending[place]], time.perf_counter()
            line = {"id": row.id, "output": subject.encoder.decode(answer.ids), "finished": answer.finished}
            line["seconds"] = round(now - began, 6)
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
            print(f"stopped: {len(kept.answers)} of {len(rows)} answers kept; the same command goes on", flush=True)
            raise
        os.fsync(file.fileno())


def _way(recipe: Recipe) -> str:
    values = recipe.generation.model_dump(exclude_defaults=True, exclude={"max_new_tokens"})
    return ", ".join(f"{key} {value}" for key, value in values.items()) or "greedy"


def _span(limits: list[int]) -> str:
    least, most = min(limits), max(limits)
    return str(most) if least == most else f"{least} to {most}"


def _record(subject: Subject, run: Path, limits: list[int], kept: Partial) -> dict[str, Any]:
    """What the answers are and how they were made, for `<name>.quality.json`."""
    seconds = sum(line["seconds"] for line in kept.answers.values())
    least, most = min(limits), max(limits)
    return {
        "schema": 1,
        "run": portable(run),
        "data": {},
        "name": subject.name,
        "checkpoint": None if subject.checkpoint is None else subject.checkpoint.name,
        "adapter_sha256": None if subject.checkpoint is None else subject.checkpoint.sha256,
        "shots": len(subject.examples),
        "prompt": {"name": prompt_name(subject.recipe.prompt), "sha256": subject.recipe.prompt.sha256},
        "generation": subject.recipe.generation.model_dump(exclude_none=True)
        | {"max_new_tokens": most if least == most else [least, most], "eos_token_id": subject.generation.eos_token_id},
        "seconds": round(seconds, 3),
        "rows_per_second": round(len(kept.answers) / seconds, 3),
        "unfinished_ids": sorted(id for id, line in kept.answers.items() if not line["finished"]),
    }


def _finished(target: Path, key: str) -> dict[str, Any] | None:
    """The record of answers that are there under the same key and unchanged; None if there are none."""
    try:
        record = json.loads(target.with_suffix(QUALITY).read_text(encoding="utf-8"))
        unchanged = hashlib.sha256(target.read_bytes()).hexdigest() == record["predictions_sha256"]
    except (OSError, ValueError, KeyError):
        return None
    return record if unchanged and record["key"] == key else None


def _write_if_changed(path: Path, record: dict[str, Any]) -> None:
    text = json.dumps(record, ensure_ascii=False, indent=2) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text)
