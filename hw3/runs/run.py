"""A run folder: the paths of its files, and the one place that opens them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hw3.common.errors import UserError
from hw3.common.hashing import file_sha256
from hw3.common.paths import portable_path
from hw3.config.data_files import list_data_files
from hw3.config.recipe import Recipe, load_recipe
from hw3.data.fingerprint import DatasetFingerprint
from hw3.data.rows import DataFileKey
from hw3.runs.checkpoints import (
    MANIFEST_FILE,
    Checkpoint,
    find_complete_checkpoints,
    find_incomplete_checkpoints,
)
from hw3.runs.manifest import Manifest
from hw3.runs.prediction_record import PredictionRecord
from hw3.runs.results_file import ResultsFile

if TYPE_CHECKING:  # the first checks of a command must not take the seconds of importing transformers
    from transformers import PreTrainedTokenizerBase

RECIPE_FILE = "recipe.yaml"
TOKENIZER_DIR = "tokenizer"
RESULTS_FILE = "results.json"
ROWS_FILE = "rows.parquet"
CURVE_FILE = "learning_curve.png"
DEV_FILE = "dev.json"
RECORD_SUFFIX = ".quality.json"


@dataclass(frozen=True)
class Run:
    """A run folder, which need not exist yet.

    Attributes:
        path: the folder.
    """

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """The folder's path, as result files store it."""
        return portable_path(self.path)

    @property
    def recipe_path(self) -> Path:
        """The recipe as it was run, overrides applied."""
        return self.path / RECIPE_FILE

    @property
    def manifest_path(self) -> Path:
        """The manifest."""
        return self.path / MANIFEST_FILE

    @property
    def tokenizer_path(self) -> Path:
        """The folder of the tokenizer that the run was trained with."""
        return self.path / TOKENIZER_DIR

    @property
    def own_dev_path(self) -> Path:
        """The rows that `data.dev_fraction` takes from the training file."""
        return self.path / DEV_FILE

    def dev_file(self, recipe: Recipe) -> Path | None:
        """Return the file whose scores select the best checkpoint; None if `data.eval` does."""
        if recipe.data.dev_fraction is not None:
            return self.own_dev_path
        return None if recipe.data.dev is None else Path(recipe.data.dev)

    def eval_files(self, recipe: Recipe) -> list[Path]:
        """Return the files to score; the scores on the first one select the best checkpoint."""
        dev_file = self.dev_file(recipe)
        return [*([] if dev_file is None else [dev_file]), Path(recipe.data.eval)]

    def data_files(self, recipe: Recipe) -> dict[DataFileKey, Path]:
        """Return the data files of the run, by key in the recipe's `data` section."""
        dev_file = self.dev_file(recipe)
        return list_data_files(recipe.data) | ({} if dev_file is None else {"dev": dev_file})

    def exists(self) -> bool:
        """Return whether the folder holds a run."""
        return self.recipe_path.is_file()

    def folder_beside(self, suffix: str) -> Path:
        """Return the path of a folder beside the run's, which has its name and a suffix: `outputs/tiny-qlora-pack`."""
        path = Path(os.path.abspath(self.path)) if self.path.name in ("", "..") else self.path
        return path.parent / f"{path.name}{suffix}"

    def load_recipe(self, overrides: list[str] | None = None) -> Recipe:
        """Load the recipe of the run.

        Args:
            overrides: `section.key=value` assignments for this call.

        Raises:
            UserError: there is no such run, or its recipe is wrong.
        """
        if not self.exists():
            raise UserError(f"{self}: no such run; train it first (make train, hw3 train RECIPE.yaml --run {self})")
        return load_recipe(self.recipe_path, overrides)

    def load_tokenizer(self, recipe: Recipe) -> PreTrainedTokenizerBase:
        """Load the tokenizer that the run was trained with; that of the base model before training."""
        from hw3.modeling.loading import load_tokenizer

        if not self.tokenizer_path.is_dir():
            return load_tokenizer(recipe.model)
        update = {"pretrained_model_name_or_path": str(self.tokenizer_path), "revision": None}
        return load_tokenizer(recipe.model.model_copy(update=update))

    def read_manifest(self) -> Manifest | None:
        """Read the manifest; None before training.

        Raises:
            UserError: the file is not a manifest.
        """
        try:
            return Manifest.read(self.manifest_path)
        except FileNotFoundError:
            return None

    def complete_checkpoints(self) -> list[Checkpoint]:
        """Return the complete checkpoints, by step."""
        return find_complete_checkpoints(self.path)

    def incomplete_checkpoints(self) -> list[Path]:
        """Return the checkpoint folders that were not written to the end."""
        return find_incomplete_checkpoints(self.path)

    def training_losses(self) -> list[tuple[int, float]]:
        """Return (step, loss) pairs as they were logged, from the last complete checkpoint."""
        checkpoints = self.complete_checkpoints()
        log_history = checkpoints[-1].trainer_state()["log_history"] if checkpoints else []
        return [(log["step"], log["loss"]) for log in log_history if "loss" in log]

    def read_results(self) -> dict[Path, ResultsFile]:
        """Read the results on every data file, by the folder that holds them.

        Raises:
            UserError: a file is not a results file.
        """
        files = sorted(self.path.glob(f"eval/*/{RESULTS_FILE}"))
        return {file.parent: ResultsFile.read(file) for file in files}

    def read_results_on(self, data_file: Path) -> tuple[Path, ResultsFile] | None:
        """Return the results on a data file with its current content, and their folder; None if there are none."""
        sha256 = file_sha256(data_file)
        return next((pair for pair in self.read_results().items() if pair[1].data.sha256 == sha256), None)

    def eval_dir(self, data_file: Path, data: DatasetFingerprint) -> Path:
        """Return the folder for the results on a data file: `eval/<file stem>`.

        A part of the hash is appended if that folder belongs to another file with the same name.
        """
        folder = self.path / "eval" / data_file.stem
        try:
            stored = ResultsFile.read(folder / RESULTS_FILE).data
        except (OSError, UserError):
            return folder
        return _distinct_dir(folder, data) if stored.is_of_another_file(data, data_file) else folder

    def predictions_dir(self, data_file: Path, data: DatasetFingerprint) -> Path:
        """Return the folder for predictions on a data file: `predictions/<file stem>`, made distinct as `eval_dir`."""
        folder = self.path / "predictions" / data_file.stem
        for path in sorted(folder.glob(f"*{RECORD_SUFFIX}")):
            if PredictionRecord.read(path).data.is_of_another_file(data, data_file):
                return _distinct_dir(folder, data)
        return folder

    def read_prediction_records(self) -> list[tuple[Path, PredictionRecord]]:
        """Return every file of predictions with its record. Records without predictions are left out.

        Raises:
            UserError: a record cannot be read.
        """
        found = []
        for path in sorted(self.path.glob(f"predictions/*/*{RECORD_SUFFIX}")):
            predictions = path.with_name(path.name.removesuffix(RECORD_SUFFIX) + ".json")
            if predictions.exists():
                found.append((predictions, PredictionRecord.read(path)))
        return found


def _distinct_dir(folder: Path, data: DatasetFingerprint) -> Path:
    return folder.with_name(f"{folder.name}-{data.sha256[:8]}")
