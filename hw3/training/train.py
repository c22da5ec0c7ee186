"""`hw3 train`: fine-tune a base model on a recipe's rows, and write a run folder of complete checkpoints.

Read `train` from top to bottom. Three things make up a run:

- the rows: `plan_run` encodes each row as prompt and output with `Encoder(tokenizer, recipe.prompt)`;
- the collator: `CompletionOnlyCollator` pads a batch and puts labels on the outputs only;
- the trainer: `CompletionTrainer` is a subclass of TRL's `SFTTrainer`.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState
from trl import SFTConfig

from hw3.common.atomic_io import write_atomically
from hw3.common.distributed import assert_same_across_ranks, get_rank, get_world_size
from hw3.common.errors import RunError
from hw3.common.shell_commands import next_command
from hw3.config.recipe import Recipe
from hw3.data.collator import CompletionOnlyCollator
from hw3.data.sampler import StepSampler
from hw3.data.tokenization import EncodedRow
from hw3.modeling.adapter_slot import AdapterSlot, build_lora_config
from hw3.modeling.devices import select_device
from hw3.runs.checkpoints import Checkpoint, remove_damaged_files, remove_incomplete_checkpoints
from hw3.runs.eval_rows import write_dev_rows
from hw3.runs.lock import LOCK_FILE, exclusive_lock
from hw3.runs.manifest import EarlyStop
from hw3.runs.run import Run
from hw3.training.checkpoint_scoring import (
    CheckpointScorer,
    CheckpointScoringCallback,
    build_scoring_slot,
    describe_early_stop,
)
from hw3.training.plan import Plan, PlanCache, plan_run
from hw3.training.run_manifest import build_manifest, build_session
from hw3.training.session import TrainingSession
from hw3.training.sharding import sharding_from_env
from hw3.training.step_strategy import StepStrategy
from hw3.training.trainer import CompletionTrainer  # a subclass of trl.SFTTrainer

logger = logging.getLogger(__name__)


def train(
    recipe: Recipe,
    run_dir: Path,
    *,
    break_lock: bool = False,
    session: TrainingSession | None = None,
    score_checkpoint: CheckpointScorer | None = None,
) -> int:
    """Fine-tune, or resume an interrupted run. All user errors are reported before anything is written.

    Args:
        recipe: the checked recipe.
        run_dir: the run folder; created if it does not exist.
        break_lock: write to the run folder even if another process holds its lock.
        session: what the runs of this process share; None for a single run.
        score_checkpoint: scores each checkpoint as soon as it is complete, and may end the run; None to score none.

    Returns:
        0, or 128 plus a signal's number if the signal stopped the run after a complete checkpoint.

    Raises:
        UserError: recipe, data, machine or run folder are wrong, or another process trains in the run folder; nothing
            has been written.
        NonFiniteLossError: the loss became NaN or infinite.
    """
    is_first_process = get_rank() == 0  # if it is refused, the launcher ends the others
    lock = exclusive_lock(run_dir / LOCK_FILE, str(run_dir), break_lock=break_lock)
    with lock if is_first_process else contextlib.nullcontext():
        try:
            return _train(recipe, Run(run_dir), session or TrainingSession(), score_checkpoint)
        finally:
            # It takes a second, in which a launcher would end this process before it has reported a failure.
            if session is not None:
                session.restore()


def _train(recipe: Recipe, run: Run, shared: TrainingSession, score_checkpoint: CheckpointScorer | None) -> int:
    # --- check ------------------------------------------------------------------------------------------------------
    started = time.time()
    plan = plan_run(recipe, run.path, get_world_size(), sharding_from_env(), shared.cache)
    _log_lines(plan.notes)
    assert_same_across_ranks(_summarize(plan, run.path))
    if plan.is_complete:
        _print_outcome(f"{run} is {_describe_end(plan, plan.stopped_early)}. Next: {next_command('eval', run.path)}")
        return 0
    _log_lines(_describe_unused_gpus(recipe))

    # --- build: base model, collator, trainer -----------------------------------------------------------------------
    trainer = _load_model_and_build_trainer(plan, shared, score_checkpoint)

    # --- verify: the CUDA-graph step must agree with TRL's ----------------------------------------------------------
    while plan.strategy.cuda_graphs and (failure := _capture_cuda_graph_step(trainer, plan, shared)):
        was_reused = shared.captured_step is not None
        del trainer  # its memory must be free before the base model is loaded again
        shared.discard()
        if was_reused:
            logger.info(f"the CUDA-graph step {failure}, so it is captured again")
        else:
            plan = plan.without_cuda_graphs(run.path, f"the CUDA-graph step {failure}")
            _log_lines(plan.notes)
        trainer = _load_model_and_build_trainer(plan, shared, score_checkpoint)

    # --- write and train --------------------------------------------------------------------------------------------
    while (smaller := _train_until_out_of_memory(trainer, plan, run, shared.cache)) is not None:
        del trainer
        shared.discard()
        plan = smaller
        _log_lines(plan.notes)
        trainer = _load_model_and_build_trainer(plan, shared, score_checkpoint)

    # --- close: record the session ----------------------------------------------------------------------------------
    session = build_session(trainer, started, plan.first_step)
    early_stop = None if trainer.scoring is None else trainer.scoring.early_stop
    if trainer.args.should_save:
        manifest = run.read_manifest()
        if manifest is None:
            raise RunError(f"{run.manifest_path}: was deleted during training; run the same command again")
        manifest.sessions.append(session)
        manifest.stopped_early = early_stop
        manifest.write(run.manifest_path)
    if trainer.stop.signal and session.to_step < plan.steps:
        _print_outcome(f"stopped at step {session.to_step} of {plan.steps}; run the same command to resume")
        return 128 + trainer.stop.signal
    outcome = f"{plan.steps} steps done" if early_stop is None else _describe_end(plan, early_stop)
    _print_outcome(f"{run}: {outcome}. Next: {next_command('eval', run.path)}")
    return 0


def _describe_end(plan: Plan, early_stop: EarlyStop | None) -> str:
    """Return how far a run that has ended has come, and why it ended there."""
    if early_stop is None:
        return f"complete: step {plan.steps} of {plan.steps}"
    return f"done at step {early_stop.step} of {plan.steps}: {describe_early_stop(early_stop)}"


def _train_until_out_of_memory(trainer: CompletionTrainer, plan: Plan, run: Run, cache: PlanCache) -> Plan | None:
    """Write recipe, manifest and tokenizer, and train.

    Returns:
        None after training; after a step that ran out of memory, the plan for the rest of the run.
    """
    if trainer.args.should_save:
        _write_run_files(run, plan, cache)
    if plan.resume_from is not None:
        logger.info(f"resuming {run} from step {plan.first_step} of {plan.steps}")
    try:
        with trainer.stop.installed():
            if trainer.scoring is not None:
                trainer.scoring.catch_up(_list_checkpoints_before(plan, run))
                if trainer.scoring.early_stop is not None:
                    trainer.state.global_step = plan.first_step
                    return None
            trainer.train(resume_from_checkpoint=None if plan.resume_from is None else str(plan.resume_from.path))
    except torch.OutOfMemoryError:
        smaller = plan.with_less_memory(run.path) if get_world_size() == 1 else None  # others wait in the step
        if smaller is None:
            raise
        return smaller
    return None


def _list_checkpoints_before(plan: Plan, run: Run) -> list[Checkpoint]:
    """Return the complete checkpoints up to the one that a run resumes from; none for a new run."""
    if plan.resume_from is None:
        return []
    return [checkpoint for checkpoint in run.complete_checkpoints() if checkpoint.step <= plan.first_step]


def build_trainer(
    recipe: Recipe,
    config: SFTConfig,
    strategy: StepStrategy,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[EncodedRow],
    trainer_class: type[CompletionTrainer] = CompletionTrainer,
) -> CompletionTrainer:
    """Build the trainer of a run: dataset, collator, row order and adapters.

    Args:
        recipe: the recipe.
        config: TRL's arguments, from `build_sft_config`.
        strategy: how steps are computed.
        model: the base model, without adapters.
        tokenizer: the base model's tokenizer.
        rows: encoded training rows.
        trainer_class: the class to build.
    """
    dataset = Dataset.from_dict({"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]})
    collator = CompletionOnlyCollator(
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
        strategy.bucket_lengths,
        return_output_positions=strategy.cuda_graphs,
    )
    return trainer_class(
        model=model,
        args=config,
        train_dataset=dataset,
        data_collator=collator,
        processing_class=tokenizer,
        peft_config=None if recipe.lora is None else build_lora_config(recipe.lora),
        sampler=StepSampler([len(row) for row in rows], strategy.layout.rows_per_step, recipe.seed),
        row_ids=[row.id for row in rows],
        strategy=strategy,
        save_total_limit=recipe.training.get("save_total_limit"),
    )


def _load_model_and_build_trainer(
    plan: Plan, shared: TrainingSession, score_checkpoint: CheckpointScorer | None
) -> CompletionTrainer:
    recipe, model = plan.workload.recipe, shared.take_base(plan)
    # Before the trainer adds adapters to the model.
    slot = None if score_checkpoint is None else build_scoring_slot(recipe, model, plan.total_parameters)
    trainer = build_trainer(recipe, plan.config, plan.strategy, model, plan.tokenizer, plan.rows)
    if score_checkpoint is not None and slot is not None:
        _add_scoring(trainer, plan, score_checkpoint, slot)
    return trainer


def _add_scoring(trainer: CompletionTrainer, plan: Plan, score: CheckpointScorer, slot: AdapterSlot) -> None:
    """Let the trainer score each checkpoint as soon as it is complete."""
    recipe = plan.workload.recipe

    def log(state: TrainerState, metrics: dict[str, float]) -> None:
        # `Trainer.log` would average and clear the metrics of the steps since the last log.
        trainer.callback_handler.on_log(trainer.args, state, trainer.control, metrics)

    trainer.scoring = CheckpointScoringCallback(
        score,
        slot,
        recipe,
        plan.save_schedule,
        checkpoints=trainer.checkpoints,
        signals=trainer.stop,
        progress=trainer.progress,
        log=log,
    )
    trainer.add_callback(trainer.scoring)


def _capture_cuda_graph_step(trainer: CompletionTrainer, plan: Plan, shared: TrainingSession) -> str | None:
    """Capture the CUDA-graph step, or take the session's; return why it cannot be used, or None."""
    if shared.captured_step is None:
        logger.info(f"capturing {len(trainer.strategy.bucket_lengths)} bucket lengths; the layers are compiled first")
    failure = trainer.capture(shared.captured_step)
    if failure is None:
        if shared.captured_step is None:
            agreement = "the first step's loss and gradient agree with TRL's"
            logger.info(f"captured in {trainer.capture_seconds:.0f} s; {agreement}")
        else:
            logger.info("reused the captured step; it computes loss and gradient as when it was captured")
        shared.keep_step(plan, trainer.verified_step)
    return failure


