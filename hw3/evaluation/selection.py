"""Select a checkpoint of a run: by name, the last, or the best of those that were scored."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from hw3.common.errors import UserError
from hw3.common.paths import portable_path
from hw3.common.shell_commands import hw3_command
from hw3.config.recipe import Recipe
from hw3.runs.checkpoints import Checkpoint, external_adapter
from hw3.runs.manifest import Manifest
from hw3.runs.results_file import BestCheckpoint, ResultsFile, ScoreEntry, ScoringSettings
from hw3.runs.resume import check_trained_as
from hw3.runs.run import Run


def select_checkpoint(run: Run, recipe: Recipe, name: str) -> tuple[Checkpoint | None, str]:
    """Return the checkpoint with a name, and one line that reports which it is and why.

    Args:
        run: the run.
        recipe: the run's recipe.
        name: `best`, `last`, `base`, a checkpoint's name, or the path of a checkpoint or of any PEFT adapter.

    Returns:
        The checkpoint, or None for the base model; and the line.

    Raises:
        UserError: there is no such checkpoint; the message names the complete ones.
    """
    if name == "base":
        return None, "base, without an adapter"
    for path in (Path(name), run.path / name):
        if path.is_dir() and path.resolve().parent != run.path.resolve():
            adapter = external_adapter(path)
            return adapter, adapter.name
    complete = {checkpoint.name: checkpoint for checkpoint in run.complete_checkpoints()}
    if name not in ("best", "last"):
        name = Path(name).name
        if name not in complete:
            names = ", ".join(complete) or "none yet"
            raise UserError(f"{run}: no complete checkpoint {name}; there are {names}; or best, last, base, or a path")
        return complete[name], name
    if not complete:
        raise UserError(
            f"{run}: no complete checkpoint yet; continue training (hw3 train), or use the base model (--checkpoint "
            "base)"
        )
    last = list(complete.values())[-1]
    if name == "last":
        return last, f"{last.name}, the last of {len(complete)}"
    best = find_best_checkpoint(run, recipe, complete)
    if best is None:
        return last, f"{last.name}, the last: none is scored yet (hw3 eval {run.name} finds the best)"
    criterion = "" if best.chosen_by == "mean_perplexity" else f", chosen by {best.criterion}"
    score = f"mean perplexity {best.mean_perplexity:.3f} on {best.chosen_on}{criterion}"
    return complete[best.checkpoint], f"{best.checkpoint}, the best of those scored: {score}"


def find_best_checkpoint(run: Run, recipe: Recipe, complete: dict[str, Checkpoint]) -> BestCheckpoint | None:
    """Return the best checkpoint as recorded in the results on the dev rows, on `data.eval`, or else on any other file.

    Args:
        run: the run.
        recipe: the run's recipe.
        complete: the complete checkpoints by name. One that was deleted or trained again since is not the best.
    """
    order = [portable_path(path) for path in run.eval_files(recipe)]
    bests: dict[str, BestCheckpoint] = {}
    for results in run.read_results().values():
        best = results.best
        scored = {(entry.checkpoint, entry.adapter_sha256) for entry in results.entries}
        if best and best.checkpoint in complete and (best.checkpoint, complete[best.checkpoint].sha256) in scored:
            bests.setdefault(results.data.path, best)
    return next((bests[path] for path in [*order, *bests] if path in bests), None)


@dataclass(frozen=True)
class ScoredCheckpoint:
    """A complete checkpoint and its zero-shot scores under the run's own prompt, as `pack` and `export` need them.

    Attributes:
        run: the run.
        recipe: the run's recipe.
        manifest: the run's manifest.
        checkpoint: the checkpoint.
        data_file: the scored file, the recipe's `data.eval`.
        entry: the checkpoint's scores.
        base: the base model's scores; None if it was not scored.
        settings: how both were scored.
    """

    run: Run
    recipe: Recipe
    manifest: Manifest
    checkpoint: Checkpoint
    data_file: Path
    entry: ScoreEntry
    base: ScoreEntry | None
    settings: ScoringSettings


def select_scored_checkpoint(run: Run, name: str = "best") -> ScoredCheckpoint:
    """Return a checkpoint by name, with its scores on the recipe's `data.eval`.

    Args:
        run: the run.
        name: a checkpoint's name or step, or `best`, which `hw3 eval` has selected.

    Raises:
        UserError: there is no such run or checkpoint, or no score for its current prompt, rows and weights.
    """
    recipe = run.load_recipe()
    check_trained_as(run, recipe)
    checkpoints = {checkpoint.name: checkpoint for checkpoint in run.complete_checkpoints()}
    manifest = run.read_manifest()
    if not checkpoints or manifest is None:
        raise UserError(f"{run}: no complete checkpoint; train it first (make train RUN={shlex.quote(str(run))})")
    data_file = Path(recipe.data.eval)
    if not data_file.is_file():
        raise UserError(f"{data_file}: no such file; it is the run's data.eval, whose score is needed to compare with")
    advice = f"score the run first: make eval RUN={shlex.quote(str(run))} ({hw3_command('eval', run)})"
    found = run.read_results_on(data_file)
    if found is None:
        raise UserError(f"{run}: no scores on {data_file} with its current content; {advice}")
    _, results = found
    if name == "best":
        best = results.best
        if run.dev_file(recipe) is not None:  # whose scores may be newer
            best = find_best_checkpoint(run, recipe, checkpoints) or best
        if best is None:
            raise UserError(f"{run}: no checkpoint has been scored on {data_file}; {advice}")
        name = best.checkpoint
    checkpoint = checkpoints.get(name) or checkpoints.get(f"checkpoint-{name}")
    if checkpoint is None:
        raise UserError(f"{run}: no complete checkpoint {name}; there are {', '.join(checkpoints)}")
    zero_shot = _zero_shot_by_adapter(results, recipe)
    entry = zero_shot.get(checkpoint.sha256)
    if entry is None:
        raise UserError(f"{run}: {checkpoint.name} has no score on {data_file} with its current weights; {advice}")
    return ScoredCheckpoint(
        run=run,
        recipe=recipe,
        manifest=manifest,
        checkpoint=checkpoint,
        data_file=data_file,
        entry=entry,
        base=zero_shot.get(None),
        settings=results.settings,
    )


def _zero_shot_by_adapter(results: ResultsFile, recipe: Recipe) -> dict[str | None, ScoreEntry]:
    """Return the zero-shot entries under the recipe's prompt, by hash of the adapter; None for the base model."""
    found: dict[str | None, ScoreEntry] = {}
    for entry in results.entries:
        if entry.shots == 0 and entry.prompt.sha256 == recipe.prompt.sha256:
            found.setdefault(entry.adapter_sha256, entry)
    return found
