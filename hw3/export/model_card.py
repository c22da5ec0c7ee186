"""Write the model card of an exported model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hw3.config.recipe import Recipe
from hw3.config.yaml_loader import dump_yaml
from hw3.evaluation.selection import ScoredCheckpoint
from hw3.modeling.float16_products import get_export_dtype

# Training keys that do not describe the model: names and secrets of services, places of logs.
_PRIVATE_KEY_PREFIXES = ("report_to", "run_name", "project", "trackio_", "logging_dir", "log_")
_USAGE_CODE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
messages = [{"role": "user", "content": "今日無雨。\\n翻譯成現代文："}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
).to(model.device)
new_ids = model.generate(**inputs, max_new_tokens=256)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(new_ids, skip_special_tokens=True))
```"""


def build_model_card(scored: ScoredCheckpoint, name: str, merged_perplexity: float) -> str:
    """Return the model card: usage, scores, training data by name and hash, and recipe.

    Args:
        scored: the exported checkpoint with its scores.
        name: title of the card.
        merged_perplexity: mean perplexity of the exported weights, on the same rows.
    """
    recipe, manifest = scored.recipe, scored.manifest
    method = "Full" if recipe.lora is None else "LoRA" if recipe.quantization is None else "QLoRA"
    sections = [
        f"---\n{dump_yaml(_front_matter(recipe)).rstrip()}\n---",
        f"# {name}",
        f"{method} fine-tuning of `{_base_model_name(recipe)}` on `{Path(manifest.data['train'].path).name}`, step "
        f"{scored.checkpoint.step}. Complete weights in {get_export_dtype(recipe.model.dtype)}.",
        f"## Use\n\n{_USAGE_CODE}\n\n{_describe_chat_template(recipe)}",
        f"## Scores\n\n{_describe_scores(scored, merged_perplexity)}",
        f"## Data\n\n{_data_table(scored)}",
        f"## Recipe\n\n```yaml\n{dump_yaml(public_recipe(recipe)).rstrip()}\n```",
        f"Trained with {', '.join(f'{package} {version}' for package, version in manifest.versions.items())}, Python "
        f"{manifest.python}.",
    ]
    return "\n\n".join(sections) + "\n"


def public_recipe(recipe: Recipe) -> dict[str, Any]:
    """Return the parts of a recipe that may be published.

    Data files, few-shot examples, local paths and settings of services are left out.
    """
    values = recipe.to_dict()
    values["model"] = recipe.model.model_dump(exclude_none=True)
    values["model"]["pretrained_model_name_or_path"] = _base_model_name(recipe)
    values["prompt"].pop("examples")
    values["data"] = {key: value for key, value in values["data"].items() if key in ("max_length", "too_long")}
    values["training"] = {
        key: value for key, value in recipe.training.items() if not key.startswith(_PRIVATE_KEY_PREFIXES)
    }
    return {
        key: values[key] for key in ("model", "quantization", "lora", "prompt", "data", "training") if key in values
    }


def _front_matter(recipe: Recipe) -> dict[str, Any]:
    """Return the metadata that the Hugging Face Hub reads."""
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["trl", "sft"],
    }
    if not _is_local(recipe):
        metadata["base_model"] = recipe.model.pretrained_model_name_or_path
    return metadata


def _is_local(recipe: Recipe) -> bool:
    return Path(recipe.model.pretrained_model_name_or_path).is_dir()


def _base_model_name(recipe: Recipe) -> str:
    """Return the name on the Hub, or only the folder's name of a local base model."""
    name = recipe.model.pretrained_model_name_or_path
    return Path(name).name if _is_local(recipe) else name


def _describe_chat_template(recipe: Recipe) -> str:
    if not recipe.prompt.chat_template:
        return (
            "The chat template in this folder is the prompt that the model was trained with, not the base model's own "
            "template."
        )
    text = "The chat template is the base model's own, as in training."
    if recipe.prompt.system is not None:
        system = json.dumps(recipe.prompt.system, ensure_ascii=False)
        text += f" Put this text and a newline before the instruction: {system}"
    return text


def _describe_scores(scored: ScoredCheckpoint, merged_perplexity: float) -> str:
    """Return the table of scores, with an explanation before and the score of the exported weights after it."""
    lines = [
        f"On `{scored.data_file.name}` ({scored.entry.rows} rows). A row's perplexity is exp of the mean negative "
        "log-likelihood of its output and EOS. The score is the mean over rows, with a 95 % bootstrap interval.",
        "",
        "| | mean perplexity | token perplexity | bits per character |",
        "|---|---|---|---|",
    ]
    for title, entry in (("base model", scored.base), (f"fine-tuned, step {scored.checkpoint.step}", scored.entry)):
        if entry is not None:
            low, high = entry.mean_perplexity_ci95
            lines.append(
                f"| {title} | {entry.mean_perplexity:.3f} [{low:.2f}, {high:.2f}] | {entry.token_perplexity:.3f} | "
                f"{entry.bits_per_character:.3f} |"
            )
    how_scored = "" if scored.recipe.lora is None else ", with the adapter beside its base model"
    lines += [
        "",
        f"The checkpoint was scored as in training{how_scored}. The weights in this folder have a mean perplexity of "
        f"{merged_perplexity:.3f}.",
    ]
    return "\n".join(lines)


def _data_table(scored: ScoredCheckpoint) -> str:
    lines = ["| | file | rows | SHA-256 |", "|---|---|---|---|"]
    for use, data in scored.manifest.data.items():
        lines.append(f"| {use} | `{Path(data.path).name}` | {data.rows:,} | `{data.sha256}` |")
    return "\n".join(lines)