def _write_run_files(run: Run, plan: Plan, cache: PlanCache) -> None:
    """Write manifest, recipe and tokenizer; delete incomplete and damaged checkpoints."""
    previous = None if plan.resume_from is None else run.read_manifest()
    for folder in remove_incomplete_checkpoints(run.path):
        logger.info(f"{folder}: not complete, removed")
    for path in remove_damaged_files(run.path, after=plan.first_step):
        logger.info(f"{path}: damaged, removed")
    manifest = build_manifest(plan, previous)
    manifest.write(run.manifest_path)
    write_atomically(run.recipe_path, plan.workload.recipe.to_yaml())
    write_dev_rows(run, plan.workload.recipe)
    _save_tokenizer(plan, run.tokenizer_path, cache)


def _save_tokenizer(plan: Plan, folder: Path, cache: PlanCache) -> None:
    """Save a tokenizer file by file, so that an earlier session's files stay intact if the disk is full."""
    staging = folder.with_name(f".{folder.name}")

    def serialize() -> dict[Path, bytes]:  # takes a second for a large vocabulary
        plan.tokenizer.save_pretrained(staging)
        # Additional chat templates are in a folder.
        return {path.relative_to(staging): path.read_bytes() for path in staging.rglob("*") if path.is_file()}

    shutil.rmtree(staging, ignore_errors=True)
    try:
        key = ("tokenizer files", plan.workload.recipe.model, plan.content["tokenizer"])
        files = cache.get(serialize, key)
        for name, content in files.items():
            for path in (staging / name, folder / name):
                path.parent.mkdir(parents=True, exist_ok=True)
            (staging / name).write_bytes(content)
            (staging / name).replace(folder / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _summarize(plan: Plan, run_dir: Path) -> dict[str, str]:
    """Return the values that must be equal in all processes, with user-facing names."""
    checkpoint = plan.resume_from
    return {
        f"{run_dir}": f"step {checkpoint.step} ({checkpoint.sha256[:8]})" if checkpoint else "no checkpoint",
        "recipe": hashlib.sha256(plan.workload.recipe.to_yaml().encode()).hexdigest()[:8],
        **{key: sha256[:8] for key, sha256 in plan.content.items()},
    }


def _describe_unused_gpus(recipe: Recipe) -> list[str]:
    """Return a line on how to use all GPUs if this run uses only one of several."""
    uses_one = select_device(recipe).type == "cuda" and get_world_size() == 1 and recipe.model.device_map is None
    count = torch.cuda.device_count()
    if not uses_one or count == 1:
        return []
    commands = f"make train GPUS={count}, or accelerate launch --num_processes {count} -m hw3 train ..."
    return [f"using the first of {count} GPUs; to use all of them: {commands}"]


def _log_lines(lines: list[str]) -> None:
    for line in lines:
        logger.info(line)


def _print_outcome(line: str) -> None:
    """Print a line to standard output, in the first process only."""
    if get_rank() == 0:
        print(line, flush=True)
