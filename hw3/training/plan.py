"""Plan a run: check recipe, machine, data, base model and run folder before anything is written."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from hw3.common.disk import check_disk_space, check_writable
from hw3.common.distributed import get_world_size
from hw3.common.errors import ProblemCollector, UserError
from hw3.common.hashing import file_sha256
from hw3.config.data_files import list_data_files, read_data_files
from hw3.config.recipe import Recipe
from hw3.data.fingerprint import DatasetFingerprint, dataset_fingerprint
from hw3.data.input_limits import InputLimits
from hw3.data.rows import DataFileKey, Row
from hw3.data.tokenization import EncodedRow, count_tokens
from hw3.modeling.devices import describe_device, find_device_problems, resolve_dtype, select_device
from hw3.modeling.fingerprint import hash_base_model, hash_tokenizer
from hw3.modeling.four_bit_product import find_4bit_problem
from hw3.modeling.loading import count_parameters, load_model_config, load_tokenizer
from hw3.modeling.quantization import find_quantization_problems
from hw3.runs.checkpoints import Checkpoint
from hw3.runs.eval_rows import fingerprint_dev_rows
from hw3.runs.manifest import EarlyStop, Manifest, installed_versions
from hw3.runs.resume import check_optimizer_state, check_same_content, check_same_recipe
from hw3.runs.run import Run
from hw3.training.batch_layout import divide_batch
from hw3.training.checkpoint_scoring import SaveSchedule, describe_scoring, find_early_stop
from hw3.training.library_checks import find_library_problems, find_lora_problems
from hw3.training.loss_check import find_loss_problem
from hw3.training.sft_arguments import (
    PROCESS_TIMEOUT_SECONDS,
    build_sft_config,
    count_optimizer_steps,
    estimate_checkpoint_bytes,
)
from hw3.training.sharding import Sharding, find_sharding_problems
from hw3.training.step_strategy import StepStrategy, Workload, choose_step_strategy
from hw3.training.training_data import check_input_limits, encode_training_rows

T = TypeVar("T")

logger = logging.getLogger(__name__)


class PlanCache:
    """What is computed longest before a run and its scoring, for the next runs in the same process."""

    def __init__(self) -> None:
        self._values: dict[str, object] = {}

    def get(self, compute: Callable[[], T], key: tuple[object, ...]) -> T:
        """Return the result of a function; a stored one if the key, everything that the result depends on, is equal."""
        text = repr(key)
        if text not in self._values:
            self._values[text] = compute()
        return self._values[text]  # type: ignore[return-value]


class BaseModelUnavailableError(UserError):
    """The base model's configuration or tokenizer cannot be loaded; lists this and all other problems."""


