"""The submitted `adapter_config.json` has only the keys that the grader's PEFT knows."""

import json
from pathlib import Path

import pytest

from hw3.common.errors import UserError
from hw3.submission.adapter_config import reduce_adapter_config
from hw3.submission.fill_templates import TEMPLATES_DIR


def test_submitted_adapter_config_has_the_24_keys_of_2024(submission_dir: Path) -> None:
    known = json.loads((TEMPLATES_DIR / "peft-0.13.0.json").read_text(encoding="utf-8"))["keys"]
    config = json.loads((submission_dir / "adapter_checkpoint/adapter_config.json").read_text(encoding="utf-8"))
    assert sorted(config) == known and len(known) == 24
    assert config["r"] == 4 and config["lora_alpha"] == 8 and config["base_model_name_or_path"] == "base"


def test_reduce_adapter_config_refuses_unknown_keys_unless_at_their_default(scored_run: Path) -> None:
    path = scored_run / "checkpoint-4/adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    dropped = set(config) - set(reduce_adapter_config(config, "peft-0.13.0", path))
    assert dropped >= {"lora_bias", "peft_version", "use_qalora"}
    changes = {"lora_bias": True, "init_lora_weights": "eva", "made_up": 1}
    with pytest.raises(UserError) as raised:
        reduce_adapter_config(config | changes, "peft-0.13.0", path)
    peft = "peft==0.13.0"
    unknown = f"{peft} does not know this key, so only its default"
    assert raised.value.problems == [
        f"{path}: lora_bias: found true, but {unknown} (false) can be submitted",
        f"{path}: made_up: found 1, but {unknown} (null) can be submitted",
        f'{path}: init_lora_weights: found "eva", but {peft} cannot load such an adapter on a quantized base model',
    ]
