"""What a report is made of: a run's recipe, manifest, scores, predictions and rows, as its files hold them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hw3.common.errors import UserError
from hw3.common.hashing import file_sha256
from hw3.config.recipe import Recipe, load_recipe
from hw3.data.rows import Row, read_rows
from hw3.evaluation.bootstrap import PairedDifference, paired_difference
from hw3.evaluation.learning_curve import own_entries, training_losses
from hw3.evaluation.results import RESULTS, Results
from hw3.runs.checkpoints import COMPLETE, Checkpoint, complete_checkpoints
from hw3.runs.run_dir import RECIPE, portable, read_manifest

QUALITY = ".quality.json"


@dataclass(frozen=True)
class Predictions:
    """Answers to the run's rows.

    Attributes:
        name: `base`, `base+4`, `checkpoint-100`.
        outputs: answer by row id.
        quality: `<name>.quality.json`.
    """

    name: str
    outputs: dict[str, str]
    quality: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run, read.

    Attributes:
        folder: the run folder.
        name: how results name it.
        recipe: the recipe as run.
        manifest: empty where nothing has been trained.
        checkpoints: complete ones, by step.
        results: on the recipe's `data.eval`; None where that has not been scored.
        others: on the dev file and whatever else has been scored.
        predictions: for `data.eval`.
        rows: of `data.eval`, by id; empty where the file is gone or another one now.
        losses: (step, loss) as logged.
        tokens: seen in training, padding left out; None where not logged.
        disk: bytes of all complete checkpoints, and of the last one's weights.
        notes: what was left out, and why.
    """

    folder: Path
    name: str
    recipe: Recipe
    manifest: dict[str, Any]
    checkpoints: list[Checkpoint]
    results: Results | None
    others: list[Results]
    predictions: list[Predictions]
    rows: dict[str, Row]
    losses: list[tuple[int, float]]
    tokens: int | None
    disk: tuple[int, int]
    notes: list[str]

    @property
    def base(self) -> str:
        """Name and revision of the base."""
        model = self.recipe.model
        return model.pretrained_model_name_or_path + (f" ({model.revision})" if model.revision else "")

    @property
    def untuned(self) -> list[dict[str, Any]]:
        """The base's entries under the recipe's prompt, by worked examples."""
        return [] if self.results is None else own_entries(self.results)[0]

    @property
    def tuned(self) -> list[dict[str, Any]]:
        """The checkpoints' zero-shot entries under the recipe's prompt, by step."""
        return [] if self.results is None else own_entries(self.results)[1]

    @property
    def zero_shot(self) -> dict[str, Any] | None:
        """The base's entry without worked examples."""
        return next((entry for entry in self.untuned if entry["shots"] == 0), None)

    @property
    def few_shot(self) -> dict[str, Any] | None:
        """The base's entry with the number of worked examples that serves best."""
        few = [entry for entry in self.untuned if entry["shots"]]
        return min(few, key=lambda entry: entry["mean_perplexity"], default=None)

    @property
    def best(self) -> dict[str, Any] | None:
        """The entry of the best checkpoint."""
        return None if self.results is None else self.results.best_entry()


def read_run(folder: Path) -> Run:
    """Everything that a report says of a run. Loads no model.

    Raises:
        UserError: there is no such run, or one of its files cannot be read.
    """
    if not (folder / RECIPE).is_file():
        raise UserError(f"{folder}: no such run: it holds no {RECIPE}; train it first (make train)")
    recipe = load_recipe(folder / RECIPE)
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        raise UserError(f"{folder / 'manifest.json'}: cannot be read ({error})") from error
    found = sorted(folder.glob(f"eval/*/{RESULTS}"))
    scored = [Results.read(file.parent, recipe.prompt.sha256, manifest.get("started")) for file in found]
    scored = [results for results in scored if results.entries]
    results = _scored_on(scored, recipe.data.eval, manifest.get("data", {}).get("eval", {}).get("sha256"))
    dev = None
    if recipe.data.dev is not None:
        dev = _scored_on(scored, recipe.data.dev, manifest.get("data", {}).get("dev", {}).get("sha256"))
    for file in scored:
        file.choose_on(dev if dev is not None and file is results else file)
    checkpoints = complete_checkpoints(folder)
    notes: list[str] = []
    rows: dict[str, Row] = {}
    predictions: list[Predictions] = []
    if results is not None:
        rows = _rows(results, recipe, notes)
        predictions = _predictions(folder, results, checkpoints, notes)
    return Run(
        folder=folder,
        name=portable(folder),
        recipe=recipe,
        manifest=manifest,
        checkpoints=checkpoints,
        results=results,
        others=[file for file in scored if file is not results],
        predictions=predictions,
        rows=rows,
        losses=training_losses(folder),
        tokens=_tokens(checkpoints),
        disk=_disk(checkpoints),
        notes=notes,
    )


