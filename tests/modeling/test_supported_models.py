"""Which models are refused by name, and the shapes of layers whose configurations use names of their own."""

import pytest
from tiny_models import OTHER_ARCHITECTURES
from transformers import (
    BertConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3Config,
    Gemma4TextConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    RwkvConfig,
    T5Config,
)

from hw3.modeling.supported_models import LayerShape, find_architecture_problem


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (T5Config(), "is not a causal language model"),
        (Qwen2_5_VLConfig(), "is not a causal language model"),
        (BertConfig(), "reads a text in both directions"),
        (Gemma3Config(), "takes more than text; use a model of text only, such as one of type gemma3_text"),
        (FalconH1Config(), "has layers without attention"),
        (MambaConfig(), "has layers without attention"),
        (RwkvConfig(), "has layers without attention"),
        (
            LlamaConfig(vocab_size=64, pad_token_id=64),
            "has pad_token_id 64 in its configuration",
        ),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else "",
)
def test_models_that_cannot_be_used_are_refused(config: PreTrainedConfig, problem: str) -> None:
    found = find_architecture_problem(config)
    assert found is not None and found.startswith(problem)


@pytest.mark.parametrize("name", OTHER_ARCHITECTURES)
def test_decoder_only_models_of_text_are_not_refused(name: str) -> None:
    assert find_architecture_problem(OTHER_ARCHITECTURES[name][0]) is None


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (Gemma2Config(), LayerShape(2304, 9216, 8, 4, 256)),
        (LlamaConfig(num_key_value_heads=None), LayerShape(4096, 11008, 32, 32, 128)),
        (OTHER_ARCHITECTURES["gpt2"][0], LayerShape(64, 256, 4, 4, 16)),
        (OTHER_ARCHITECTURES["opt"][0], LayerShape(64, 128, 4, 4, 16)),
        (OTHER_ARCHITECTURES["bloom"][0], LayerShape(64, 256, 4, 4, 16)),
        (Gemma4TextConfig(), LayerShape(2304, 9216, 8, 4, 512)),  # its layers have heads of 256 and of 512
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else "",
)
def test_layer_shape_is_read_from_the_names_of_every_architecture(config: PreTrainedConfig, shape: LayerShape) -> None:
    assert LayerShape.from_config(config) == shape
