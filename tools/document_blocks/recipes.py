"""Blocks about recipes: their settings, keys and costs."""

from __future__ import annotations

import json
from typing import Any

from peft import LoraConfig
from transformers import AutoConfig
from trl import SFTConfig

from document_blocks.key_meanings import COMMON_KEYS, PROJECT_KEYS
from document_blocks.sources import (
    REPOSITORY,
    find_row,
    format_peak_memory,
    format_run_peak,
    format_table,
    read_json,
    read_report,
)
from hw3.common.disk import format_bytes
from hw3.config.recipe import Recipe, load_recipe
from hw3.config.schema import (
    RESERVED_TRAINING_KEYS,
    SPEEDS,
    DataSection,
    EvaluationSection,
    GenerationSection,
    ModelSection,
    QuantizationSection,
)
from hw3.data.prompt import Prompt
from hw3.modeling.loading import count_parameters
from hw3.training.sft_arguments import estimate_checkpoint_bytes

# Sections whose schema is this project's; `lora` and `training` take the keys of their library.
SECTIONS = {
    "model": ModelSection,
    "quantization": QuantizationSection,
    "prompt": Prompt,
    "data": DataSection,
    "generation": GenerationSection,
    "evaluation": EvaluationSection,
}


def recipes() -> str:
    """One line per recipe."""
    rows = []
    for path in sorted(REPOSITORY.glob("recipes/*/*.yaml")):
        if path.parent.name in ("prompts", "search"):
            continue
        recipe = load_recipe(path)
        lora, training = recipe.lora or {}, recipe.training
        rows.append(
            (
                f"[`{path.parent.name}/{path.stem}`](../{path.relative_to(REPOSITORY).as_posix()})",
                f"`{recipe.model.pretrained_model_name_or_path}`",
                f"{lora['r']} / {lora['lora_alpha']}",
                f"{training['per_device_train_batch_size']} x {training['gradient_accumulation_steps']}",
                f"{training['max_steps']:,}",
                f"{training['learning_rate']:g}",
            )
        )
    return format_table(["recipe", "base model", "LoRA r / alpha", "rows per step", "steps", "learning rate"], rows)


def recipe_keys() -> str:
    """Keys of the sections whose schema is this project's: default, values, meaning and an example."""
    rows = [("`speed`", f'`"{SPEEDS[0]}"`', ", ".join(f"`{speed}`" for speed in SPEEDS), *_explain("speed"))]
    for section, model in SECTIONS.items():
        schema = model.model_json_schema()
        for name, properties in schema["properties"].items():
            default = f"`{json.dumps(properties.get('default'), ensure_ascii=False)}`"
            is_required = name in schema.get("required", ())
            key, default = f"{section}.{name}", "required" if is_required else default
            rows.append((f"`{key}`", default, _describe_values(properties), *_explain(key)))
    return format_table(["key", "default", "values", "meaning", "example"], rows)


def common_keys() -> str:
    """Keys of `training` and `lora` that recipes change most often: default, meaning and an example."""
    defaults = {f"training.{name}": field.default for name, field in SFTConfig.__dataclass_fields__.items()}
    defaults |= {f"lora.{name}": field.default for name, field in LoraConfig.__dataclass_fields__.items()}
    defaults |= {
        "training.activation_checkpointing": False,
        "training.report_to": "tensorboard",
        "lora.rank_pattern": {},
        "lora.task_type": "CAUSAL_LM",
    }
    rows = []
    for key, (meaning, example) in COMMON_KEYS.items():
        default = json.dumps(getattr(defaults[key], "value", defaults[key]))
        rows.append((f"`{key}`", f"`{default}`", meaning, f"`{example}`"))
    return format_table(["key", "default", "meaning", "example"], rows)


def _explain(key: str) -> tuple[str, str]:
    """Return the meaning of a key and an example of its value."""
    meaning, example = PROJECT_KEYS[key]
    return meaning, f"`{example}`"


