"""`hw3 compare`: outputs of base model, checkpoints and runs side by side, from the files of `predict` and `eval`."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

from hw3.common.console import print_unescaped
from hw3.common.errors import UserError
from hw3.common.hashing import file_sha256
from hw3.common.paths import shown_path
from hw3.common.shell_commands import hw3_command
from hw3.common.text import escape_invisible, split_differences
from hw3.data.rows import Row, read_rows
from hw3.data.templates import match_template
from hw3.evaluation.results import EvalResults
from hw3.evaluation.translation_metrics import METRIC_DESCRIPTIONS, format_metric
from hw3.runs.prediction_record import PredictionRecord, TranslationMetrics, read_outputs
from hw3.runs.run import Run

# The row whose outputs of two models the study prints; `recipes/prompts/study.yaml` holds the study's prompt.
STUDY_ROW_ID = "87945a20-f869-4be9-b586-f5ce20ddd78b"
# Marks before and after what differs: colors on a terminal, brackets elsewhere.
COLOR_MARKS = ("\033[1;31m", "\033[0m")
BRACKET_MARKS = ("【", "】")


@dataclass(frozen=True, slots=True)
class SystemOutputs:
    """Outputs of one system (the base model or a checkpoint of a run) for one data file.

    Attributes:
        run: the run.
        name: `base`, `base+4`, `checkpoint-100`.
        outputs: outputs by row id.
        record: how the outputs were generated, and their metrics.
        perplexities: perplexities of the references by row id; empty if the system was not scored on these rows.
        mean_perplexity: their mean; None if the system was not scored on these rows.
    """

    run: Run
    name: str
    outputs: Mapping[str, str]
    record: PredictionRecord
    perplexities: Mapping[str, float]
    mean_perplexity: float | None


def compare_runs(
    names: Sequence[str],
    *,
    ids: Sequence[str] = (),
    data_file: Path | None = None,
    max_rows: int = 10,
    use_color: bool | None = None,
) -> int:
    """Print outputs side by side: the rows with the largest disagreement first, or the rows asked for.

    Args:
        names: run folders, for all their predictions, or `RUN/base`, `RUN/checkpoint-100` for one system.
        ids: ids of the rows to print; if empty, rows are sorted by disagreement.
        data_file: the rows; if None, the file that all runs have predictions for.
        max_rows: how many rows to print without `ids`; 0 for all.
        use_color: mark differences in color; if None, on a terminal only.

    Returns:
        0.

    Raises:
        UserError: a run or its predictions are missing (the message gives the command that generates them), or the
            file does not contain a row asked for.
    """
    if max_rows < 0:
        raise UserError(f"--rows {max_rows}: give the number of rows to show, or 0 for all")
    selections = [_parse_selection(name) for name in names]
    path = data_file or _select_data_file([run for run, _ in selections])
    rows = {row.id: row for row in read_rows(path, require_output=False)}
    unknown = [id for id in ids if id not in rows]
    if unknown:
        raise UserError(*(f"--id {id}: no such row in {path}" for id in unknown))
    systems = _drop_duplicates(system for run, name in selections for system in _load_systems(run, name, path))
    labels = _label_systems(systems)

    print(f"{len(rows)} rows of {path}")
    _print_metrics(systems, labels)
    for run in dict.fromkeys(run for run, name in selections if name is None):
        _print_missing(run, {system.name for system in systems if system.run == run}, path)

    disagreement = {
        id: compute_disagreement([system.outputs[id] for system in systems], row) for id, row in rows.items()
    }
    shown = list(ids) or sorted(rows, key=lambda id: -disagreement[id])[: max_rows or None]
    if not ids and len({system.run for system in systems}) > 1 and STUDY_ROW_ID in rows:
        shown = list(dict.fromkeys([STUDY_ROW_ID, *shown]))
    marks = COLOR_MARKS if (sys.stdout.isatty() if use_color is None else use_color) else BRACKET_MARKS
    for id in shown:
        note = ", the study's own row" if id == STUDY_ROW_ID else ""
        print(f"\n{id}  disagreement {disagreement[id]:.2f}{note}")
        print_unescaped("\n".join(format_row(rows[id], systems, labels, marks)))
    if not ids and len(shown) < len(rows):
        print(f"\n{len(shown)} of {len(rows)} rows, those that differ most first; --rows 0 shows all, --id ID one")
    return 0


def compute_disagreement(outputs: Sequence[str], row: Row) -> float:
    """Return how much outputs for one row differ: 0 if all are equal, 1 if they have no characters in common.

    This is 1 minus the ratio of matching characters (`difflib.SequenceMatcher.ratio`), as the mean over all pairs of
    outputs. A single output is compared with the reference.
    """
    if len(outputs) == 1:
        outputs = [*outputs, outputs[0] if row.output is None else row.output]
    pairs = list(itertools.combinations(outputs, 2))
    return sum(1 - SequenceMatcher(None, a, b, autojunk=False).ratio() for a, b in pairs) / len(pairs)


def mark_differences(text: str, reference: str, marks: tuple[str, str]) -> str:
    """Return a text with marks around what it does not share with a reference; control characters are escaped."""
    start_mark, end_mark = marks
    pieces = [(escape_control_characters(piece), differs) for piece, differs in split_differences(text, reference)]
    return "".join(f"{start_mark}{piece}{end_mark}" if differs else piece for piece, differs in pieces)


def escape_control_characters(text: str) -> str:
    """Return a text that is safe to print on one line of a terminal: line ends become ⏎."""
    return escape_invisible(text.replace("\n", "⏎"), keep="")


def format_row(row: Row, systems: Sequence[SystemOutputs], labels: Sequence[str], marks: tuple[str, str]) -> list[str]:
    """Return the lines of one row: the input, the reference, and every output, marked where it differs.

    Outputs are compared with the reference; for rows without one, with the first output.
    """
    width = max(len("reference"), *map(len, labels))
    matched = match_template(row.instruction)
    directions = {"m2c": "to Classical", "c2m": "to modern"}
    input_text = escape_control_characters(matched[1] if matched else row.instruction)
    direction = f"  ({directions[matched[0].direction]})" if matched else ""
    lines = [f"  {'input':<{width}}  {'':>9}  {input_text}{direction}"]
    if row.output is not None:
        lines.append(f"  {'reference':<{width}}  {'':>9}  {escape_control_characters(row.output)}")
    reference = systems[0].outputs[row.id] if row.output is None else row.output
    for system, label in zip(systems, labels, strict=True):
        perplexity = system.perplexities.get(row.id)
        score = "" if perplexity is None else f"ppl {perplexity:.2f}"
        marked = mark_differences(system.outputs[row.id], reference, marks)
        lines.append(f"  {escape_invisible(label):<{width}}  {score:>9}  {marked or '(empty)'}")
    return lines


def _parse_selection(name: str) -> tuple[Run, str | None]:
    """Return the run, and the system of it that is selected; None for all."""
    path = Path(name)
    if Run(path).exists():
        return Run(path), None
    if Run(path.parent).exists():
        return Run(path.parent), path.name
    raise UserError(f"{name}: no such run; give a run folder, or one followed by /base or /checkpoint-100")


def _select_data_file(runs: Sequence[Run]) -> Path:
    """Return the file that all runs have predictions for.

    Raises:
        UserError: there are several such files, and the first run's `data.eval` is not among them.
    """
    eval_file = Path(runs[0].load_recipe().data.eval)
    predicted = [
        {record.data.sha256: record.data.path for _, record in run.read_prediction_records()}
        for run in dict.fromkeys(runs)
    ]
    common = {sha256: path for sha256, path in predicted[0].items() if all(sha256 in other for other in predicted[1:])}
    if not common or (eval_file.is_file() and file_sha256(eval_file) in common):
        return eval_file
    paths = sorted({Path(path) for path in common.values()})
    if len(paths) == 1 and paths[0].is_file() and file_sha256(paths[0]) in common:
        return paths[0]
    raise UserError(f"there are predictions for {', '.join(map(str, paths))}; choose the file: --data FILE")


def _load_systems(run: Run, name: str | None, path: Path) -> list[SystemOutputs]:
    """Return the outputs of all systems of a run for a file, or those of one system.

    Raises:
        UserError: there are none, they were edited, or the checkpoint was trained again since; the message gives the
            command that generates them.
    """
    sha256 = file_sha256(path)
    records = [
        (predictions_path, record)
        for predictions_path, record in run.read_prediction_records()
        if record.data.sha256 == sha256 and name in (None, record.name)
    ]
    command = hw3_command("predict", run, path, *_predict_options(name))
    if not records:
        raise UserError(f"{run}: no predictions{f' of {name}' if name else ''} for {path} yet: {command}")
    checkpoint_sha256 = {checkpoint.name: checkpoint.sha256 for checkpoint in run.complete_checkpoints()}
    scores = _read_scores(run, sha256)
    systems = []
    for predictions_path, record in sorted(records, key=lambda pair: _sort_key(pair[1].name)):
        # The name of an adapter from elsewhere ends in a hash, so it is never the name of a checkpoint of the run.
        own_name = record.name.partition("+")[0]
        if checkpoint_sha256.get(own_name, record.adapter_sha256) != record.adapter_sha256:
            raise UserError(
                f"{shown_path(predictions_path)}: {record.checkpoint} was trained again since: "
                + hw3_command("predict", run, path, "--checkpoint", record.checkpoint)
            )
        if file_sha256(predictions_path) != record.predictions_sha256:
            raise UserError(f"{shown_path(predictions_path)}: edited since it was written: {command}")
        perplexities, mean_perplexity = _find_perplexities(scores, record)
        outputs = read_outputs(predictions_path)
        systems.append(SystemOutputs(run, record.name, outputs, record, perplexities, mean_perplexity))
    return systems


def _predict_options(name: str | None) -> list[str]:
    """Return the options of `hw3 predict` that generate the outputs of a system."""
    if name is None:
        return []
    checkpoint, _, shots = name.partition("+")
    return ["--checkpoint", checkpoint, *(["--shots", shots] if shots else [])]


def _sort_key(name: str) -> tuple[bool, int, str]:
    """Sort the base model first, then checkpoints by step."""
    digits = "".join(filter(str.isdigit, name.partition("+")[0]))
    return not name.startswith("base"), int(digits or 0), name


def _read_scores(run: Run, data_sha256: str) -> list[EvalResults]:
    """Return the scores of a run on rows with this hash."""
    prompt_sha256 = run.load_recipe().prompt.sha256
    return [
        EvalResults.read(folder, prompt_sha256, results.started)
        for folder, results in run.read_results().items()
        if results.data.sha256 == data_sha256
    ]


def _find_perplexities(
    scores: Iterable[EvalResults], record: PredictionRecord
) -> tuple[dict[str, float], float | None]:
    """Return row perplexities under the same weights, prompt and few-shot examples, and their mean."""
    wanted = (record.adapter_sha256, record.shots, record.prompt.sha256, None)
    for results in scores:
        for entry in results.entries:
            if (entry.adapter_sha256, entry.shots, entry.prompt.sha256, entry.example_ids) == wanted:
                return {score.id: score.perplexity for score in results.row_scores[entry.key]}, entry.mean_perplexity
    return {}, None


def _drop_duplicates(systems: Iterable[SystemOutputs]) -> list[SystemOutputs]:
    """Return every system once, also if a run is given together with one of its systems."""
    return list({(system.run.path.resolve(), system.name): system for system in systems}.values())


def _label_systems(systems: Sequence[SystemOutputs]) -> list[str]:
    """Return the systems' names; with several runs, the run's name before them, or its path where names repeat."""
    runs = list(dict.fromkeys(system.run for system in systems))
    if len(runs) == 1:
        return [system.name for system in systems]
    names_repeat = len({run.path.resolve().name for run in runs}) < len(runs)
    return [f"{system.run if names_repeat else system.run.path.resolve().name}/{system.name}" for system in systems]


def _print_metrics(systems: Sequence[SystemOutputs], labels: Sequence[str]) -> None:
    width = max(len("copying the input"), *map(len, labels))
    print(f"{'':<{width}}  {'mean ppl':>9}" + "".join(f"{title:>12}" for title, _ in METRIC_DESCRIPTIONS.values()))
    for system, label in zip(systems, labels, strict=True):
        mean = "-" if system.mean_perplexity is None else f"{system.mean_perplexity:.3f}"
        print(f"{label:<{width}}  {mean:>9}{_format_cells(system.record.groups)}")
    print(f"{'copying the input':<{width}}  {'-':>9}{_format_cells(systems[0].record.copy_input)}")
    unscored = [str(run) for run in dict.fromkeys(system.run for system in systems if system.mean_perplexity is None)]
    if unscored and systems[0].record.groups:
        print(f"not all systems are scored; {hw3_command('eval')} computes the perplexities ({', '.join(unscored)})")


def _print_missing(run: Run, predicted: Collection[str], path: Path) -> None:
    """Print how to predict with the base model and with the best checkpoint, if their predictions are missing."""
    found = run.read_results_on(path)
    wanted = ["base"]
    if found is not None and found[1].best is not None:
        wanted.append(found[1].best.checkpoint)
    elif all(name.startswith("base") for name in predicted):
        wanted += [checkpoint.name for checkpoint in run.complete_checkpoints()[-1:]]
    for name in wanted:
        if name not in predicted:
            print(f"no predictions of {name} yet: {hw3_command('predict', run, path, '--checkpoint', name)}")


def _format_cells(groups: Mapping[str, TranslationMetrics]) -> str:
    metrics = groups.get("all")
    return "".join(
        f"{format_metric(metric, getattr(metrics, metric)) if metrics else '-':>12}" for metric in METRIC_DESCRIPTIONS
    )
