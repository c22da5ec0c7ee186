"""What each section of a recipe may hold: the keyword arguments of the object that it builds."""

from __future__ import annotations

import dataclasses
import types
import typing
from enum import Enum
from typing import Annotated, Any, Literal

from peft import LoraConfig
from pydantic import BaseModel, ConfigDict, Field, create_model
from trl import SFTConfig

from hw3.data.prompt import Prompt

DType = Literal["bfloat16", "float16", "float32"]
Positive = Annotated[int, Field(ge=1)]
_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)


class ModelSection(BaseModel):
    """`AutoModelForCausalLM.from_pretrained`."""

    model_config = ConfigDict(**_STRICT, protected_namespaces=())

    pretrained_model_name_or_path: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    dtype: DType = "bfloat16"
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = (
        None
    )
    device_map: Literal["auto"] | None = None


class QuantizationSection(BaseModel):
    """`transformers.BitsAndBytesConfig`, its 4-bit part."""

    model_config = _STRICT

    load_in_4bit: Literal[True]
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True
    bnb_4bit_compute_dtype: DType = "bfloat16"
    bnb_4bit_quant_storage: Literal["uint8", "bfloat16", "float16", "float32"] = "uint8"


class DataSection(BaseModel):
    """Files of rows, and what to do with long ones."""

    model_config = _STRICT

    train: Annotated[str, Field(min_length=1)]
    eval: Annotated[str, Field(min_length=1)]
    dev: Annotated[str, Field(min_length=1)] | None = None
    max_length: Annotated[int, Field(ge=2)] = 512
    too_long: Literal["error", "drop", "truncate_prompt"] = "error"


class EvaluationSection(BaseModel):
    """How checkpoints are scored."""

    model_config = _STRICT

    tokens_per_batch: Positive | None = None
    bootstrap_samples: Positive = 2000
    bootstrap_seed: Annotated[int, Field(ge=0)] = 0
    examples_seed: Annotated[int, Field(ge=0)] = 0


class GenerationSection(BaseModel):
    """`transformers.GenerationConfig`. Greedy search unless told otherwise."""

    model_config = _STRICT

    max_new_tokens: Positive | None = None
    do_sample: bool = False
    num_beams: Positive = 1
    temperature: Annotated[float, Field(gt=0)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] | None = None
    length_penalty: float | None = None
    early_stopping: bool | None = None


_SCORER = "checkpoints are scored apart from training, by `make eval`"
_ROWS = "rows are tokenized here; see the `prompt` and `data` sections"
_PADDED = "one row is one sequence, padded; batches are grouped by length"
_UPLOAD = "a run is kept here: `hw3 export` writes a model, `hf upload` puts it on the hub"
_LAUNCHER = "use an accelerate configuration: make train GPUS=4 ACCELERATE=fsdp2"

# Keys of SFTConfig that the project decides, each with what to use instead.
DECIDED_TRAINING_KEYS: dict[str, str] = {
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
    "shuffle_dataset": "rows are always shuffled, by training.seed",
    "completion_only_loss": "the loss is always on the output and its EOS alone",
    "assistant_only_loss": "the loss is always on the output and its EOS alone",
    "chat_template_path": "use prompt.chat_template",
    "eos_token": "EOS is the tokenizer's own",
    "pad_token": "padding is masked by length, any id will do",
    "model_init_kwargs": "use the `model` section",
    "trust_remote_code": "code from a model repository is never run",
    "train_sampling_strategy": "rows are always grouped by length within shuffled blocks",
    "length_column_name": "rows are always grouped by length within shuffled blocks",
    "data_seed": "use training.seed",
    "remove_unused_columns": _ROWS,
    "label_names": _ROWS,
    "label_smoothing_factor": "not offered: it would need the full logits of every position",
    "logging_nan_inf_filter": "a non-finite loss always stops the run",
    "include_num_input_tokens_seen": "tokens are always counted, padding left out",
    "resume_from_checkpoint": "an interrupted run resumes by itself from its last complete checkpoint",
    "ignore_data_skip": "a resumed run always sees the rows it would have seen",
    "restore_callback_states_from_checkpoint": "an interrupted run resumes by itself, exactly",
    "save_only_model": "the last two checkpoints keep the optimizer's state, older ones drop it by themselves",
    "dataloader_drop_last": "rows that do not fill a step are left out of an epoch, other ones each time",
    "accelerator_config": "every number of processes sees the same rows in the same step",
    "average_tokens_across_devices": "the loss is always the mean over all output tokens of a step",
    "auto_find_batch_size": "rows per step are fixed by the recipe; raise gradient_accumulation_steps instead",
    "gradient_checkpointing": "use training.activation_checkpointing",
    "gradient_checkpointing_kwargs": "use training.activation_checkpointing_kwargs",
    "torch_compile": "use speed",
    "torch_compile_backend": "use speed",
    "torch_compile_mode": "use speed",
    "use_liger_kernel": "use speed",
    "push_to_hub": _UPLOAD,
    "hub_model_id": _UPLOAD,
    "hub_strategy": _UPLOAD,
    "hub_token": _UPLOAD,
    "hub_private_repo": _UPLOAD,
    "hub_always_push": _UPLOAD,
    "hub_revision": _UPLOAD,
    "liger_kernel_config": "use speed",
    "fsdp": _LAUNCHER,
    "fsdp_config": _LAUNCHER,
    "deepspeed": _LAUNCHER,
    "parallelism_config": _LAUNCHER,
    "local_rank": _LAUNCHER,
    "do_train": "use `hw3 train`",
    "do_eval": _SCORER,
    "do_predict": "use `hw3 predict`",
    "load_best_model_at_end": _SCORER,
    "metric_for_best_model": _SCORER,
    "greater_is_better": _SCORER,
    "prediction_loss_only": _SCORER,
    "batch_eval_metrics": _SCORER,
    "include_for_metrics": _SCORER,
    "bf16_full_eval": _SCORER,
    "fp16_full_eval": _SCORER,
}

