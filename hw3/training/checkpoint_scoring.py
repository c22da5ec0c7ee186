"""Score checkpoints while a run trains, and decide whether it goes on.

How a checkpoint is scored is not known here: `hw3.evaluation.during_training` builds a `CheckpointScorer`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from hw3.common.errors import RunError, first_line
from hw3.config.recipe import Recipe
from hw3.data.fingerprint import DatasetFingerprint
from hw3.data.rows import DataFileKey
from hw3.modeling.adapter_slot import AdapterSlot, build_lora_config, uses_only_own_tensors
from hw3.modeling.devices import select_device
from hw3.modeling.quantization import should_dequantize
from hw3.modeling.shared_base import share_weights
from hw3.runs.checkpoints import Checkpoint
from hw3.runs.manifest import EarlyStop, Manifest, StopReason
from hw3.runs.open_run import load_for_inference
from hw3.runs.run import Run
from hw3.training.callbacks import CheckpointCompletionCallback, ProgressLineCallback, SignalCallback


@dataclass(frozen=True)
class CheckpointScore:
    """The scores of one checkpoint, for the progress line, the logs and the decision to stop.

    Attributes:
        step: optimizer steps; 0 for the base model.
        metrics: `mean_perplexity` and `token_perplexity`.
        data_file: path of the scored file, as `results.json` stores it.
        history: the figure that `evaluation.best_by` names, of every scored checkpoint of the run, by step.
        stop: why the run should end here; None to go on. Patience is decided by `CheckpointScoringCallback`.
    """

    step: int
    metrics: dict[str, float]
    data_file: str
    history: dict[int, float]
    stop: StopReason | None = None


class CheckpointScorer(Protocol):
    """Scores one checkpoint. All processes of a run call it, and it returns the same value on each."""

    def __call__(self, slot: AdapterSlot, checkpoint: Checkpoint | None) -> CheckpointScore | None:
        """Score a checkpoint, unless it has been scored already.

        Args:
            slot: the base model of the run.
            checkpoint: a complete checkpoint; None for the base model.

        Returns:
            The scores; None if there are none, because the checkpoint cannot be scored.
        """


def find_best_step(scores: Mapping[int, float]) -> int:
    """Return the step with the lowest score, the earliest of equals."""
    return min(scores, key=lambda step: (scores[step], step))


def count_without_improvement(scores: Mapping[int, float]) -> int:
    """Return how many checkpoints were scored after the best one.

    Args:
        scores: scores by step; lower is better.
    """
    best_step = find_best_step(scores)
    return sum(step > best_step for step in scores)


def find_early_stop(recipe: Recipe, previous: Manifest | None, resume_from: Checkpoint | None) -> EarlyStop | None:
    """Return why a run has ended early; None if it has not, or goes on under a recipe with another `evaluation`.

    Args:
        recipe: the recipe.
        previous: the manifest of the run that is resumed.
        resume_from: the checkpoint to resume from.
    """
    stop, evaluation = None if previous is None else previous.stopped_early, recipe.evaluation
    if stop is None or resume_from is None or resume_from.step < stop.step:
        return None
    if stop.reason == "pruned":
        return stop
    if stop.patience is None or evaluation.patience is None or not evaluation.during_training:
        return None
    return stop if evaluation.patience <= stop.patience and evaluation.best_by == stop.best_by else None


def describe_early_stop(stop: EarlyStop) -> str:
    """Return why a run was stopped early, as a part of a sentence."""
    if stop.reason == "pruned":
        return "the search pruned it"
    checkpoints = "1 checkpoint" if stop.patience == 1 else f"{stop.patience} checkpoints"
    return f"{stop.best_by} has not improved for {checkpoints}; a larger evaluation.patience continues it"


def _can_share_weights(recipe: Recipe) -> bool:
    """Return whether neither training nor a checkpoint changes the weights of the base model."""
    if recipe.lora is None or recipe.model.device_map is not None:
        return False
    return uses_only_own_tensors(build_lora_config(recipe.lora))


def build_scoring_slot(recipe: Recipe, model: PreTrainedModel, base_parameters: int) -> AdapterSlot:
    """Return a slot in which saved checkpoints are scored while the base model is trained.

    It shares the weights of the base model if training leaves them unchanged. If not, the base is loaded again.

    Args:
        recipe: the recipe.
        model: the base model, before adapters are added.
        base_parameters: number of its parameters.
    """
    dequantized = should_dequantize(recipe, base_parameters, select_device(recipe))
    is_shared = _can_share_weights(recipe)
    if is_shared:
        base = share_weights(model, dequantized=dequantized)
    else:
        base = load_for_inference(recipe, dequantized=dequantized)
    reload_base = partial(load_for_inference, recipe, dequantized=False)
    return AdapterSlot(base, reload_base, dequantized=dequantized, is_shared=is_shared)


def describe_scoring(
    recipe: Recipe, schedule: SaveSchedule, data: Mapping[DataFileKey, DatasetFingerprint]
) -> list[str]:
    """Return a line on what is scored during training, if anything is.

    Args:
        recipe: the recipe.
        schedule: the steps at which checkpoints are saved.
        data: the data files by key.
    """
    if not recipe.evaluation.during_training:
        return []
    scored, checkpoints = data.get("dev", data["eval"]), len(schedule.steps())
    lines = [
        f"scored during training, in addition to the time of the steps: the base model and {checkpoints} checkpoints, "
        f"on {scored.rows} rows of {scored.path}"
    ]
    if not _can_share_weights(recipe):
        lines.append("  for this, the base model is in memory a second time, because checkpoints change its weights")
    return lines


class SaveSchedule:
    """The steps at which a run saves checkpoints, however often it is interrupted.

    Only these count for patience, so that a run that was stopped by a signal, which saves another checkpoint, ends at
    the step of an uninterrupted run.

    Args:
        args: the Trainer's arguments.
        steps: optimizer steps of the run.
        steps_per_epoch: optimizer steps of one epoch.

    Attributes:
        last_step: optimizer steps of the run.
    """

    def __init__(self, args: TrainingArguments, steps: int, steps_per_epoch: int) -> None:
        self.last_step = steps
        self._interval = float(steps_per_epoch)
        if args.save_strategy == SaveStrategy.STEPS:
            self._interval = args.save_steps if args.save_steps >= 1 else math.ceil(args.save_steps * steps)

    def steps(self) -> list[int]:
        """Return the steps."""
        return [step for step in range(1, self.last_step + 1) if step in self]

    def __contains__(self, step: int) -> bool:
        return step == self.last_step or step % self._interval == 0


class CheckpointScoringCallback(TrainerCallback):
    """Score each checkpoint as soon as it is complete; log its scores, and stop the run if they do not improve.

    Args:
        score: scores a checkpoint.
        slot: the base model in which checkpoints are scored.
        recipe: the recipe.
        schedule: the checkpoints that count for patience.
        checkpoints: completes the checkpoints.
        signals: knows whether the run is being stopped.
        progress: shows the last score.
        log: logs metrics, given a state and the metrics.

    Attributes:
        early_stop: why the run ends early; None if it goes on.
    """

    def __init__(
        self,
        score: CheckpointScorer,
        slot: AdapterSlot,
        recipe: Recipe,
        schedule: SaveSchedule,
        *,
        checkpoints: CheckpointCompletionCallback,
        signals: SignalCallback,
        progress: ProgressLineCallback,
        log: Callable[[TrainerState, dict[str, float]], object],
    ) -> None:
        self._score_checkpoint, self._slot, self._evaluation = score, slot, recipe.evaluation
        self._schedule, self._checkpoints, self._signals = schedule, checkpoints, signals
        self._progress, self._log_metrics = progress, log
        self._unlogged: list[CheckpointScore] = []  # scores from before the loggers were ready
        self.early_stop: EarlyStop | None = None

    def catch_up(self, checkpoints: list[Checkpoint]) -> None:
        """Score the base model, and the checkpoints that an earlier session completed but did not score.

        Args:
            checkpoints: the complete checkpoints of the run, up to the one that it resumes from.
        """
        PartialState().wait_for_everyone()  # the first process has written recipe and manifest
        for checkpoint in (None, *checkpoints):
            score = self._score(checkpoint)
            if score is not None:
                self._unlogged.append(score)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Log the scores of `catch_up`."""
        for score in self._unlogged:
            self._log(score, state, seconds=0.0)
        self._unlogged = []

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Score the checkpoint. A run that a signal stops leaves this to the session that resumes it."""
        if self._signals.signal:
            return
        started = time.monotonic()
        self._checkpoints.wait()
        PartialState().wait_for_everyone()
        assert args.output_dir is not None, "`build_sft_config` sets the run folder"
        run = Run(Path(args.output_dir))
        checkpoint = next(found for found in run.complete_checkpoints() if found.step == state.global_step)
        score = self._score(checkpoint)
        if score is not None:
            self._log(score, state, time.monotonic() - started)
        if self.early_stop is not None:
            control.should_training_stop = True

    def _score(self, checkpoint: Checkpoint | None) -> CheckpointScore | None:
        with _training_undisturbed(self._slot.model.device):
            try:
                score = self._score_checkpoint(self._slot, checkpoint)
            except torch.OutOfMemoryError as error:
                # Not to be mistaken for a training step that ran out of memory.
                name = "the base model" if checkpoint is None else checkpoint.path
                raise RunError(
                    f"{name}: out of memory in scoring: {first_line(error)[:300]}\nset evaluation.tokens_per_batch to "
                    "a lower number, or evaluation.during_training=false, and run the same command to resume"
                ) from error
        if score is not None and checkpoint is not None:
            self.early_stop = self._decide(score)
            self._checkpoints.best_step = find_best_step(score.history)
        return score

    def _decide(self, score: CheckpointScore) -> EarlyStop | None:
        """Return whether, and why, the run ends with this checkpoint."""
        reason, patience = score.stop, self._evaluation.patience
        counted = {
            step: value for step, value in score.history.items() if step <= score.step and step in self._schedule
        }
        if reason is None and patience is not None and counted and count_without_improvement(counted) >= patience:
            reason = "patience"
        if reason is None or score.step >= self._schedule.last_step:
            return None
        return EarlyStop(step=score.step, reason=reason, patience=patience, best_by=self._evaluation.best_by)

    def _log(self, score: CheckpointScore, state: TrainerState, seconds: float) -> None:
        best_by = self._evaluation.best_by
        text = f"{best_by.replace('_', ' ')} {score.metrics[best_by]:.3f} at step {score.step}"
        self._progress.set_score(text, seconds)
        state = copy.copy(state)
        state.global_step = score.step
        self._log_metrics(state, {f"eval_{name}": value for name, value in score.metrics.items()})


@contextmanager
def _training_undisturbed(device: torch.device) -> Iterator[None]:
    """Keep the generators' states, and free the memory that the block has reserved and training may need."""
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.empty_cache()  # what training has reserved but does not use now is free for scoring
    try:
        with torch.random.fork_rng(devices=[device] if is_cuda else []):
            yield
    finally:
        if is_cuda:
            torch.cuda.empty_cache()
