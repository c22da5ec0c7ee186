"""`hw3 train`: fine-tune a base model on a recipe's rows, and write a run folder of complete checkpoints.

Read `train` from top to bottom. Three things make up a run:

- the rows: `plan_run` encodes each row as prompt and output with `Encoder(tokenizer, recipe.prompt)`;
- the collator: `CompletionOnlyCollator` pads a batch and puts labels on the outputs only;
- the trainer: `CompletionTrainer` is a subclass of TRL's `SFTTrainer`.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import logging
import shutil
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from hw3.common.atomic_io import write_atomically
from hw3.common.distributed import assert_same_across_ranks, get_rank, get_world_size
from hw3.common.errors import RunError
from hw3.common.shell_commands import next_command
from hw3.config.recipe import Recipe
from hw3.data.collator import CompletionOnlyCollator
from hw3.data.sampler import StepSampler
from hw3.data.tokenization import EncodedRow
from hw3.modeling.adapter_slot import build_lora_config
from hw3.modeling.devices import select_device
from hw3.modeling.loading import load_base_model
from hw3.modeling.quantization import dequantize
from hw3.runs.checkpoints import remove_incomplete_checkpoints
from hw3.runs.lock import LOCK_FILE, exclusive_lock
from hw3.runs.run import Run
from hw3.training.plan import Plan, plan_run
from hw3.training.run_manifest import build_manifest, build_session
from hw3.training.sharding import sharding_from_env
from hw3.training.step_strategy import StepStrategy
from hw3.training.trainer import CompletionTrainer  # a subclass of trl.SFTTrainer

logger = logging.getLogger(__name__)


def train(recipe: Recipe, run_dir: Path, *, break_lock: bool = False) -> int:
    """Fine-tune, or resume an interrupted run. All user errors are reported before anything is written.

    Args:
        recipe: the checked recipe.
        run_dir: the run folder; created if it does not exist.
        break_lock: write to the run folder even if another process holds its lock.

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
        return _train(recipe, Run(run_dir))


def _train(recipe: Recipe, run: Run) -> int:
    # --- check ------------------------------------------------------------------------------------------------------
    started = time.time()
    plan = plan_run(recipe, run.path, get_world_size(), sharding_from_env())
    _log_lines(plan.notes)
    assert_same_across_ranks(_summarize(plan, run.path))
    if plan.is_complete:
        _print_outcome(f"{run} is complete: step {plan.steps} of {plan.steps}. Next: {next_command('eval', run.path)}")
        return 0
    _log_lines(_describe_unused_gpus(recipe))

    # --- build: base model, collator, trainer -----------------------------------------------------------------------
    trainer = _load_model_and_build_trainer(plan)

    # --- verify: the CUDA-graph step must agree with TRL's ----------------------------------------------------------
    if plan.strategy.cuda_graphs and (failure := _capture_cuda_graph_step(trainer)):
        del trainer  # its memory must be free before the base model is loaded again
        _free_memory()
        plan = plan.without_cuda_graphs(run.path, f"the CUDA-graph step {failure}")
        _log_lines(plan.notes)
        trainer = _load_model_and_build_trainer(plan)

    # --- write and train --------------------------------------------------------------------------------------------
    while (smaller := _train_until_out_of_memory(trainer, plan, run)) is not None:
        del trainer
        _free_memory()
        plan = smaller
        _log_lines(plan.notes)
        trainer = _load_model_and_build_trainer(plan)

    # --- close: record the session ----------------------------------------------------------------------------------
    session = build_session(trainer, started, plan.first_step)
    if trainer.args.should_save:
        manifest = run.read_manifest()
        if manifest is None:
            raise RunError(f"{run.manifest_path}: was deleted during training; run the same command again")
        manifest.sessions.append(session)
        manifest.write(run.manifest_path)
    if trainer.stop.signal and session.to_step < plan.steps:
        _print_outcome(f"stopped at step {session.to_step} of {plan.steps}; run the same command to resume")
        return 128 + trainer.stop.signal
    _print_outcome(f"{run}: {plan.steps} steps done. Next: {next_command('eval', run.path)}")
    return 0


def _train_until_out_of_memory(trainer: CompletionTrainer, plan: Plan, run: Run) -> Plan | None:
    """Write recipe, manifest and tokenizer, and train.

    Returns:
        None after training; after a step that ran out of memory, the plan for the rest of the run.
    """
    if trainer.args.should_save:
        _write_run_files(run, plan)
    if plan.resume_from is not None:
        logger.info(f"resuming {run} from step {plan.first_step} of {plan.steps}")
    try:
        with trainer.stop.installed():
            trainer.train(resume_from_checkpoint=None if plan.resume_from is None else str(plan.resume_from.path))
    except torch.OutOfMemoryError:
        smaller = plan.with_less_memory(run.path) if get_world_size() == 1 else None  # others wait in the step
        if smaller is None:
            raise
        return smaller
    return None


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


def _load_model_and_build_trainer(plan: Plan) -> CompletionTrainer:
    recipe = plan.workload.recipe
    model = load_base_model(recipe, select_device(recipe))
    if plan.strategy.dequantized:
        model = dequantize(model)
    return build_trainer(recipe, plan.config, plan.strategy, model, plan.tokenizer, plan.rows)


def _capture_cuda_graph_step(trainer: CompletionTrainer) -> str | None:
    """Capture the CUDA-graph step; return why it cannot be used, or None."""
    logger.info(f"capturing {len(trainer.strategy.bucket_lengths)} bucket lengths; the layers are compiled first")
    failure = trainer.capture()
    if failure is None:
        logger.info(f"captured in {trainer.capture_seconds:.0f} s; the first step's loss and gradient agree with TRL's")
    return failure


def _free_memory() -> None:
    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()


def _write_run_files(run: Run, plan: Plan) -> None:
    """Write manifest, recipe and tokenizer; delete incomplete checkpoints."""
    previous = None if plan.resume_from is None else run.read_manifest()
    for folder in remove_incomplete_checkpoints(run.path):
        logger.info(f"{folder}: not complete, removed")
    manifest = build_manifest(plan, previous)
    manifest.write(run.manifest_path)
    write_atomically(run.recipe_path, plan.workload.recipe.to_yaml())
    _save_tokenizer(plan.tokenizer, run.tokenizer_path)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer file by file, so that an earlier session's files stay intact if the disk is full."""
    staging = folder.with_name(f".{folder.name}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        tokenizer.save_pretrained(staging)
        folder.mkdir(exist_ok=True)
        for path in staging.iterdir():
            path.replace(folder / path.name)
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