_TRAINING_RANGES: dict[str, Any] = {
    "per_device_train_batch_size": Field(ge=1),
    "gradient_accumulation_steps": Field(ge=1),
    "num_train_epochs": Field(gt=0),
    "learning_rate": Field(gt=0),
    "weight_decay": Field(ge=0),
    "max_grad_norm": Field(ge=0),
    "warmup_steps": Field(ge=0),
    "logging_steps": Field(gt=0),
    "save_steps": Field(gt=0),
    "save_total_limit": Field(ge=1),
    "seed": Field(ge=0),
    "dataloader_num_workers": Field(ge=0),
}
_TRAINING_CHOICES: dict[str, Any] = {
    "loss_type": Literal["nll", "dft"],
    # A run that keeps nothing, or what an evaluation in the loop calls best, is no run to score.
    "save_strategy": Literal["steps", "epoch"],
}
_LORA_RANGES: dict[str, Any] = {
    "r": Field(ge=1),
    "lora_alpha": Field(gt=0),
    "lora_dropout": Field(ge=0, lt=1),
}
# Keys that PEFT fills in by itself.
_LORA_OWN = {
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_type",
}


def _choices(annotation: Any) -> Any:
    """The annotation with each enumeration as a choice of its words; `Enum | str` would take any word."""
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return Literal[tuple(str(member.value) for member in annotation)]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        parts = typing.get_args(annotation)
        if any(isinstance(part, type) and issubclass(part, Enum) for part in parts):
            parts = tuple(part for part in parts if part is not str)
        return typing.Union[tuple(_choices(part) for part in parts)]  # noqa: UP007  (built at run time)
    return annotation


def _section_of(
    config: type,
    name: str,
    *,
    leave_out: typing.Container[str],
    ranges: dict[str, Any],
    choices: dict[str, Any],
) -> type[BaseModel]:
    """A strict section with the fields of a library's configuration dataclass; all optional, none with a default."""
    hints = typing.get_type_hints(config)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        if field.name in leave_out or not field.init:
            continue
        annotation = choices.get(field.name, _choices(hints[field.name]))
        if field.name in ranges:
            annotation = Annotated[annotation, ranges[field.name]]
        fields[field.name] = (annotation, None)
    return create_model(name, __config__=_STRICT, **fields)


TrainingSection = _section_of(
    SFTConfig,
    "TrainingSection",
    leave_out={key.name for key in dataclasses.fields(SFTConfig) if key.name.startswith(("eval_", "per_device_eval"))}
    | set(DECIDED_TRAINING_KEYS),
    ranges=_TRAINING_RANGES,
    choices=_TRAINING_CHOICES,
)
LoraSection = _section_of(LoraConfig, "LoraSection", leave_out=_LORA_OWN, ranges=_LORA_RANGES, choices={})

SECTIONS: dict[str, type[BaseModel]] = {
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
