"""Load what a report shows of a run: recipe, manifest, scores, predictions and rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hw3.common.hashing import file_sha256
from hw3.common.paths import portable_path
from hw3.config.recipe import Recipe
from hw3.data.rows import DataFileKey, Row, read_rows
from hw3.evaluation.bootstrap import PairedDifference, paired_difference
from hw3.evaluation.learning_curve import curve_entries
from hw3.evaluation.results import EvalResults
from hw3.report.language import tr
from hw3.runs.checkpoints import Checkpoint
from hw3.runs.manifest import Manifest
from hw3.runs.prediction_record import PredictionRecord, read_outputs
from hw3.runs.results_file import ScoreEntry
from hw3.runs.run import Run


@dataclass(frozen=True)
class PredictionSet:
    """Predictions of one system for the rows of `data.eval`.

    Attributes:
        record: how they were made, and their metrics.
        outputs: predicted text by row id.
    """

    record: PredictionRecord
    outputs: dict[str, str]

    @property
    def name(self) -> str:
        """Name of the system: `base`, `base+4`, `checkpoint-100`."""
        return self.record.name


@dataclass(frozen=True)
class RunData:
    """What a report shows of a run.

    Attributes:
        path: the run folder.
        name: its path, as result files store it.
        recipe: the recipe as it was run.
        manifest: the manifest; None before training.
        checkpoints: the complete checkpoints, by step.
        results: scores on the recipe's `data.eval`; None if it has not been scored.
        other_results: scores on the dev file and on all other files.
        predictions: predictions for `data.eval`, the base model's first, then by step.
        rows: rows of `data.eval` by id; empty if the file is missing or has changed.
        losses: (step, training loss) pairs as they were logged.
        training_tokens: tokens seen in training, without padding; None if they were not counted.
        disk_bytes: size of all complete checkpoints.
        weight_bytes: size of the last checkpoint's weights.
        notes: what is not shown, and why.
    """

    path: Path
    name: str
    recipe: Recipe
    manifest: Manifest | None
    checkpoints: list[Checkpoint]
    results: EvalResults | None
    other_results: list[EvalResults]
    predictions: list[PredictionSet]
    rows: dict[str, Row]
    losses: list[tuple[int, float]]
    training_tokens: int | None
    disk_bytes: int
    weight_bytes: int
    notes: list[str]

    @property
    def base_name(self) -> str:
        """Name of the base model, with its revision if the recipe has one."""
        model = self.recipe.model
        return model.pretrained_model_name_or_path + (f" ({model.revision})" if model.revision else "")

    @property
    def all_results(self) -> list[EvalResults]:
        """Scores on all files, `data.eval` first."""
        return [*([] if self.results is None else [self.results]), *self.other_results]

    @property
    def base_entries(self) -> list[ScoreEntry]:
        """The base model's entries under the recipe's prompt, by number of few-shot examples."""
        return [] if self.results is None else curve_entries(self.results).base

    @property
    def finetuned_entries(self) -> list[ScoreEntry]:
        """The checkpoints' zero-shot entries under the recipe's prompt, by step."""
        return [] if self.results is None else curve_entries(self.results).finetuned

    @property
    def zero_shot(self) -> ScoreEntry | None:
        """The base model's zero-shot entry; None if it was not scored."""
        return next((entry for entry in self.base_entries if entry.shots == 0), None)

    @property
    def best_few_shot(self) -> ScoreEntry | None:
        """The base model's few-shot entry with the lowest mean perplexity; None if none was scored."""
        few_shot = [entry for entry in self.base_entries if entry.shots]
        return min(few_shot, key=lambda entry: entry.mean_perplexity, default=None)

    @property
    def best(self) -> ScoreEntry | None:
        """The entry of the best checkpoint; None if no checkpoint was scored."""
        return None if self.results is None else self.results.best_entry()


def load_run_data(run: Run) -> RunData:
    """Load what a report shows of a run. No model is loaded.

    Raises:
        UserError: there is no such run, or one of its files cannot be read.
    """
    recipe, manifest = run.load_recipe(), run.read_manifest()
    started = None if manifest is None else manifest.started
    best_by = recipe.evaluation.best_by
    all_results = [EvalResults.read(folder, recipe.prompt.sha256, started, best_by) for folder in run.read_results()]
    all_results = [results for results in all_results if results.entries]
    results = _find_results(all_results, recipe.data.eval, manifest, "eval")
    dev_file = run.dev_file(recipe)
    dev_results = None if dev_file is None else _find_results(all_results, str(dev_file), manifest, "dev")
    for file_results in all_results:
        is_eval = file_results is results
        file_results.select_on(dev_results if is_eval and dev_results is not None else file_results)
    checkpoints = run.complete_checkpoints()
    notes: list[str] = []
    disk_bytes, weight_bytes = _checkpoint_sizes(checkpoints)
    return RunData(
        path=run.path,
        name=run.name,
        recipe=recipe,
        manifest=manifest,
        checkpoints=checkpoints,
        results=results,
        other_results=[file_results for file_results in all_results if file_results is not results],
        rows={} if results is None else _load_rows(results, recipe, notes),
        predictions=[] if results is None else _load_predictions(run, results, checkpoints, notes),
        losses=run.training_losses(),
        training_tokens=checkpoints[-1].trainer_state()["num_input_tokens_seen"] or None if checkpoints else None,
        disk_bytes=disk_bytes,
        weight_bytes=weight_bytes,
        notes=notes,
    )


