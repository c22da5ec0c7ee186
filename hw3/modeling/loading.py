"""Load the tokenizer, the configuration and the base model. This is the only module that calls `from_pretrained`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import transformers
from huggingface_hub.errors import (
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
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
from hw3.common.gc_control import gc_paused
from hw3.common.progress import can_show_live_progress
from hw3.config.recipe import Recipe
from hw3.config.schema import ModelSection
from hw3.config.validation import is_gemma2
from hw3.data.chat_rendering import fix_chat_template_date
from hw3.modeling.adapter_slot import build_lora_config
from hw3.modeling.float16_products import use_float16_products
from hw3.modeling.four_bit_product import find_4bit_problem
from hw3.modeling.load_errors import out_of_memory_raised
from hw3.modeling.quantization import GatheredLinear4bit, build_quantization_config
from hw3.modeling.supported_models import find_architecture_problem


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """Load the base's tokenizer. If it has no padding token, EOS becomes the padding token.

    If the chat template asks for the date, it gets a fixed one. The date is then part of the tokenizer's hash, and of
    the tokenizer that is saved with the run or exported.

    Raises:
        UserError: the tokenizer is not available; the message explains how to get it.
    """
    with gc_paused():
        tokenizer = _from_pretrained(AutoTokenizer, section)
    if not isinstance(tokenizer.model_max_length, int | float):
        name = section.pretrained_model_name_or_path
        raise UserError(f"{name}: model_max_length in tokenizer_config.json is not a number")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    fix_chat_template_date(tokenizer)
    return tokenizer


def load_model_config(section: ModelSection) -> Any:
    """Load the base's configuration, without its weights.

    Raises:
        UserError: the configuration is not available, or not of a model that can be used; the message explains what to
            do.
    """
    config = _from_pretrained(AutoConfig, section)
    if (problem := find_architecture_problem(config)) is not None:
        name = section.pretrained_model_name_or_path
        raise UserError(f"model.pretrained_model_name_or_path: {name}: {config.model_type} {problem}")
    return config


def load_base_model(recipe: Recipe, device: torch.device) -> PreTrainedModel:
    """Load the recipe's base model in its compute dtype, quantized as the recipe requires, without adapters.

    Raises:
        UserError: the model is not available, and the message explains how to get it; or the device does not support
            4-bit layers.
    """
    if recipe.quantization is not None and (problem := find_4bit_problem(device)) is not None:
        raise UserError(f"quantization: {problem}")
    quantization = None if recipe.quantization is None else build_quantization_config(recipe.quantization)
    if getattr(load_model_config(recipe.model), "quantization_config", None) is not None:
        quantization = None  # the base was saved quantized, with the recipe's settings (`find_quantization_problems`)
    return load_model(recipe.model, quantization, device)


def resolve_attn_implementation(section: ModelSection) -> str | None:
    """Return the attention implementation to load the model with; None leaves the choice to transformers."""
    # Gemma-2 soft-caps its attention scores, which sdpa does not support.
    return section.attn_implementation or ("eager" if is_gemma2(section) else None)


def load_model(section: ModelSection, quantization: BitsAndBytesConfig | None, device: torch.device) -> PreTrainedModel:
    """Load a causal language model.

    Args:
        section: a recipe's `model` section.
        quantization: how to quantize the weights; None loads them unchanged.
        device: where to load it, unless `section.device_map` spreads the model.

    Raises:
        UserError: the model is not available; the message explains how to get it.
    """
    options: dict[str, Any] = {"dtype": getattr(torch, section.dtype)}
    if (attention := resolve_attn_implementation(section)) is not None:
        options["attn_implementation"] = attention
    if quantization is not None:
        options["quantization_config"] = quantization
    # Under ZeRO-3 DeepSpeed places the weights. It loads all 4-bit weights to this process's device and shards them
    # later.
    if not is_deepspeed_zero3_enabled():
        options["device_map"] = section.device_map or {"": device}
    if not can_show_live_progress():
        transformers.utils.logging.disable_progress_bar()
    return _prepare_loaded_model(_from_pretrained(AutoModelForCausalLM, section, **options))


def build_random_base(
    recipe: Recipe, config: Any, num_layers: int, device: torch.device, *, dequantized: bool
) -> PreTrainedModel:
    """Build the recipe's base with random weights and another number of decoder layers, without reading any file.

    Apart from that the model is as `load_base_model` returns it.

    Args:
        recipe: the recipe.
        config: the base's configuration.
        num_layers: decoder layers, of the types that the base's first layers have.
        device: where the model is made.
        dequantized: return linear layers in the compute dtype, as from `dequantize`, even if the recipe quantizes.
    """
    config = copy.deepcopy(config)
    text_config = config.get_text_config()
    text_config.num_hidden_layers = num_layers
    if getattr(text_config, "layer_types", None) is not None:
        text_config.layer_types = (text_config.layer_types * num_layers)[:num_layers]
    options: dict[str, Any] = {
        "dtype": getattr(torch, recipe.model.dtype),
        "attn_implementation": resolve_attn_implementation(recipe.model),
    }
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, **options)
    if recipe.quantization is not None and not dequantized:
        transformers.utils.logging.disable_progress_bar()
        # transformers quantizes weights while it loads them, from a state dict as well as from a file.
        model = type(model).from_pretrained(
            None,
            config=config,
            state_dict=model.state_dict(),
            quantization_config=build_quantization_config(recipe.quantization),
            device_map={"": device},
            **options,
        )
    return _prepare_loaded_model(model)


def count_base_parameters(config: Any) -> int:
    """Count the parameters of the base, without loading weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def count_parameters(recipe: Recipe, config: Any) -> tuple[int, int]:
    """Count the parameters of the recipe's model, without loading weights.

    Args:
        recipe: the recipe.
        config: the base's configuration.

    Returns:
        The trained parameters, and those of the base.

    Raises:
        UserError: `lora.target_modules` names no layer of the base, or layers whose adapters could not be trained or
            merged.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = model.num_parameters()
    if recipe.lora is None:
        return total, total
    try:
        peft_model = get_peft_model(model, build_lora_config(recipe.lora))
    except ValueError as error:
        raise UserError(recipe.problem(("lora",), first_line(error))) from error
    _check_adapted_layers(recipe, model)
    return sum(parameter.numel() for parameter in peft_model.parameters() if parameter.requires_grad), total


def _check_adapted_layers(recipe: Recipe, model: PreTrainedModel) -> None:
    """Check that every adapter of a model can be trained and merged.

    Raises:
        UserError: an adapter is on the output head, or has a bias that its layer cannot hold after merging.
    """
    problems = []
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        key = "ensure_weight_tying" if (recipe.lora or {}).get("ensure_weight_tying") else "target_modules"
        problems.append(
            recipe.problem(
                ("lora", key),
                "this puts an adapter on the output head, which would never be trained, because the loss reads the "
                "head's weight directly; use other layers",
            )
        )
    without_bias = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
        and any(layer.lora_bias.values())
        and getattr(layer.get_base_layer(), "bias", None) is None
    ]
    if without_bias:
        problems.append(
            recipe.problem(
                ("lora", "lora_bias"),
                f"found true, but {len(without_bias)} adapted layers have no bias, so the adapter could not be merged "
                f"into them: {without_bias[0]} is one; set it to false, or adapt only layers with a bias",
            )
        )
    if problems:
        raise UserError(*problems)


def _prepare_loaded_model(model: PreTrainedModel) -> PreTrainedModel:
    """Turn off the key/value cache, adjust bitsandbytes' 4-bit layers, and make a float16 model safe from overflow."""
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            if is_deepspeed_zero3_enabled():
                module.__class__ = GatheredLinear4bit
            # A no-grad forward on AVX512-BF16 CPUs repacks the weights lossily, and later training steps then use a
            # kernel without gradients (bitsandbytes 0.50.2, nn/modules.py, Linear4bit.forward).
            module.support_avx512bf16_for_cpu = False
    return use_float16_products(model)