def _describe_values(properties: dict[str, Any]) -> str:
    """Return the values that a key may have, from its JSON schema."""
    if "enum" in properties:
        return ", ".join(f"`{value}`" for value in properties["enum"])
    if "const" in properties:
        return f"`{json.dumps(properties['const'])}`"
    if "anyOf" in properties:
        return " or ".join(filter(None, map(_describe_values, properties["anyOf"])))
    types = {"string": "text", "integer": "integer", "number": "number", "boolean": "`true`, `false`"}
    described = {**types, "array": "list", "null": "`null`"}.get(properties.get("type", ""), "")
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    bounds = " and ".join(f"{word} {properties[bound]}" for bound, word in words.items() if bound in properties)
    return f"{described} {bounds}".rstrip()


def reserved_keys() -> str:
    """Keys of `training` that a recipe may not have, with the message that refuses each."""
    return format_table(
        ["key", "message"], [(f"`{key}`", message) for key, message in sorted(RESERVED_TRAINING_KEYS.items())]
    )


def costs() -> str:
    """Disk, memory and time of each recipe, measured where there is a measurement."""
    names = ("tiny", "smollm2", "gemma", "llama", "qwen")
    recipes = {name: load_recipe(REPOSITORY / f"recipes/{name}/qlora.yaml") for name in names}
    measured = _measured_costs(recipes["llama"])
    shapes = read_json("benchmarks/shapes.json")
    rows = []
    for name, recipe in recipes.items():
        if name == "tiny":
            trained = read_json("docs/tiny/manifest.json")["parameters"]["trained"]
        else:
            trained, _ = count_parameters(recipe, AutoConfig.for_model(**shapes[name]))
        rows.append((f"`{name}`", f"{trained:,}", _estimate_disk(recipe, trained), *measured[name]))
    return format_table(["recipe", "trained parameters", "disk", "GPU memory, training", "time"], rows)


def _measured_costs(llama_recipe: Recipe) -> dict[str, tuple[str, str]]:
    """Return the measured (memory, time) of recipes by name."""
    seconds = sum(session["seconds"] for session in read_json("docs/tiny/manifest.json")["sessions"])
    smollm2 = read_json("docs/smollm2/manifest.json")
    smollm2_seconds = sum(session["seconds"] for session in smollm2["sessions"])
    gpu = read_report("train_step")["machine"]["gpu"]
    plain = read_report("gpu_recipe")["rows"][0]
    gemma = read_report("train_step_later")["rows"][0]
    gemma_seconds = read_report("train_step_full_run")["rows"][0]["seconds_total"]
    llama = read_report("train_step_llama")["rows"][0]
    qwen = find_row(read_report("small_gpus"), "`qwen`, 24 GiB")
    llama_seconds = llama["seconds_per_step"] * llama_recipe.training["max_steps"] + llama["seconds_capturing"]
    return {
        "tiny": ("none", f"{seconds:.0f} s on 2 CPU cores"),
        "smollm2": (format_run_peak(smollm2), f"{smollm2_seconds:.0f} s on one {smollm2['device']}"),
        "gemma": (
            f"{format_peak_memory(gemma)}; with `speed: plain` {plain['peak_gib']:.1f}",
            f"{gemma_seconds / 60:.1f} min on one {gpu}",
        ),
        "llama": (
            format_peak_memory(llama),
            f"{llama_seconds / 60:.1f} min on one {gpu}, estimated from {llama['steps']} steps",
        ),
        "qwen": (format_peak_memory(qwen), "not measured"),
    }


def _estimate_disk(recipe: Recipe, trained: int) -> str:
    """Return the disk space of a run's checkpoints."""
    training = recipe.training
    config = SFTConfig(
        output_dir="",
        use_cpu=True,
        bf16=False,
        max_steps=training["max_steps"],
        save_steps=training["save_steps"],
        optim=training["optim"],
        activation_checkpointing=False,
    )
    return format_bytes(estimate_checkpoint_bytes(config, None, trained, training["max_steps"], steps_per_epoch=1))