def compare_entries(
    run: RunData, first: ScoreEntry, second: ScoreEntry, second_run: RunData | None = None
) -> PairedDifference:
    """Return the second entry's perplexity minus the first's, row by row.

    Args:
        run: the run of the first entry.
        first: an entry.
        second: an entry on the same rows.
        second_run: the run of the second entry, if it is not `run`.
    """
    results, second_results = run.results, (second_run or run).results
    assert results is not None and second_results is not None
    return paired_difference(
        results.row_scores[first.key],
        second_results.row_scores[second.key],
        samples=results.settings.bootstrap_samples,
        seed=results.settings.bootstrap_seed,
    )


def have_same_rows(first: RunData, second: RunData) -> bool:
    """Return whether two runs were scored on the same file."""
    if first.results is None or second.results is None:
        return False
    return first.results.data.sha256 == second.results.data.sha256


def _find_results(
    all_results: list[EvalResults], name: str, manifest: Manifest | None, key: DataFileKey
) -> EvalResults | None:
    """Return the results on a data file of the recipe.

    Several results can have the path: those of the content when training began come first.
    """
    path = Path(name)
    recorded = None if manifest is None else manifest.data.get(key)
    names = (portable_path(path), path.as_posix(), path.name)
    # The path of a dev file in a run folder changes when the folder is moved.
    found = [
        results
        for results in all_results
        if results.data.path in names or (recorded is not None and results.data.sha256 == recorded.sha256)
    ]
    found.sort(
        key=lambda results: (
            recorded is None or results.data.sha256 != recorded.sha256,
            results.data.path not in names,
        )
    )
    return found[0] if found else None


def _load_rows(results: EvalResults, recipe: Recipe, notes: list[str]) -> dict[str, Row]:
    for path in (Path(results.data.path), Path(recipe.data.eval)):
        if path.is_file() and file_sha256(path) == results.data.sha256:
            return {row.id: row for row in read_rows(path)}
    notes.append(
        tr(
            "{file} is missing or has changed since it was scored, so instructions and references are not shown.",
            file=results.data.path,
        )
    )
    return {}


def _load_predictions(
    run: Run, results: EvalResults, checkpoints: list[Checkpoint], notes: list[str]
) -> list[PredictionSet]:
    """Load the predictions for the scored rows; add a note for each file that is not shown."""
    found = []
    adapters = {checkpoint.name: checkpoint.sha256 for checkpoint in checkpoints}
    for path, record in run.read_prediction_records():
        if record.data.sha256 != results.data.sha256:
            continue
        name, outputs = portable_path(path), read_outputs(path)
        if file_sha256(path) != record.predictions_sha256:
            notes.append(tr("{name} is not shown: it has changed since it was written.", name=name))
        elif adapters.get(record.checkpoint or "", record.adapter_sha256) != record.adapter_sha256:
            text = tr(
                "{name} is not shown: {checkpoint} has been trained again since.",
                name=name,
                checkpoint=record.checkpoint,
            )
            notes.append(text)
        else:
            found.append(PredictionSet(record, outputs))
    return sorted(found, key=lambda predictions: _system_order(predictions.name))


def _system_order(name: str) -> tuple[int, int, str]:
    """Return a key that sorts `base`, `base+4`, `checkpoint-20`, `checkpoint-100` in this order."""
    stem, _, shots = name.partition("+")
    step = stem.removeprefix("checkpoint-")
    return int(step) if step.isdigit() else -1, int(shots) if shots.isdigit() else 0, name


def _checkpoint_sizes(checkpoints: list[Checkpoint]) -> tuple[int, int]:
    """Return the bytes of all checkpoints and the bytes of the last one's weights, from their records."""
    total, weights = 0, 0
    for checkpoint in checkpoints:
        record = checkpoint.record()
        files = record.files | (record.resume_files if checkpoint.resumable else {})
        total += sum(file.size for file in files.values())
        weights = sum(file.size for name, file in files.items() if name.endswith(".safetensors"))
    return total, weights