@dataclass(frozen=True)
class Plan:
    """A run that has been checked; nothing has been written.

    Attributes:
        workload: what the steps must compute.
        strategy: how they are computed.
        config: TRL's arguments.
        tokenizer: the base model's tokenizer.
        rows: encoded training rows.
        data: fingerprint of each data file, by key in the `data` section.
        content: hashes of the training rows (`train`), the base model (`base`) and the tokenizer (`tokenizer`).
        total_parameters: number of parameters of the base model.
        steps: optimizer steps of the complete run.
        resume_from: the checkpoint to resume from; None for a new run.
        stopped_early: why the run has ended before its last step; None if it has not.
        notes: lines for the user.
    """

    workload: Workload
    strategy: StepStrategy
    config: SFTConfig
    tokenizer: PreTrainedTokenizerBase
    rows: list[EncodedRow]
    data: dict[DataFileKey, DatasetFingerprint]
    content: dict[str, str]
    total_parameters: int
    steps: int
    resume_from: Checkpoint | None
    stopped_early: EarlyStop | None
    notes: list[str]

    @property
    def first_step(self) -> int:
        """Optimizer steps that have been done already."""
        return 0 if self.resume_from is None else self.resume_from.step

    @property
    def is_complete(self) -> bool:
        """Whether no step is left to train."""
        has_all_steps = self.resume_from is not None and self.resume_from.step >= self.steps
        return has_all_steps or self.stopped_early is not None

    @property
    def save_schedule(self) -> SaveSchedule:
        """The steps at which the complete run saves checkpoints."""
        return SaveSchedule(self.config, self.steps, len(self.rows) // self.workload.recipe.rows_per_step)

    def without_cuda_graphs(self, run_dir: Path, failure: str) -> Plan:
        """Return the plan with TRL's step, with notes only on this change.

        Args:
            run_dir: the run folder.
            failure: why the CUDA-graph step cannot be used.
        """
        strategy = select_step_strategy(self.workload, failure=failure)
        config = build_sft_config(self.workload.recipe, strategy, run_dir)
        return replace(self, strategy=strategy, config=config, notes=strategy.notes)

    def with_less_memory(self, run_dir: Path) -> Plan | None:
        """Return the plan for the rest of the run after a step ran out of memory, with notes only on this change.

        The rows per step stay the same. TRL's step replaces the CUDA-graph step; after that, micro-batches are halved.

        Args:
            run_dir: the run folder, whose newest checkpoint is the one to resume from.

        Returns:
            The plan; None if a micro-batch has one row already.
        """
        recipe, layout = self.workload.recipe, self.strategy.layout
        if self.strategy.cuda_graphs:
            strategy = select_step_strategy(self.workload, failure="the CUDA-graph step ran out of memory")
        elif layout.rows_per_device > 1:
            smaller = layout.split_micro_batches()
            note = (
                f"out of memory with {layout.rows_per_device} rows x {layout.accumulation}; continuing with "
                f"{smaller.rows_per_device} x {smaller.accumulation}: the same loss over the step's tokens"
            )
            strategy = replace(self.strategy, layout=smaller, notes=[note])
        else:
            return None
        return replace(
            self,
            strategy=strategy,
            config=build_sft_config(recipe, strategy, run_dir),
            resume_from=_find_resumable_checkpoint(Run(run_dir), recipe, self.content),
            notes=strategy.notes,
        )


@dataclass(frozen=True)
class _Inputs:
    """What was read of the data files and the base model; no weights."""

    workload: Workload
    tokenizer: PreTrainedTokenizerBase
    rows_by_file: dict[DataFileKey, list[Row]]
    rows: list[EncodedRow]
    total_parameters: int
    notes: list[str]


def resolve_run_dtype(recipe: Recipe, run_dir: Path) -> Recipe:
    """Replace `model.dtype: auto` by the dtype of the run in the folder, if there is one, or by this machine's best.

    Raises:
        UserError: the folder's recipe is wrong.
    """
    if recipe.model.dtype != "auto":
        return recipe
    run = Run(run_dir)
    return resolve_dtype(recipe, run.load_recipe() if run.exists() else None)


def plan_run(
    recipe: Recipe, run_dir: Path, processes: int, sharding: Sharding | None = None, cache: PlanCache | None = None
) -> Plan:
    """Check recipe, machine, data, model and run folder together; load no weights and write nothing.

    Args:
        recipe: the checked recipe.
        run_dir: the run folder, which need not exist.
        processes: number of processes of the run.
        sharding: what the launcher shards the model with, from `sharding_from_env`.
        cache: results from other runs of this process.

    Raises:
        UserError: lists all problems.
        BaseModelUnavailableError: lists the problems that can be found without the base model.
    """
    cache, recipe = cache or PlanCache(), resolve_run_dtype(recipe, run_dir)
    inputs = _check_inputs(recipe, run_dir, processes, sharding, cache)
    run = Run(run_dir)
    data = _fingerprint(run, recipe, inputs.rows_by_file)
    content = {
        "train": data["train"].sha256,
        "base": hash_base_model(recipe.model),
        "tokenizer": cache.get(lambda: hash_tokenizer(inputs.tokenizer), ("hash of tokenizer", recipe.model)),
    }
    resume_from = _find_resumable_checkpoint(run, recipe, content)
    previous = None if resume_from is None else run.read_manifest()
    strategy = select_step_strategy(inputs.workload, previous)
    try:
        config = build_sft_config(recipe, strategy, run_dir)
    except (ValueError, ImportError) as error:
        raise UserError(f"training: {error}") from error
    steps = count_optimizer_steps(config, len(inputs.rows), recipe.rows_per_step)
    if resume_from is not None and resume_from.step < steps:
        check_optimizer_state(resume_from, sharding, processes)
    plan = Plan(
        inputs.workload,
        strategy,
        config,
        inputs.tokenizer,
        inputs.rows,
        data,
        content,
        inputs.total_parameters,
        steps,
        resume_from,
        find_early_stop(recipe, previous, resume_from),
        [*inputs.notes, *strategy.notes, *_describe_changed_software(previous, select_device(recipe))],
    )
    return replace(plan, notes=[*plan.notes, *_describe_run(plan, run_dir)])


def _check_inputs(
    recipe: Recipe, run_dir: Path, processes: int, sharding: Sharding | None, cache: PlanCache
) -> _Inputs:
    """Read data files, tokenizer and the base model's configuration, and report all their problems together.

    Raises:
        UserError: lists all problems.
    """
    found = ProblemCollector([*find_device_problems(recipe, processes), *find_sharding_problems(recipe, sharding)])
    if recipe.quantization is not None and not found.problems:
        problem = find_4bit_problem(select_device(recipe))
        found.problems += [] if problem is None else [f"quantization: {problem}"]
    layout = found.collect(divide_batch, recipe, processes)
    found.collect(check_writable, run_dir)
    rows_by_file = found.collect(read_data_files, recipe.document, recipe.data, recipe.seed)
    config = found.collect(load_model_config, recipe.model)
    lora_problems = find_lora_problems(recipe, config)
    found.problems += lora_problems
    tokenizer = counts = encoded = None
    if config is not None:  # without the configuration the tokenizer fails too, and one message is enough
        tokenizer = found.collect(cache.get, lambda: load_tokenizer(recipe.model), ("tokenizer", recipe.model))
        found.problems += find_quantization_problems(recipe, config)
        if (problem := cache.get(lambda: find_loss_problem(config), ("loss", recipe.model))) is not None:
            base = recipe.model.pretrained_model_name_or_path
            found.problems.append(f"model.pretrained_model_name_or_path: {base}: {config.model_type} {problem}")
        if not lora_problems:
            key = ("parameters", recipe.model, recipe.lora)
            counts = found.collect(cache.get, lambda: count_parameters(recipe, config), key)
    if rows_by_file is not None and tokenizer is not None and config is not None:
        encoded = _encode_rows(recipe, tokenizer, InputLimits.from_config(config), rows_by_file, cache, found)
    found.problems += find_library_problems(recipe)
    if tokenizer is None:
        raise BaseModelUnavailableError(*found.problems)
    found.raise_problems()
    assert layout is not None and rows_by_file is not None, "a check without a result reported a problem"
    assert encoded is not None and counts is not None, "both need only what is there"
    (rows, notes), (trained_parameters, total_parameters) = encoded, counts
    workload = Workload(recipe, layout, config, trained_parameters, count_tokens(rows), sharding)
    return _Inputs(workload, tokenizer, rows_by_file, rows, total_parameters, notes)


def _fingerprint(
    run: Run, recipe: Recipe, rows_by_file: dict[DataFileKey, list[Row]]
) -> dict[DataFileKey, DatasetFingerprint]:
    files = list_data_files(recipe.data)
    return {
        key: dataset_fingerprint(files[key], rows) if key in files else fingerprint_dev_rows(run, rows)
        for key, rows in rows_by_file.items()
    }


def _encode_rows(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    limits: InputLimits,
    rows_by_file: dict[DataFileKey, list[Row]],
    cache: PlanCache,
    found: ProblemCollector,
) -> tuple[list[EncodedRow], list[str]] | None:
    """Return the encoded training rows, and lines on them; add the problems of all data files to `found`."""
    data = {key: file_sha256(path) for key, path in list_data_files(recipe.data).items()}
    key = (recipe.model, recipe.prompt, recipe.data, recipe.rows_per_step, recipe.seed, data)

    def encode() -> tuple[list[EncodedRow], list[str]]:
        encoded = encode_training_rows(recipe, tokenizer, rows_by_file["train"])
        check_input_limits(recipe, tokenizer, limits, rows_by_file, encoded[0])
        return encoded

    return found.collect(cache.get, encode, ("rows", *key))


def _find_resumable_checkpoint(run: Run, recipe: Recipe, content: dict[str, str]) -> Checkpoint | None:
    """Return the newest undamaged checkpoint that can be resumed; None if the folder holds no complete checkpoint.

    Raises:
        UserError: the folder's checkpoints were trained with another recipe or on other content, or cannot be resumed.
    """
    checkpoints = run.complete_checkpoints()
    if not checkpoints:
        return None
    check_same_recipe(run, recipe)
    check_same_content(run, content)
    for checkpoint in reversed(checkpoints):
        if not checkpoint.resumable:
            continue
        if not (damaged := checkpoint.find_damaged_files()):
            return checkpoint
        logger.warning(f"{checkpoint.path}: {', '.join(damaged)}: damaged, so the checkpoint before it is used")
    raise UserError(
        f"{run}: no checkpoint has its optimizer state undamaged; start a new run in another folder: RUN={run}-2"
    )


def select_step_strategy(
    workload: Workload, previous: Manifest | None = None, failure: str | None = None
) -> StepStrategy:
    """Choose how steps are computed on this machine.

    Args:
        workload: what must be computed.
        previous: the manifest of the run that is resumed.
        failure: why the CUDA-graph step cannot be used, if it has been tried already.
    """
    device = select_device(workload.recipe)
    memory = gpu_memory(workload.recipe, device) if device.type == "cuda" else None
    return choose_step_strategy(workload, device, memory, failure, previous)


def gpu_memory(recipe: Recipe, device: torch.device) -> tuple[int, int]:
    """Return (free, total) bytes of the GPU: the least of all processes, so that all choose the same strategy.

    What an earlier run of this process has reserved counts as free, so that each chooses as in a process of its own.
    """
    free, total = torch.cuda.mem_get_info(device)
    memory = free + torch.cuda.memory_reserved(device), total
    if get_world_size() == 1:
        return memory
    # Create the process group that the Trainer would create, with the same timeout.
    PartialState(timeout=datetime.timedelta(seconds=recipe.training.get("ddp_timeout", PROCESS_TIMEOUT_SECONDS)))
    least = torch.tensor(memory, device=device)
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    return int(least[0]), int(least[1])


def _describe_changed_software(previous: Manifest | None, device: torch.device) -> list[str]:
    """Return a line if a run is resumed with another device or other versions, which round differently."""
    if previous is None:
        return []
    now = {**installed_versions(), "device": describe_device(device)}
    before = {**previous.versions, "device": previous.device}
    changed = [f"{name} {before.get(name)} -> {now[name]}" for name in now if now[name] != before.get(name)]
    if not changed:
        return []
    return [f"resuming with other software or hardware, so weights may differ by rounding: {', '.join(changed)}"]


def _describe_run(plan: Plan, run_dir: Path) -> list[str]:
    """Return lines on parameters, steps and disk space.

    Raises:
        UserError: the disk has less free space than the checkpoints need.
    """
    recipe, layout = plan.workload.recipe, plan.strategy.layout
    trained_parameters = plan.workload.trained_parameters
    steps_per_epoch = len(plan.rows) // recipe.rows_per_step
    processes = "one process" if layout.processes == 1 else f"each of {layout.processes} processes"
    remaining = max(0, plan.steps - plan.first_step)
    limit = recipe.training.get("save_total_limit")
    if limit is not None and recipe.evaluation.during_training:
        limit += 1  # the best one
    needed = estimate_checkpoint_bytes(plan.config, limit, trained_parameters, remaining, steps_per_epoch)
    return [
        f"{trained_parameters:,} parameters are trained; the base model has {plan.total_parameters:,}",
        f"{plan.steps} steps of {recipe.rows_per_step} rows, {plan.steps / steps_per_epoch:.2g} epochs; {processes} "
        f"takes {layout.rows_per_device} rows x {layout.accumulation}",
        *describe_scoring(recipe, plan.save_schedule, plan.data),
        check_disk_space(run_dir, needed),
    ]
