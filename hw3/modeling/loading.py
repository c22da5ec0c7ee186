"""Tokenizer, base model and adapters. The only place that calls `from_pretrained`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import transformers
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from peft import get_peft_model
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from hw3.common.errors import UserError, first_line
from hw3.common.gc_control import uncollected
from hw3.config.recipe import Recipe
from hw3.config.schema import ModelSection
from hw3.config.validation import is_gemma2
from hw3.modeling.adapter_slot import lora_config
from hw3.modeling.quantization import GatheredLinear4bit, quantization_config


def load_tokenizer(model: ModelSection) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with a padding token (EOS where it has none of its own).

    Raises:
        UserError: it cannot be had; says how to get it.
    """
    with uncollected():
        tokenizer = _from_pretrained(AutoTokenizer, model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(model: ModelSection) -> Any:
    """The base's configuration alone, no weights.

    Raises:
        UserError: it cannot be had; says how to get it.
    """
    return _from_pretrained(AutoConfig, model)


def load_base(recipe: Recipe, device: torch.device) -> PreTrainedModel:
    """The recipe's base model in its compute dtype, quantized where the recipe says so, without adapters.

    Raises:
        UserError: it cannot be had; says how to get it.
    """
    quantization = None if recipe.quantization is None else quantization_config(recipe.quantization)
    if getattr(load_config(recipe.model), "quantization_config", None) is not None:
        quantization = None  # saved quantized, and `quantized_already` found the recipe's the same
    return load_model(recipe.model, quantization, device)


def attention_of(section: ModelSection) -> str | None:
    """The attention that the model is loaded with; None leaves it to transformers."""
    # Gemma-2 caps its attention scores, which sdpa cannot.
    return section.attn_implementation or ("eager" if is_gemma2(section) else None)


def load_model(section: ModelSection, quantization: BitsAndBytesConfig | None, device: torch.device) -> PreTrainedModel:
    """A causal language model on a device.

    Raises:
        UserError: it cannot be had; says how to get it.
    """
    options: dict[str, Any] = {"dtype": getattr(torch, section.dtype)}
    if (attention := attention_of(section)) is not None:
        options["attn_implementation"] = attention
    if quantization is not None:
        options["quantization_config"] = quantization
    # Under ZeRO-3 DeepSpeed places the weights; 4-bit ones go to this process's device whole, and are spread later.
    if not is_deepspeed_zero3_enabled():
        options["device_map"] = section.device_map or {"": device}
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    return prepare_for_training(_from_pretrained(AutoModelForCausalLM, section, **options))


def prepare_for_training(model: PreTrainedModel) -> PreTrainedModel:
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            if is_deepspeed_zero3_enabled():
                module.__class__ = GatheredLinear4bit
            # A no-grad forward on AVX512-BF16 CPUs repacks the weights lossily, and later training steps then use a
            # kernel without gradients (bitsandbytes 0.50.2, nn/modules.py, Linear4bit.forward).
            module.support_avx512bf16_for_cpu = False
    return model


def base_parameters(config: Any) -> int:
    """Parameters of the base, counted without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def parameter_counts(recipe: Recipe, config: Any) -> tuple[int, int]:
    """(trained, total) parameters of the recipe's model, counted without weights.

    Raises:
        UserError: `lora.target_modules` names no layer of the base.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = model.num_parameters()
    if recipe.lora is None:
        return total, total
    try:
        adapted = get_peft_model(model, lora_config(recipe.lora))
    except ValueError as error:
        raise UserError(f"lora: {first_line(error)}") from error
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad), total


def _from_pretrained(factory: Any, model: ModelSection, **options: Any) -> Any:
    name = model.pretrained_model_name_or_path
    try:
        return factory.from_pretrained(name, revision=model.revision, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        problem = _why_not_loaded(name, error)
        if problem is None:
            raise
        raise UserError(problem) from error


def _why_not_loaded(name: str, error: BaseException) -> str | None:
    """One message with the fix for a model that cannot be had; None for an error of another kind."""
    where = "model.pretrained_model_name_or_path"
    causes = list(_causes(error))
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return (
            f"{where}: {name} is gated: accept its licence on https://huggingface.co/{name}, then run "
            "`hf auth login` (or set HF_TOKEN) and try again"
        )
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return f"model.revision: {name} has no such revision"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return f"{where}: {name} is neither a local folder nor a model on the hub; check its spelling"
    if isinstance(error, ImportError):
        return f"model.attn_implementation: {first_line(error)}"
    if isinstance(error, ValueError) and "model type" in str(error):
        return f"{where}: {name}: {first_line(error)}"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{where}: {name}: {error.strerror}: {error.filename}"
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        return f"{where}: the folder {name} is no model: it has no config.json"
    if isinstance(error, ValueError):
        return f"{where}: {name}: {first_line(error)}" if "tokenizer" in str(error) else None
    if Path(name).is_dir():
        return f"{where}: the folder {name} is not a complete model: {first_line(error)}"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return f"{where}: there is no folder {name}, and no model on the hub has such a name"
    return (
        f"{where}: there is no folder {name}, it is not in the local cache and the hub cannot be reached; connect "
        f"once, or download it elsewhere (`hf download {name}`) and give the folder's path"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
