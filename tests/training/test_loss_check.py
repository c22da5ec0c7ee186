"""TRL's loss is trained only where it is the loss of the model's own logits."""

import pytest
from tiny_models import OTHER_ARCHITECTURES
from transformers import (
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    ModernBertDecoderConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from hw3.training.loss_check import find_loss_problem


@pytest.mark.parametrize(
    "config",
    [Gemma2Config(), LlamaConfig(), Qwen3Config(), *(config for config, _ in OTHER_ARCHITECTURES.values())],
    ids=lambda config: config.model_type,
)
def test_architectures_whose_logits_trl_knows_have_no_problem(config: PreTrainedConfig) -> None:
    assert find_loss_problem(config) is None


def test_a_scale_that_trl_does_not_know_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL reads Granite's scale from the configuration by this name; without it, TRL's loss has no scale."""
    config = GraniteConfig(logits_scaling=8.0)
    monkeypatch.setattr(config, "logit_scale", 1.0, raising=False)  # which TRL prefers
    assert find_loss_problem(config) == (
        "changes its logits in a way that TRL's loss does not know; use another architecture"
    )


def test_an_output_head_of_several_layers_is_found() -> None:
    assert find_loss_problem(ModernBertDecoderConfig()) == (
        "has a backbone or an output head of an unknown form; use another architecture"
    )
