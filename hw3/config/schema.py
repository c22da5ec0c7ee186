"""The schema of each section of a recipe: the keyword arguments of the object that the section builds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model

from hw3.config.library_fields import load_field_types
from hw3.data.prompt import Prompt

DType = Literal["bfloat16", "float16", "float32"]
PositiveInt = Annotated[int, Field(ge=1)]
BestBy = Literal["mean_perplexity", "token_perplexity"]  # figures of an entry by which the best checkpoint is chosen
_STRICT_CONFIG = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True, allow_inf_nan=False)


class ModelSection(BaseModel):
    """Keyword arguments of `AutoModelForCausalLM.from_pretrained`."""

    model_config = ConfigDict(**_STRICT_CONFIG, protected_namespaces=())

    pretrained_model_name_or_path: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    # `auto` is the best dtype of the machine (`resolve_dtype`), not that of the weights' file as in transformers.
    dtype: Literal["bfloat16", "float16", "float32", "auto"] = "bfloat16"
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = (
        None
    )
    device_map: Literal["auto"] | None = None


class QuantizationSection(BaseModel):
    """Keyword arguments of `transformers.BitsAndBytesConfig` for 4-bit weights."""

    model_config = _STRICT_CONFIG

    load_in_4bit: Literal[True]
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True
    bnb_4bit_compute_dtype: DType = "bfloat16"
    bnb_4bit_quant_storage: Literal["uint8", "bfloat16", "float16", "float32"] = "uint8"


class DataSection(BaseModel):
    """Data files, and what happens to rows that are too long."""

    model_config = _STRICT_CONFIG

    train: Annotated[str, Field(min_length=1)]
    eval: Annotated[str, Field(min_length=1)]
    dev: Annotated[str, Field(min_length=1)] | None = None
    dev_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    max_length: Annotated[int, Field(ge=2)] = 512
    too_long: Literal["error", "drop", "truncate_prompt"] = "error"


class EvaluationSection(BaseModel):
    """How checkpoints are scored, and which one is the best."""

    model_config = _STRICT_CONFIG

    during_training: bool = False
    patience: PositiveInt | None = None
    best_by: BestBy = "mean_perplexity"
    tokens_per_batch: PositiveInt | None = None
    bootstrap_samples: PositiveInt = 2000
    bootstrap_seed: Annotated[int, Field(ge=0)] = 0
    examples_seed: Annotated[int, Field(ge=0)] = 0


class GenerationSection(BaseModel):
    """Keyword arguments of `transformers.GenerationConfig`. Greedy search by default."""

    model_config = _STRICT_CONFIG

    max_new_tokens: PositiveInt | None = None
    do_sample: bool = False
    num_beams: PositiveInt = 1
    temperature: Annotated[float, Field(gt=0)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] | None = None
    length_penalty: float | None = None
    early_stopping: bool | None = None


EVALUATED_AFTER_TRAINING = (
    "checkpoints are scored after training, with `make eval`, or during training, with evaluation.during_training"
)
_ROWS = "use the `prompt` and `data` sections; hw3 tokenizes the rows"
_PADDED = "each row is one padded sequence; batches are grouped by length"
_UPLOAD = "runs stay local; use `hw3 export` to write a model and `hf upload` to publish it"
_LAUNCHER = "use an accelerate configuration, such as make train GPUS=4 ACCELERATE=fsdp2"

# Keys of SFTConfig that a recipe cannot set, each with what to use instead or what always holds.
RESERVED_TRAINING_KEYS: dict[str, str] = {
    "output_dir": "use --run DIR (make: RUN=DIR)",
    "max_length": "use data.max_length",
    "truncation_mode": "use data.too_long",
    "packing": _PADDED,
    "packing_strategy": _PADDED,
    "eval_packing": _PADDED,
    "padding_free": _PADDED,
    "pad_to_multiple_of": _PADDED,
    "dataset_text_field": _ROWS,
    "dataset_kwargs": _ROWS,
    "dataset_num_proc": _ROWS,
    "shuffle_dataset": "rows are always shuffled, with training.seed",
    "completion_only_loss": "the loss always covers only the output and its EOS",
    "assistant_only_loss": "the loss always covers only the output and its EOS",
    "chat_template_path": "use prompt.chat_template",
    "eos_token": "EOS is always the tokenizer's",
    "pad_token": "padding is masked by length, so any id works",
    "model_init_kwargs": "use the `model` section",
    "trust_remote_code": "code from a model repository is never executed",
    "train_sampling_strategy": "rows are always grouped by length within shuffled blocks",
    "length_column_name": "rows are always grouped by length within shuffled blocks",
    "data_seed": "use training.seed",
    "remove_unused_columns": _ROWS,
    "label_names": _ROWS,
    "label_smoothing_factor": "not supported, because it needs the full logits of every position",
    "logging_nan_inf_filter": "a non-finite loss always stops the run",
    "include_num_input_tokens_seen": "tokens are always counted, without padding",
    "resume_from_checkpoint": "an interrupted run always resumes from its last complete checkpoint",
    "ignore_data_skip": "a resumed run always continues with the same rows",
    "restore_callback_states_from_checkpoint": "a resumed run always restores the complete training state",
    "save_only_model": "the optimizer state is saved in the last two checkpoints only",
    "dataloader_drop_last": "rows that do not fill a step are left out of an epoch, different ones in each epoch",
    "accelerator_config": "each step sees the same rows with every number of processes",
    "average_tokens_across_devices": "the loss is always the mean over all output tokens of a step",
    "auto_find_batch_size": "the recipe fixes the rows per step; raise gradient_accumulation_steps instead",
    "gradient_checkpointing": "use training.activation_checkpointing",
    "gradient_checkpointing_kwargs": "use training.activation_checkpointing_kwargs",
    "torch_compile": "use `speed: auto`",
    "torch_compile_backend": "use `speed: auto`",
    "torch_compile_mode": "use `speed: auto`",
    "use_liger_kernel": "use `speed: auto`",
    "push_to_hub": _UPLOAD,
    "hub_model_id": _UPLOAD,
    "hub_strategy": _UPLOAD,
    "hub_token": _UPLOAD,
    "hub_private_repo": _UPLOAD,
    "hub_always_push": _UPLOAD,
    "hub_revision": _UPLOAD,
    "liger_kernel_config": "use `speed: auto`",
    "fsdp": _LAUNCHER,
    "fsdp_config": _LAUNCHER,
    "deepspeed": _LAUNCHER,
    "parallelism_config": _LAUNCHER,
    "local_rank": _LAUNCHER,
    "do_train": "use `hw3 train`",
    "do_eval": EVALUATED_AFTER_TRAINING,
    "do_predict": "use `hw3 predict`",
    "load_best_model_at_end": EVALUATED_AFTER_TRAINING,
    "metric_for_best_model": EVALUATED_AFTER_TRAINING,
    "greater_is_better": EVALUATED_AFTER_TRAINING,
    "prediction_loss_only": EVALUATED_AFTER_TRAINING,
    "batch_eval_metrics": EVALUATED_AFTER_TRAINING,
    "include_for_metrics": EVALUATED_AFTER_TRAINING,
    "bf16_full_eval": EVALUATED_AFTER_TRAINING,
    "fp16_full_eval": EVALUATED_AFTER_TRAINING,
}

_TRAINING_RANGES: dict[str, Any] = {
    "per_device_train_batch_size": Field(ge=1),
    "gradient_accumulation_steps": Field(ge=1),
    "num_train_epochs": Field(gt=0),
    "learning_rate": Field(gt=0),
    "weight_decay": Field(ge=0),
    "adam_beta1": Field(ge=0, lt=1),
    "adam_beta2": Field(ge=0, lt=1),
    "adam_epsilon": Field(ge=0),
    "max_grad_norm": Field(ge=0),
    "warmup_steps": Field(ge=0),
    "logging_steps": Field(gt=0),
    "save_steps": Field(gt=0),
    "save_total_limit": Field(ge=1),
    "ddp_timeout": Field(ge=1),
    "ddp_bucket_cap_mb": Field(ge=1),
    "seed": Field(ge=0, lt=2**32),  # NumPy takes no larger one
    # Each worker is a process. A step has few rows, so starting more of them takes longer than any run saves.
    "dataloader_num_workers": Field(ge=0, le=64),
}
_LOG_LEVELS = Literal["detail", "debug", "info", "warning", "error", "critical", "passive"]
_TRAINING_CHOICES: dict[str, Any] = {
    "loss_type": Literal["nll", "dft"],
    # `no` would save no checkpoint to score, and `best` needs an evaluation inside the training loop.
    "save_strategy": Literal["steps", "epoch"],
    # transformers annotates these two as any text, and text or null, but accepts only this.
    "log_level": _LOG_LEVELS,
    "log_level_replica": _LOG_LEVELS,
    "report_to": str | list[str],
}


def _check_regular_expressions(value: Any) -> Any:
    """Check what PEFT reads as regular expressions: a single text, and the keys of a pattern."""
    for pattern in [value] if isinstance(value, str) else value if isinstance(value, dict) else []:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"a regular expression, but {json.dumps(pattern)} is none: {error}") from error
    return value


_REGULAR_EXPRESSIONS = AfterValidator(_check_regular_expressions)
_LORA_RANGES: dict[str, Any] = {
    "r": Field(ge=1),
    "lora_alpha": Field(gt=0),
    "lora_dropout": Field(ge=0, lt=1),
    "target_modules": _REGULAR_EXPRESSIONS,
    "exclude_modules": _REGULAR_EXPRESSIONS,
    "rank_pattern": _REGULAR_EXPRESSIONS,
    "alpha_pattern": _REGULAR_EXPRESSIONS,
}
# Keys that PEFT fills in itself.
_LORA_INTERNAL_KEYS = {
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_type",
}


def is_evaluation_key(key: str) -> bool:
    """Return whether a key of SFTConfig configures the evaluation inside the training loop."""
    return key.startswith(("eval_", "per_device_eval"))


def _section_from_table(
    class_name: str,
    name: str,
    *,
    leave_out: Callable[[str], bool],
    ranges: dict[str, Any],
    choices: dict[str, Any],
) -> type[BaseModel]:
    """Create a strict section with the fields of a library's configuration class; all are optional, without a default.

    Args:
        class_name: the library's class, such as `SFTConfig`.
        name: name of the section's class.
        leave_out: whether a recipe cannot set a field.
        ranges: limits of numbers, by field.
        choices: annotations that replace the library's, by field.
    """
    fields: dict[str, Any] = {}
    for key, annotation in load_field_types(class_name).items():
        if not leave_out(key):
            annotation = choices.get(key, annotation)
            fields[key] = (Annotated[annotation, ranges[key]] if key in ranges else annotation, None)
    return create_model(name, __config__=_STRICT_CONFIG, **fields)


TrainingSection = _section_from_table(
    "SFTConfig",
    "TrainingSection",
    leave_out=lambda key: key in RESERVED_TRAINING_KEYS or is_evaluation_key(key),
    ranges=_TRAINING_RANGES,
    choices=_TRAINING_CHOICES,
)
LoraSection = _section_from_table(
    "LoraConfig", "LoraSection", leave_out=lambda key: key in _LORA_INTERNAL_KEYS, ranges=_LORA_RANGES, choices={}
)

SECTION_SCHEMAS: dict[str, type[BaseModel]] = {
    "model": ModelSection,
    "quantization": QuantizationSection,
    "lora": LoraSection,
    "prompt": Prompt,
    "data": DataSection,
    "training": TrainingSection,
    "generation": GenerationSection,
    "evaluation": EvaluationSection,
}
REQUIRED_SECTIONS = ("model", "prompt", "data", "training")
SPEEDS = ("auto", "plain", "lean")
