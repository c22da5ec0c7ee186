"""Question 1, first half: the data, the fine-tuning method, the hyperparameters and the prompt."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from trl import SFTConfig

from hw3.common.shell_commands import hw3_command
from hw3.config.recipe import Recipe
from hw3.data.rows import DataFileKey
from hw3.report.blocks import Block, Facts, Heading, Missing, Table, Text
from hw3.report.checkpoint_scores import final_score_blocks, learning_curve_blocks, score_breakdown_blocks
from hw3.report.formatting import CI, format_count, format_difference, format_percent, format_score, format_value
from hw3.report.language import join_sentences, tr
from hw3.report.prompting import prompt_block
from hw3.report.run_data import RunData, compare_entries, have_same_rows
from hw3.runs.run import Run

_TRAINING_DEFAULTS = {field.name: field.default for field in fields(SFTConfig)} | {
    "lr_scheduler_type": "linear",
    "activation_checkpointing": False,
}


def fine_tuning_blocks(run: RunData, output_dir: Path) -> list[Block]:
    """Return the blocks of question 1 for one run.

    Args:
        run: the run.
        output_dir: the folder of the report, for links.
    """
    return [
        Heading(tr("Data")),
        *_data_blocks(run),
        Heading(tr("Method and hyperparameters")),
        *method_blocks(run),
        prompt_block(tr("The prompt, identical in training, scoring and generation"), run.recipe.prompt, []),
        Heading(tr("Final score")),
        *final_score_blocks(run),
        Heading(tr("Learning curve"), "learning-curve"),
        *learning_curve_blocks(run, output_dir),
        *score_breakdown_blocks(run),
    ]


def method_blocks(run: RunData) -> list[Block]:
    """Return how the base model is fine-tuned, and the hyperparameters."""
    blocks: list[Block] = []
    if not run.checkpoints:
        command = hw3_command("train", "RECIPE.yaml", "--run", run.name)
        blocks.append(Missing(tr("This run has no checkpoint yet."), [command]))
    return [*blocks, Text(_describe_method(run)), Facts(_hyperparameters(run.recipe))]


def settings_comparison_blocks(main: RunData, others: list[RunData]) -> list[Block]:
    """Return a table of runs of the same base model: which settings differ, and the scores."""
    if not others:
        return []
    runs = [main, *others]
    settings = [_flatten(run.recipe.to_dict()) for run in runs]
    keys = [
        key
        for key in dict.fromkeys(key for values in settings for key in values)
        if len({format_value(values.get(key)) for values in settings}) > 1 and not key.startswith("prompt.examples")
    ]
    rows = []
    for run, values in zip(runs, settings, strict=True):
        differing = ", ".join(f"{key}={format_value(values.get(key))}" for key in keys) or tr("the same recipe")
        if run.best is None:
            rows.append([run.name, differing, tr("not scored"), "", ""])
            continue
        difference = ""
        if run is not main and main.best is not None and have_same_rows(main, run):
            difference = format_difference(compare_entries(main, main.best, run.best, run))
        rows.append([run.name, differing, format_score(run.best), f"{run.best.step:,}", difference])
    header = [tr("run"), tr("settings"), f"{tr('best mean perplexity')} {CI}", tr("step")]
    header += [f"{tr('difference from {name}', name=main.name)} {CI}"]
    return [
        Heading(tr("Other settings for the same base model")),
        Table(tr("Runs and the settings that differ between them"), header, rows, {0}, text_columns=2),
    ]


def _data_blocks(run: RunData) -> list[Block]:
    uses: dict[DataFileKey, str] = {
        "train": tr("training"),
        "dev": tr("selecting the checkpoint"),
        "eval": tr("scoring"),
    }
    rows, files = [], Run(run.path).data_files(run.recipe)
    for key, use in uses.items():
        if key not in files:
            continue
        data = None if run.manifest is None else run.manifest.data.get(key)
        if data is None and key == "eval" and run.results is not None:
            data = run.results.data
        if data is None:
            rows.append([use, files[key].as_posix(), "—"])
        else:
            rows.append([use, data.path, f"{data.rows:,}"])
    header = [tr("used for"), tr("file"), tr("rows")]
    blocks: list[Block] = [Table(tr("Data files"), header, rows, text_columns=2)]
    if run.checkpoints and run.manifest is not None:
        blocks.append(Text(_describe_training_length(run, run.manifest.data["train"].rows)))
    return blocks


def _describe_training_length(run: RunData, training_rows: int) -> str:
    steps, rows_per_step = run.checkpoints[-1].step, run.recipe.rows_per_step
    epochs = steps / max(1, training_rows // rows_per_step)
    length = tr(
        "Training ran for {steps} with {rows} per step. That is {total}, or {epochs:.1f} epochs.",
        steps=format_count(steps, "optimizer step"),
        rows=format_count(rows_per_step, "row"),
        total=format_count(steps * rows_per_step, "row"),
        epochs=epochs,
    )
    early_stop = None if run.manifest is None else run.manifest.stopped_early
    if early_stop is not None and early_stop.patience is not None:
        count = format_count(early_stop.patience, "checkpoint")
        length = join_sentences(length, tr("It ended early, because {count} in a row did not improve.", count=count))
    if not run.training_tokens:
        return length
    tokens = tr("These rows have {tokens:,} tokens, prompts included.", tokens=run.training_tokens)
    return join_sentences(length, tokens)


def _describe_method(run: RunData) -> str:
    quantization, lora = run.recipe.quantization, run.recipe.lora
    sentences = [tr("The base model is {base}.", base=run.base_name)]
    if quantization is not None:
        kind = quantization.bnb_4bit_quant_type.upper()
        if quantization.bnb_4bit_use_double_quant:
            kind = tr("{kind} with double quantization", kind=kind)
        sentences.append(
            tr(
                "Its weights are quantized to 4-bit {kind} and frozen. Computations with them use {dtype}.",
                kind=kind,
                dtype=quantization.bnb_4bit_compute_dtype,
            )
        )
    if lora is None:
        sentences.append(tr("All its weights are trained."))
    else:
        modules = lora.get("target_modules", tr("PEFT's default layers"))
        layers = tr("every linear layer except the output head") if modules == "all-linear" else format_value(modules)
        sentences.append(
            tr("LoRA adapters of rank {r} on {layers} are trained in float32.", r=lora.get("r", 8), layers=layers)
        )
    if run.manifest is not None:
        counts = run.manifest.parameters
        percent = format_percent(counts.trained / counts.total)
        sentences.append(
            tr(
                "{trained:,} parameters are trained, {percent} of the base model's {total:,}.",
                trained=counts.trained,
                percent=percent,
                total=counts.total,
            )
        )
    sentences.append(
        tr("The loss is the cross-entropy of the output and its end-of-sequence token only; the prompt is masked.")
    )
    return join_sentences(*sentences)


def _hyperparameters(recipe: Recipe) -> list[tuple[str, str]]:
    """Return the hyperparameters that readers ask for. The complete recipe is in the last section of the report."""

    def training(key: str) -> Any:
        return recipe.training.get(key, _TRAINING_DEFAULTS[key])

    rows, accumulation = training("per_device_train_batch_size"), training("gradient_accumulation_steps")
    steps, save_strategy = training("max_steps"), recipe.training.get("save_strategy", "steps")
    return [
        *_model_settings(recipe),
        (tr("rows per step"), f"{rows} × {accumulation}"),
        (tr("training length"), _training_length(steps, training("num_train_epochs"))),
        (tr("learning rate"), f"{format_value(training('learning_rate'))}, {training('lr_scheduler_type')}"),
        (tr("warmup steps"), format_value(training("warmup_steps"))),
        (tr("optimizer"), format_value(getattr(training("optim"), "value", training("optim")))),
        (tr("weight decay"), format_value(training("weight_decay"))),
        (tr("max gradient norm"), format_value(training("max_grad_norm"))),
        (tr("autocast"), _autocast_dtype(training("bf16"), training("fp16"))),
        (
            tr("activation checkpointing"),
            format_value(recipe.speed == "lean" or bool(training("activation_checkpointing"))),
        ),
        (
            tr("max tokens per row"),
            tr(
                "{length:,}; longer rows: {policy}",
                length=recipe.data.max_length,
                policy=tr(recipe.data.too_long.replace("_", " ")),
            ),
        ),
        (
            tr("checkpoint every"),
            tr("{steps} steps", steps=format_value(training("save_steps")))
            if save_strategy == "steps"
            else tr("epoch"),
        ),
        (tr("seed"), str(recipe.seed)),
    ]


def _training_length(steps: int, epochs: float) -> str:
    if steps > 0:
        return tr("{steps} steps", steps=f"{steps:,}")
    return tr("{epochs} epochs", epochs=format_value(epochs))


def _model_settings(recipe: Recipe) -> list[tuple[str, str]]:
    quantization, lora = recipe.quantization, recipe.lora
    settings = [(tr("base model"), f"{recipe.model.pretrained_model_name_or_path}, {recipe.model.dtype}")]
    if quantization is None:
        settings.append((tr("quantization"), tr("none")))
    else:
        double = format_value(quantization.bnb_4bit_use_double_quant)
        compute_dtype = quantization.bnb_4bit_compute_dtype
        settings.append(
            (
                tr("quantization"),
                tr(
                    "{kind}, double quantization: {double}, compute dtype: {dtype}",
                    kind=quantization.bnb_4bit_quant_type,
                    double=double,
                    dtype=compute_dtype,
                ),
            )
        )
    if lora is not None:
        settings += [
            ("LoRA r", format_value(lora.get("r", 8))),
            ("LoRA alpha", format_value(lora.get("lora_alpha", 8))),
            ("LoRA dropout", format_value(lora.get("lora_dropout", 0.0))),
            ("LoRA target modules", format_value(lora.get("target_modules"))),
        ]
    return settings


def _autocast_dtype(bf16: bool | None, fp16: bool | None) -> str:
    if bf16 or (bf16 is None and not fp16):
        return "bfloat16"
    return "float16" if fp16 else tr("none, float32")


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
