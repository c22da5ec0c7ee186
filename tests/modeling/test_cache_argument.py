import inspect

import pytest
import torch
from tiny_models import build_llama
from transformers import Cache, Gemma2Model, GPT2Model, LlamaModel, PreTrainedModel, Qwen3Model
from transformers.cache_utils import DynamicLayer

from hw3.modeling.cache_argument import CACHE_ARGUMENT


@pytest.mark.parametrize("architecture", [LlamaModel, Gemma2Model, Qwen3Model, GPT2Model])
def test_backbones_take_a_cache_under_this_name(architecture: type[PreTrainedModel]) -> None:
    assert CACHE_ARGUMENT in inspect.signature(architecture.forward).parameters


@torch.inference_mode()
def test_cache_under_this_name_is_filled() -> None:
    cache = Cache(layers=[DynamicLayer(), DynamicLayer()])
    build_llama().base_model(input_ids=torch.tensor([[1, 5, 6]]), use_cache=True, **{CACHE_ARGUMENT: cache})
    assert cache.get_seq_length() == 3
