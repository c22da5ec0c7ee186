"""A checkpoint of a run together with what was scored of it: what `pack` and `export` start from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hw3.errors import UserError
from hw3.inference import recipe_of
from hw3.recipe import Recipe
from hw3.results import RESULTS
from hw3.rows import file_sha256
from hw3.run_folder import Checkpoint, check_trained_as, complete_checkpoints, read_manifest


@dataclass(frozen=True)
class Scored:
    """A complete checkpoint and its zero-shot scores under the run's own prompt.

    Attributes:
        run: the run folder.
        recipe: the run's recipe.
        manifest: the run's manifest.
        checkpoint: the checkpoint.
        data: the scored file, the recipe's `data.eval`.
        entry: the checkpoint's entry in `results.json`.
        base: the un-tuned base's entry; None where it was not scored.
        settings: how both were scored.
    """

    run: Path
    recipe: Recipe
    manifest: dict[str, Any]
    checkpoint: Checkpoint
    data: Path
    entry: dict[str, Any]
    base: dict[str, Any] | None
    settings: dict[str, Any]


def scored_checkpoint(run: Path, name: str = "best") -> Scored:
    """A run's checkpoint by name, with its scores on the recipe's `data.eval`.

    Args:
        run: the run folder.
        name: a checkpoint's name or step, or `best`, which `hw3 eval` has chosen.

    Raises:
        UserError: there is no such run or checkpoint, or it has no score of today's prompt, rows and weights.
    """
    recipe = recipe_of(run)
    check_trained_as(run, recipe)
    checkpoints = {checkpoint.name: checkpoint for checkpoint in complete_checkpoints(run)}
    if not checkpoints:
        raise UserError(f"{run}: no complete checkpoint; train it first (make train RUN={run})")
    data = Path(recipe.data.eval)
    if not data.is_file():
        raise UserError(f"{data}: no such file; it is the run's data.eval, whose score is to be compared with")
    again = f"score the run first: make eval RUN={run} (hw3 eval {run})"
    results = _results_on(run, data)
    if results is None:
        raise UserError(f"{run}: no scores on {data} as it is now; {again}")
    if name == "best":
        if results["best"] is None:
            raise UserError(f"{run}: no checkpoint has been scored on {data}; {again}")
        name = results["best"]["checkpoint"]
    checkpoint = checkpoints.get(name) or checkpoints.get(f"checkpoint-{name}")
    if checkpoint is None:
        raise UserError(f"{run}: no complete checkpoint {name}; there are {', '.join(checkpoints)}")
    zero_shot = [
        entry
        for entry in results["entries"]
        if entry["shots"] == 0 and entry["prompt"]["sha256"] == recipe.prompt.sha256
    ]
    entry = next((entry for entry in zero_shot if entry["adapter_sha256"] == checkpoint.sha256), None)
    if entry is None:
        raise UserError(f"{run}: {checkpoint.name} as it is now has no score on {data}; {again}")
    base = next((entry for entry in zero_shot if entry["checkpoint"] is None), None)
    return Scored(run, recipe, read_manifest(run), checkpoint, data, entry, base, results["settings"])


def _results_on(run: Path, data: Path) -> dict[str, Any] | None:
    """The run's results on this very file; None where there are none."""
    sha256 = file_sha256(data)
    for file in sorted(run.glob(f"eval/*/{RESULTS}")):
        results = json.loads(file.read_text(encoding="utf-8"))
        if results["data"]["sha256"] == sha256:
            return results
    return None