def pair_of(run: Run, first: dict[str, Any], second: dict[str, Any], of: Run | None = None) -> PairedDifference:
    """The second entry minus the first, row by row; the second is another run's where `of` says so."""
    results, others = run.results, (of or run).results
    assert results is not None and others is not None
    settings = results.head["settings"]
    return paired_difference(
        results.rows[first["key"]],
        others.rows[second["key"]],
        samples=settings["bootstrap_samples"],
        seed=settings["bootstrap_seed"],
    )


def same_rows(first: Run, second: Run) -> bool:
    """Whether two runs were scored on one file."""
    if first.results is None or second.results is None:
        return False
    return first.results.head["data"]["sha256"] == second.results.head["data"]["sha256"]


def _scored_on(scored: list[Results], name: str, sha256: str | None) -> Results | None:
    """The results on a file of the recipe: of that path, and among those of its content when training began first."""
    path = Path(name)
    same = [file for file in scored if file.head["data"]["path"] in (portable(path), path.as_posix(), path.name)]
    same.sort(key=lambda file: file.head["data"]["sha256"] != sha256)
    return same[0] if same else None


def _rows(results: Results, recipe: Recipe, notes: list[str]) -> dict[str, Row]:
    data = results.head["data"]
    for path in (Path(data["path"]), Path(recipe.data.eval)):
        if path.is_file() and file_sha256(path) == data["sha256"]:
            return {row.id: row for row in read_rows(path)}
    notes.append(f"{data['path']} is not here as it was scored: inputs and references are left out")
    return {}


def _predictions(run: Path, results: Results, checkpoints: list[Checkpoint], notes: list[str]) -> list[Predictions]:
    """Answers to the scored rows, the base's first, then by step."""
    found = []
    adapters = {checkpoint.name: checkpoint.sha256 for checkpoint in checkpoints}
    for record in sorted(run.glob(f"predictions/*/*{QUALITY}")):
        file = record.with_name(record.name.removesuffix(QUALITY) + ".json")
        try:
            quality = json.loads(record.read_text(encoding="utf-8"))
            if quality["data"]["sha256"] != results.head["data"]["sha256"]:
                continue
            outputs = {row["id"]: row["output"] for row in json.loads(file.read_text(encoding="utf-8"))}
            unchanged = file_sha256(file) == quality["predictions_sha256"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: cannot be read ({error!r}); delete it and predict again: hw3 predict") from error
        if not unchanged:
            notes.append(f"{portable(file)}: changed since it was written, left out")
        elif "adapter_sha256" in quality and adapters.get(quality["checkpoint"]) not in (
            None,
            quality["adapter_sha256"],
        ):
            notes.append(f"{portable(file)}: answers of an earlier {quality['checkpoint']}, left out")
        else:
            found.append(Predictions(quality["name"], outputs, quality))
    return sorted(found, key=lambda one: _order(one.name))


def _order(name: str) -> tuple[int, int, str]:
    """`base`, `base+4`, `checkpoint-20`, `checkpoint-100`."""
    stem, _, shots = name.partition("+")
    step = stem.removeprefix("checkpoint-")
    return int(step) if step.isdigit() else -1, int(shots) if shots.isdigit() else 0, name


def _tokens(checkpoints: list[Checkpoint]) -> int | None:
    if not checkpoints:
        return None
    state = json.loads((checkpoints[-1].path / "trainer_state.json").read_text(encoding="utf-8"))
    return state["num_input_tokens_seen"] or None


def _disk(checkpoints: list[Checkpoint]) -> tuple[int, int]:
    """From the checkpoints' records: bytes of them all, and of the last one's weights."""
    total, weights = 0, 0
    for checkpoint in checkpoints:
        record = json.loads((checkpoint.path / COMPLETE).read_text(encoding="utf-8"))
        kept = record["files"] | (record["resume_files"] if checkpoint.resumable else {})
        total += sum(file["size"] for file in kept.values())
        weights = sum(file["size"] for name, file in kept.items() if name.endswith(".safetensors"))
    return total, weights
