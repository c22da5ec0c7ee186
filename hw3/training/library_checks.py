"""The second round of checks: values that only a library can judge.

They are judged by building the objects that a recipe configures.
"""

from __future__ import annotations

import itertools
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from accelerate.state import AcceleratorState
from transformers import GenerationConfig, PreTrainedConfig, Trainer, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from trl import SFTConfig

from hw3.common.errors import ProblemCollector, UserError, first_line
from hw3.config.recipe import Recipe
from hw3.config.validation import describe_value
from hw3.config.yaml_loader import KeyPath
from hw3.modeling.adapter_slot import build_lora_config
from hw3.modeling.quantization import build_quantization_config
from hw3.training.batch_layout import BatchLayout
from hw3.training.optimizer_state import FUSED_ADAMW
from hw3.training.sft_arguments import build_sft_config
from hw3.training.step_strategy import StepStrategy

P = ParamSpec("P")
T = TypeVar("T")
STEPS = 100  # after the warmup, of the schedule that is built for its checks
# Whether this machine's device supports the recipe is the task of `find_device_problems`.
_CPU_SETTINGS = {"use_cpu": True, "bf16": False, "fp16": False, "tf32": None, "ddp_backend": None}


def find_library_problems(recipe: Recipe) -> list[str]:
    """Return what the libraries refuse of a recipe; nothing is written, and no model is built."""
    found = ProblemCollector()
    if recipe.quantization is not None:
        found.collect(_attempt, recipe, ("quantization",), build_quantization_config, recipe.quantization)
    found.collect(_attempt, recipe, ("generation",), _build_generation_config, recipe)
    found.collect(_attempt, recipe, ("training", "report_to"), _build_trackers, recipe)
    config = found.collect(_attempt, recipe, ("training",), _build_sft_config, recipe)
    if config is not None:
        optimizer_key = "optim_args" if recipe.training.get("optim_args") else "optim"
        found.collect(_attempt, recipe, ("training", optimizer_key), _build_optimizer, config)
        schedule_key = "lr_scheduler_kwargs" if recipe.training.get("lr_scheduler_kwargs") else "lr_scheduler_type"
        found.collect(_attempt, recipe, ("training", schedule_key), _build_schedule, config)
    return found.problems


def find_lora_problems(recipe: Recipe, config: PreTrainedConfig | None) -> list[str]:
    """Return what is wrong with the `lora` section: what PEFT refuses, ranks above the hidden size, unknown token ids.

    A linear layer that reads or writes hidden states has no update of a higher rank, and building the matrices of a
    mistyped rank may take hours.

    Args:
        recipe: the recipe.
        config: the base model's configuration; None if it cannot be loaded.
    """
    if recipe.lora is None:
        return []
    found, lora = ProblemCollector(), recipe.lora
    found.collect(_attempt, recipe, ("lora",), build_lora_config, lora)
    if config is None:
        return found.problems
    hidden_size = config.get_text_config().hidden_size
    ranks: dict[KeyPath, Any] = {("lora", "r"): lora["r"]} if "r" in lora else {}
    ranks |= {("lora", "rank_pattern", pattern): rank for pattern, rank in (lora.get("rank_pattern") or {}).items()}
    expected = f"expected a whole number from 1 to {hidden_size}, the base model's hidden size"
    found.problems += [
        recipe.problem(key_path, f"{describe_value(rank)}, {expected}")
        for key_path, rank in ranks.items()
        if not (isinstance(rank, int) and 1 <= rank <= hidden_size)
    ]
    indices, last_id = lora.get("trainable_token_indices") or [], config.get_text_config().vocab_size - 1
    token_ids = itertools.chain.from_iterable(indices.values()) if isinstance(indices, dict) else indices
    if wrong_ids := [token_id for token_id in token_ids if not 0 <= token_id <= last_id]:
        problem = f"{describe_value(wrong_ids[0])}, expected token ids from 0 to {last_id}"
        found.problems.append(recipe.problem(("lora", "trainable_token_indices"), problem))
    return found.problems


def _attempt(recipe: Recipe, key_path: KeyPath, build: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return what `build` returns.

    Raises:
        UserError: it raises; the message names the key.
    """
    try:
        return build(*args, **kwargs)
    except Exception as error:  # libraries raise errors of any class for a value that they do not expect
        raise UserError(_describe_error(recipe, key_path, error)) from error


def _build_generation_config(recipe: Recipe) -> None:
    GenerationConfig(**recipe.generation.model_dump(exclude_none=True))


def _build_trackers(recipe: Recipe) -> None:
    for callback in get_reporting_integration_callbacks(recipe.training.get("report_to", "tensorboard")):
        callback()


def _build_sft_config(recipe: Recipe) -> SFTConfig:
    """Build TRL's arguments as on a machine without a GPU, with an output folder that is thrown away.

    Only the plan's final `SFTConfig` may set up the device, the process group, and DeepSpeed or FSDP. Without the
    launcher's variables, this one does not.
    """
    checkpointing = bool(recipe.training.get("activation_checkpointing", False))
    strategy = StepStrategy(
        BatchLayout(1, 1, 1), False, False, checkpointing, recipe.training.get("optim", FUSED_ADAMW)
    )
    environment = dict(os.environ)
    for name in environment:
        if name.startswith(("ACCELERATE_", "FSDP_")) or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            del os.environ[name]
    try:
        with tempfile.TemporaryDirectory() as folder:
            cpu_recipe = replace(recipe, training=recipe.training | _CPU_SETTINGS)
            return build_sft_config(cpu_recipe, strategy, Path(folder))
    finally:
        os.environ.clear()
        os.environ.update(environment)
        AcceleratorState._reset_state(reset_partial_state=True)


def _build_optimizer(config: SFTConfig) -> None:
    """Build the optimizer for a layer of one weight; some need a package that is not installed."""
    layer = torch.nn.Linear(1, 1, bias=False)
    optimizer_class, arguments = Trainer.get_optimizer_cls_and_kwargs(config, layer)  # type: ignore[arg-type]
    optimizer_class(layer.parameters(), **arguments)


def _build_schedule(config: SFTConfig) -> None:
    """Build the schedule and compute its rates; some need arguments, which `lr_scheduler_kwargs` gives."""
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=config.learning_rate)
    warmup_steps = config.get_warmup_steps(STEPS)
    schedule = get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=warmup_steps + STEPS,
        scheduler_specific_kwargs=config.lr_scheduler_kwargs,  # type: ignore[arg-type]  # parsed by SFTConfig
    )
    for step in range(warmup_steps, warmup_steps + STEPS):
        for compute_rate in getattr(schedule, "lr_lambdas", []):
            float(compute_rate(step))


def _describe_error(recipe: Recipe, key_path: KeyPath, error: Exception) -> str:
    """Return a library's error as a message about a key: the one that it names, or else the one that was checked."""
    reason = first_line(error) or type(error).__name__
    section = recipe.to_dict()[str(key_path[0])]
    if len(key_path) == 1:
        named = [key for key in section if re.search(rf"\b{re.escape(key)}\b", reason)]
        quoted = [key for key, value in section.items() if isinstance(value, str) and value and value in reason]
        key_path = (*key_path, *[*named, *quoted][:1])
    if len(key_path) == 1:
        return recipe.problem(key_path, reason)
    return recipe.problem(key_path, f"{describe_value(section.get(key_path[1]))}: {reason}")