_MALFORMED_FILE_ERRORS = (AttributeError, LookupError, TypeError, RecursionError, StrictDataclassError)


def _from_pretrained(factory: Any, section: ModelSection, **options: Any) -> Any:
    name = section.pretrained_model_name_or_path
    try:
        with out_of_memory_raised():
            return factory.from_pretrained(name, revision=section.revision, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        problem = _explain_load_error(name, error)
        if problem is None:
            raise
        raise UserError(problem) from error
    except Exception as error:
        # The tokenizers package raises plain exceptions; transformers does not check the types in JSON files.
        if type(error) is not Exception and not isinstance(error, _MALFORMED_FILE_ERRORS):
            raise
        raise UserError(
            f"model.pretrained_model_name_or_path: {name}: a file of the tokenizer or the configuration is not valid: "
            f"{type(error).__name__}: {first_line(error)[:200]}"
        ) from error


def _explain_load_error(name: str, error: BaseException) -> str | None:
    """Return a message with the fix for a model that cannot be loaded; None for an unknown error."""
    key = "model.pretrained_model_name_or_path"
    causes = list(_iterate_causes(error))
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return (
            f"{key}: {name} is gated: accept its license on https://huggingface.co/{name}, then run `hf auth login` "
            "(or set HF_TOKEN) and try again"
        )
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return f"model.revision: {name} has no such revision"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return f"{key}: {name} is neither a local folder nor a model on the Hub; check its spelling"
    if isinstance(error, UnicodeDecodeError):
        return f"{key}: {name}: a file of the tokenizer or the configuration is not UTF-8 text: {first_line(error)}"
    if isinstance(error, ImportError):
        return f"model.attn_implementation: {first_line(error)}"
    if isinstance(error, ValueError) and "model type" in str(error):
        return f"{key}: {name}: {first_line(error)}"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{key}: {name}: {error.strerror}: {error.filename}"
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        return f"{key}: the folder {name} is not a model: it has no config.json"
    if isinstance(error, ValueError):
        return f"{key}: {name}: {first_line(error)}" if "tokenizer" in str(error) else None
    if Path(name).is_dir():
        return f"{key}: the folder {name} is not a complete model: {first_line(error)}"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return f"{key}: there is no folder {name}, and no model on the Hub can have such a name"
    return (
        f"{key}: there is no folder {name}, it is not in the local cache and the Hub cannot be reached; connect to the "
        f"internet once, or download it on another machine (`hf download {name}`) and give the folder's path"
    )


def _iterate_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and the chain of errors that caused it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
