"""Make the `adapter_config.json` of a submission: no local paths, and only keys that the grader's PEFT knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import LoraConfig

from hw3.common.errors import UserError
from hw3.common.shell_commands import hw3_command
from hw3.evaluation.selection import ScoredCheckpoint
from hw3.modeling.fingerprint import ADAPTER_CONFIG
from hw3.submission.fill_templates import TEMPLATES_DIR

# The grader's PEFT refuses a configuration with keys that it does not know.
PEFT_BY_GRADER_YEAR = {"2024": "peft-0.13.0"}


def build_adapter_config(scored: ScoredCheckpoint, grader_year: str | None) -> dict[str, Any]:
    """Return the adapter's configuration for a submission.

    Args:
        scored: the checkpoint.
        grader_year: return only the keys that this year's grader knows; None for all keys.

    Raises:
        UserError: the run has no adapter, or a setting cannot be expressed with the grader's PEFT.
    """
    if scored.recipe.lora is None:
        raise UserError(
            f"{scored.run}: full fine-tuning has no adapter, but the grader needs one; train with a lora section, or "
            f"export the complete model: {hw3_command('export', scored.run)}"
        )
    path = scored.checkpoint.path / ADAPTER_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    base = Path(scored.recipe.model.pretrained_model_name_or_path)
    # A local path is useless on other machines, and it may contain private names.
    config["base_model_name_or_path"] = base.name if base.is_dir() else str(base)
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()  # PEFT writes a set, in any order
    return config if grader_year is None else reduce_adapter_config(config, PEFT_BY_GRADER_YEAR[grader_year], path)


def reduce_adapter_config(config: dict[str, Any], peft: str, path: Path) -> dict[str, Any]:
    """Return only those keys of a LoRA configuration that an older PEFT knows.

    Args:
        config: the configuration, as the installed PEFT wrote it.
        peft: the older version: the name of a JSON file in `templates/`, without its suffix.
        path: the file that `config` was read from, for messages.

    Raises:
        UserError: names every key that the older PEFT does not know and that is not at its default.
    """
    known = json.loads((TEMPLATES_DIR / f"{peft}.json").read_text(encoding="utf-8"))
    package = known["package"]
    defaults = LoraConfig().to_dict()
    unknown = {key: value for key, value in config.items() if key not in known["keys"] and key != "peft_version"}
    problems = [
        f"{path}: {key}: found {json.dumps(value)}, but {package} does not know this key, so only its default "
        f"({json.dumps(defaults.get(key))}) can be submitted"
        for key, value in unknown.items()
        if value != defaults.get(key)
    ]
    if config["peft_type"] != "LORA":
        problems.append(f"{path}: peft_type: found {config['peft_type']}, but LORA is needed")
    if config["init_lora_weights"] not in known["init_lora_weights"]:
        problems.append(
            f"{path}: init_lora_weights: found {json.dumps(config['init_lora_weights'])}, but {package} cannot load "
            "such an adapter on a quantized base model"
        )
    if problems:
        raise UserError(*problems)
    return {key: value for key, value in config.items() if key in known["keys"]}
