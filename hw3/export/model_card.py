"""Write the model card of an exported model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hw3.config.recipe import Recipe
from hw3.config.yaml_loader import dump_yaml
from hw3.evaluation.selection import Scored

# Keys of a recipe that say nothing of the model: names and secrets of services, where logs went.
_PRIVATE = ("report_to", "run_name", "project", "trackio_", "logging_dir", "log_")


def public_recipe(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe a card may say: no rows, no paths of this machine, nothing of services."""
    values = recipe.to_dict()
    values["model"] = recipe.model.model_dump(exclude_none=True)
    values["model"]["pretrained_model_name_or_path"] = _base_name(recipe)
    values["prompt"].pop("examples")
    values["data"] = {key: value for key, value in values["data"].items() if key in ("max_length", "too_long")}
    values["training"] = {key: value for key, value in recipe.training.items() if not key.startswith(_PRIVATE)}
    return {
        key: values[key] for key in ("model", "quantization", "lora", "prompt", "data", "training") if key in values
    }


def _base_name(recipe: Recipe) -> str:
    name = recipe.model.pretrained_model_name_or_path
    return Path(name).name if Path(name).is_dir() else name


def card(scored: Scored, name: str, after: float) -> str:
    """The model card: recipe, data by name and hash, scores with intervals, how to run it."""
    recipe, manifest = scored.recipe, scored.manifest
    how = "full fine-tuning" if recipe.lora is None else "LoRA" if recipe.quantization is None else "QLoRA"
    base = _base_name(recipe)
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["trl", "sft"],
    }
    if not Path(recipe.model.pretrained_model_name_or_path).is_dir():
        front["base_model"] = base
    data = [
        f"| {use} | `{Path(entry['path']).name}` | {entry['rows']:,} | `{entry['sha256']}` |"
        for use, entry in manifest["data"].items()
    ]
    scores = [
        f"| {title} | {entry['mean_perplexity']:.3f} "
        f"[{entry['mean_perplexity_ci95'][0]:.2f}, {entry['mean_perplexity_ci95'][1]:.2f}] | "
        f"{entry['token_perplexity']:.3f} | {entry['bits_per_character']:.3f} |"
        for title, entry in (("base", scored.base), (f"tuned, step {scored.checkpoint.step}", scored.entry))
        if entry is not None
    ]
    versions = ", ".join(f"{package} {number}" for package, number in manifest["versions"].items())
    return "\n".join(
        [
            "---",
            dump_yaml(front).rstrip(),
            "---",
            "",
            f"# {name}",
            "",
            f"`{base}`, tuned by {how} on `{Path(manifest['data']['train']['path']).name}`, step "
            f"{scored.checkpoint.step}; whole weights in {recipe.model.dtype}.",
            "",
            "## Use",
            "",
            _usage(recipe),
            "",
            "## Scores",
            "",
            f"On `{scored.data.name}` ({scored.entry['rows']} rows): a row's perplexity is exp of the mean negative "
            "log-likelihood of its output and EOS; the score is the mean over rows, with a 95 % bootstrap interval.",
            "",
            "| | mean perplexity | token perplexity | bits a character |",
            "|---|---|---|---|",
            *scores,
            "",
            f"Scored as trained{'' if recipe.lora is None else ', the adapter beside its base'}; these merged weights, "
            f"loaded from this folder: {after:.3f}.",
            "",
            "## Data",
            "",
            "| | file | rows | SHA-256 |",
            "|---|---|---|---|",
            *data,
            "",
            "## Recipe",
            "",
            "```yaml",
            dump_yaml(public_recipe(recipe)).rstrip(),
            "```",
            "",
            f"Trained with {versions}, Python {manifest['python']}.",
            "",
        ]
    )


def _usage(recipe: Recipe) -> str:
    if recipe.prompt.chat_template:
        template = "The base's chat template, as in training"
        if recipe.prompt.system is not None:
            template += "; this text and a line end go before the instruction: " + json.dumps(
                recipe.prompt.system, ensure_ascii=False
            )
    else:
        template = "The chat template in this folder is the prompt that the model was trained with, not the base's own"
    return "\n".join(
        [
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto", device_map="auto")',
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
            'messages = [{"role": "user", "content": "今日無雨。\\n翻譯成現代文："}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ").to(model.device)",
            'new = model.generate(**inputs, max_new_tokens=256)[0, inputs["input_ids"].shape[1] :]',
            "print(tokenizer.decode(new, skip_special_tokens=True))",
            "```",
            "",
            f"{template}.",
        ]
    )
