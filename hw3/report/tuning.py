"""The first question: data, tuning, hyper-parameters, the final score and the learning curve."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from trl import SFTConfig

from hw3.config.recipe import Recipe
from hw3.evaluation.learning_curve import own_entries
from hw3.report.blocks import Block, Curve, Facts, Heading, Missing, Table, Text
from hw3.report.formatting import CI, DIRECTIONS, brief, difference, figure, length_group, plural, score, share, shots
from hw3.report.prompting import prompt_code
from hw3.report.provenance import evaluate_command
from hw3.report.run_data import Run, pair_of, same_rows
from hw3.report.svg import curve, interval_scale

WIDE, NARROW = 760, 350
FOLD_TABLES_FROM = 12  # rows
_TRAINING_DEFAULTS = {field.name: field.default for field in fields(SFTConfig)} | {
    "lr_scheduler_type": "linear",
    "activation_checkpointing": False,
}


def tuning(run: Run, out: Path) -> list[Block]:
    blocks: list[Block] = [Heading("How much data"), *_data(run), Heading("How it was tuned"), *method(run)]
    title = "The prompt, the same in training, scoring and generation"
    blocks.append(prompt_code(title, run.recipe.prompt, [], folded=False))
    blocks += [Heading("Final score"), *final(run)]
    blocks += [Heading("Learning curve", "learning-curve"), *learning_curve(run, out), *_groups(run)]
    return blocks


def _data(run: Run) -> list[Block]:
    roles = {"train": "training", "dev": "choosing the checkpoint", "eval": "score"}
    rows: list[list[Any]] = []
    for key, role in roles.items():
        name = getattr(run.recipe.data, key)
        if name is None:
            continue
        known = run.manifest.get("data", {}).get(key)
        if known is None and key == "eval" and run.results is not None:
            known = run.results.head["data"]
        rows.append(
            [role, name, "—", "—"]
            if known is None
            else [role, known["path"], known["sha256"][:12], f"{known['rows']:,}"]
        )
    blocks: list[Block] = [Table("Files of rows", ["used for", "file", "sha256 begins", "rows"], rows, texts=3)]
    if run.checkpoints and run.manifest:
        step, per_step = run.checkpoints[-1].step, run.recipe.rows_per_step
        passes = step / max(1, run.manifest["data"]["train"]["rows"] // per_step)
        tokens = f", {run.tokens:,} tokens with their prompts" if run.tokens else ""
        blocks.append(
            Text(
                f"{plural(step, 'optimizer step')} of {plural(per_step, 'row')} are {step * per_step:,} rows{tokens}: "
                f"{passes:.1f} times through the training file."
            )
        )
    return blocks


def method(run: Run) -> list[Block]:
    blocks: list[Block] = []
    if not run.checkpoints:
        blocks.append(
            Missing("Nothing has been trained in this folder yet.", [f"hw3 train RECIPE.yaml --run {run.name}"])
        )
    blocks.append(Text(_method_in_words(run)))
    blocks.append(Facts(_settings(run.recipe)))
    return blocks


def _method_in_words(run: Run) -> str:
    recipe = run.recipe
    quantization, lora = recipe.quantization, recipe.lora
    words = f"{run.base}"
    if quantization is not None:
        double = " with double quantization" if quantization.bnb_4bit_use_double_quant else ""
        words += (
            f", its weights frozen in {quantization.bnb_4bit_quant_type.upper()}{double} and computed with in "
            f"{quantization.bnb_4bit_compute_dtype}"
        )
    if lora is None:
        words += ": all weights are tuned"
    else:
        modules = lora.get("target_modules", "the library's default layers")
        where = "every linear layer but the head" if modules == "all-linear" else brief(modules)
        words += f": LoRA adapters of rank {lora.get('r', 8)} on {where} are tuned, in float32"
    if parameters := run.manifest.get("parameters"):
        part = share(parameters["trained"] / parameters["total"])
        words += f"; {parameters['trained']:,} parameters beside the base's {parameters['total']:,} ({part})"
    return words + (
        ". The loss is the cross-entropy of the output and its end-of-sequence token alone; the prompt is masked."
    )


def _settings(recipe: Recipe) -> list[tuple[str, str]]:
    """The hyper-parameters that one asks for; the recipe in full stands in the record."""

    def training(key: str) -> Any:
        return recipe.training.get(key, _TRAINING_DEFAULTS[key])

    quantization, lora = recipe.quantization, recipe.lora
    steps = training("max_steps")
    length = f"{steps:,} steps" if steps > 0 else f"{brief(training('num_train_epochs'))} epochs"
    autocast = "bfloat16" if training("bf16") or (training("bf16") is None and not training("fp16")) else None
    facts = [
        ("base", f"{recipe.model.pretrained_model_name_or_path}, {recipe.model.dtype}"),
        (
            "quantization",
            "none"
            if quantization is None
            else f"{quantization.bnb_4bit_quant_type}, double: {brief(quantization.bnb_4bit_use_double_quant)}, "
            f"compute {quantization.bnb_4bit_compute_dtype}",
        ),
    ]
    if lora is not None:
        facts += [
            ("LoRA r", brief(lora.get("r", 8))),
            ("LoRA alpha", brief(lora.get("lora_alpha", 8))),
            ("LoRA dropout", brief(lora.get("lora_dropout", 0.0))),
            ("LoRA modules", brief(lora.get("target_modules"))),
        ]
    return [
        *facts,
        ("rows a step", f"{training('per_device_train_batch_size')} × {training('gradient_accumulation_steps')}"),
        ("length", length),
        ("learning rate", f"{brief(training('learning_rate'))}, {training('lr_scheduler_type')}"),
        ("warm-up", brief(training("warmup_steps"))),
        ("optimizer", brief(getattr(training("optim"), "value", training("optim")))),
        ("weight decay", brief(training("weight_decay"))),
        ("gradient clipping", brief(training("max_grad_norm"))),
        ("autocast", autocast or ("float16" if training("fp16") else "none, float32")),
        ("activation checkpointing", brief(recipe.speed == "lean" or bool(training("activation_checkpointing")))),
        ("most tokens a row", f"{recipe.data.max_length:,}, else {recipe.data.too_long.replace('_', ' ')}"),
        ("checkpoint every", f"{brief(training('save_steps'))} steps" if _by_steps(recipe) else "epoch"),
        ("seed", str(recipe.seed)),
    ]


def _by_steps(recipe: Recipe) -> bool:
    return recipe.training.get("save_strategy", "steps") == "steps"


def final(run: Run) -> list[Block]:
    if run.results is None:
        return [Missing(f"{run.recipe.data.eval} has not been scored.", [evaluate_command(run)])]
    if run.best is None:
        return [Missing("No checkpoint has been scored.", [evaluate_command(run)])]
    best, data = run.best, run.results.head["data"]
    chosen_on = (run.results.chosen_on or run.results).head["data"]["path"]
    blocks: list[Block] = [
        Text(
            f"{score(best)} on {data['path']}, {plural(data['rows'], 'row')}, at step {best['step']:,} of "
            f"{run.checkpoints[-1].step if run.checkpoints else best['step']:,}. The interval is a bootstrap over rows"
            f", 95 %. Over all {best['tokens']:,} output tokens alike the perplexity is "
            f"{figure(best['token_perplexity'])}, the median row's {figure(best['median_perplexity'])}; "
            f"{best['bits_per_character']:.3f} bits a character."
        )
    ]
    if chosen_on == data["path"]:
        blocks.append(
            Text(
                "The best checkpoint was chosen on the file that it is reported on, as the course does; that flatters "
                "the figure a little.",
                aside=True,
            )
        )
    else:
        blocks.append(Text(f"The checkpoint was chosen on {chosen_on}, so this file had no part in it.", aside=True))
    if run.others:
        blocks.append(_other_files(run, best))
    if best["unknown_tokens"]:
        part = share(best["unknown_tokens"] / best["tokens"])
        blocks.append(
            Text(f"{best['unknown_tokens']:,} output tokens ({part}) are unknown to the tokenizer.", aside=True)
        )
    return blocks


def _other_files(run: Run, best: dict[str, Any]) -> Table:
    """The same checkpoint on whatever else has been scored."""
    rows: list[list[Any]] = []
    for results in run.others:
        base, tuned = own_entries(results)
        zero = next((entry for entry in base if entry["shots"] == 0), None)
        same = next((entry for entry in tuned if entry["checkpoint"] == best["checkpoint"]), None)
        scores = ["not scored" if entry is None else score(entry) for entry in (zero, same)]
        rows.append([results.head["data"]["path"], f"{results.head['data']['rows']:,}", *scores])
    head = ["file", "rows", f"un-tuned, zero-shot {CI}", f"step {best['step']:,} {CI}"]
    return Table("The same checkpoint on other files", head, rows)


def learning_curve(run: Run, out: Path) -> list[Block]:
    if run.results is None or not run.results.entries:
        return []
    picture = run.results.folder / "learning_curve.png"
    link = Path(os.path.relpath(picture, out)).as_posix() if picture.is_file() else None
    if not run.untuned and not run.tuned:
        return []
    chooser = run.results.chosen_on
    dev = chooser is not None and chooser is not run.results
    blocks: list[Block] = [
        Curve(curve(run.results, run.losses, WIDE), curve(run.results, run.losses, NARROW), link, dev)
    ]
    best = run.best
    if best is None:
        return blocks
    rows: list[list[Any]] = []
    draw = interval_scale(run.tuned)
    mark = "chosen" if dev else "best"
    for entry in run.tuned:
        pair = None if entry is best else pair_of(run, best, entry)
        rows.append(
            [
                f"{entry['step']:,}" + (f" ({mark})" if entry is best else ""),
                draw(entry),
                score(entry),
                figure(entry["median_perplexity"]),
                figure(entry["token_perplexity"]),
                f"{entry['bits_per_character']:.3f}",
                *(["", ""] if pair is None else [difference(pair), f"{pair.better} / {pair.worse}"]),
            ]
        )
    strong = {number for number, entry in enumerate(run.tuned) if entry is best}
    head = ["step", "", f"mean {CI}", "median row", "token", "bits a character"]
    head += [f"minus the {mark} {CI}", "rows better / worse"]
    blocks.append(Table("Perplexity by checkpoint", head, rows, strong, texts=2, folded=len(rows) > FOLD_TABLES_FROM))
    last = run.tuned[-1]
    if last is not best:
        pair = pair_of(run, best, last)
        verdict = (
            "the run went on past its best: it overfits from there"
            if pair.ci95[0] > 0
            else "the interval does not tell the two apart"
        )
        blocks.append(
            Text(
                f"From step {best['step']:,} to {last['step']:,} the score changes by {difference(pair)}, row by row; "
                f"{verdict}."
            )
        )
    return blocks


def _groups(run: Run) -> list[Block]:
    """Scores by direction and length, and the rows that weigh most."""
    if run.results is None:
        return []
    shown = [entry for entry in (run.zero_shot, run.few_shot, run.best) if entry is not None]
    if not shown:
        return []
    rows: list[list[Any]] = []
    for group, names in (("by_direction", DIRECTIONS), ("by_length", None)):
        for key in dict.fromkeys(key for entry in shown for key in entry[group]):
            figures = [entry[group][key] for entry in shown]
            name = length_group(key) if names is None else names[key]
            rows.append([name, f"{figures[0]['rows']:,}", *(figure(f["mean_perplexity"]) for f in figures)])
    head = ["output", "rows", *("tuned" if entry is run.best else f"un-tuned, {shots(entry)}" for entry in shown)]
    blocks: list[Block] = [
        Heading("By direction and length of the output"),
        Table("Mean perplexity by direction and by characters of the output", head, rows),
    ]
    if run.best is not None:
        heaviest = run.best["heaviest"]
        total = share(sum(row["share"] for row in heaviest))
        blocks.append(
            Table(
                f"The rows that the tuned mean hangs on: these {len(heaviest)} are {total} of it",
                ["row", "perplexity", "share of the sum", "tokens"],
                [[row["id"], figure(row["perplexity"]), share(row["share"]), f"{row['tokens']:,}"] for row in heaviest],
                folded=True,
            )
        )
    return blocks


def other_settings(main: Run, others: list[Run]) -> list[Block]:
    """Runs of the same base: which keys differ, and what came out."""
    if not others:
        return []
    runs = [main, *others]
    flat = [_flat(run.recipe.to_dict()) for run in runs]
    keys = [
        key
        for key in dict.fromkeys(key for values in flat for key in values)
        if len({brief(values.get(key)) for values in flat}) > 1 and not key.startswith("prompt.examples")
    ]
    rows: list[list[Any]] = []
    for run, values in zip(runs, flat, strict=True):
        settings = ", ".join(f"{key}={brief(values.get(key))}" for key in keys) or "the same recipe"
        best = run.best
        if best is None:
            rows.append([run.name, settings, "not scored", "", ""])
            continue
        comparable = run is not main and main.best is not None and same_rows(main, run)
        pair = pair_of(main, main.best, best, run) if comparable else None
        rows.append([run.name, settings, score(best), f"{best['step']:,}", "" if pair is None else difference(pair)])
    return [
        Heading("Other settings of the same base"),
        Table(
            "Runs by what differs between their recipes",
            ["run", "settings", f"best mean perplexity {CI}", "step", f"minus {main.name} {CI}"],
            rows,
            {0},
            texts=2,
        ),
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
