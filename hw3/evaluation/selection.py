"""A checkpoint of a run together with what was scored of it: what `pack` and `export` start from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hw3.common.errors import UserError
from hw3.common.hashing import file_sha256
from hw3.config.recipe import Recipe
from hw3.evaluation.results import RESULTS
from hw3.runs.checkpoints import Checkpoint, adapter_folder, complete_checkpoints
from hw3.runs.open_run import recipe_of
from hw3.runs.resume import check_trained_as
from hw3.runs.run_dir import portable, read_manifest


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
