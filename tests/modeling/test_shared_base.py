"""A second model on the weights of a base model: same results, own modules, no second copy of the weights."""

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from hw3.config.recipe import load_recipe
from hw3.modeling.adapter_slot import AdapterSlot
from hw3.modeling.loading import load_base_model
from hw3.modeling.quantization import dequantize
from hw3.modeling.shared_base import SharedDequantizedLinear, share_weights

IDS = torch.arange(4, 24)[None]


def load(recipe: Path, *overrides: str) -> PreTrainedModel:
    return load_base_model(load_recipe(recipe, list(overrides)), torch.device("cpu")).eval()


@torch.inference_mode()
def compute_logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("double_quantization", ["true", "false"])
def test_model_that_dequantizes_computes_bitwise_what_a_dequantized_one_computes(
    mini_recipe: Path, double_quantization: str
) -> None:
    setting = f"quantization.bnb_4bit_use_double_quant={double_quantization}"
    base = load(mini_recipe, setting)
    shared = share_weights(base, dequantized=True)
    assert sum(isinstance(module, SharedDequantizedLinear) for module in shared.modules()) == 14
    assert torch.equal(compute_logits(shared), compute_logits(dequantize(load(mini_recipe, setting))))
    assert torch.equal(compute_logits(share_weights(base, dequantized=False)), compute_logits(base))


def test_float16_model_that_dequantizes_computes_what_a_dequantized_one_computes(mini_recipe: Path) -> None:
    overrides = ["model.dtype=float16", "quantization.bnb_4bit_compute_dtype=float16"]
    shared = share_weights(load(mini_recipe, *overrides), dequantized=True)
    assert torch.equal(compute_logits(shared), compute_logits(dequantize(load(mini_recipe, *overrides))))


def test_shared_model_has_the_same_parameters_and_other_modules(mini_recipe: Path) -> None:
    base = load(mini_recipe)
    expected = compute_logits(base)
    shared = share_weights(base, dequantized=False)
    parameters = dict(base.named_parameters())
    assert all(parameter is parameters[name] for name, parameter in shared.named_parameters())
    assert {*shared.modules()}.isdisjoint(base.modules())
    states = [
        [module.quant_state for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
        for model in (base, shared)
    ]
    assert len(states[0]) == 14 and all(one is other for one, other in zip(*states, strict=True))
    get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    assert not torch.equal(compute_logits(base), expected)
    assert torch.equal(compute_logits(shared), expected)


def test_slot_does_not_change_shared_weights(mini_recipe: Path, tmp_path: Path) -> None:
    """A full checkpoint, and an adapter that saves embeddings, get a base of their own."""
    base = load(mini_recipe, "quantization=null")
    expected = compute_logits(base)
    slot = AdapterSlot(
        share_weights(base, dequantized=False), lambda: load(mini_recipe, "quantization=null"), is_shared=True
    )
    changed = load(mini_recipe, "quantization=null")
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.5)
    changed.save_pretrained(tmp_path / "full")
    full = compute_logits(changed)
    config = LoraConfig(target_modules=["embed_tokens", "q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(changed, config).save_pretrained(tmp_path / "embeddings")
    slot.load_full_weights(tmp_path / "full")
    assert torch.equal(compute_logits(slot.model), full)
    assert torch.equal(compute_logits(base), expected)
    slot = AdapterSlot(
        share_weights(base, dequantized=False), lambda: load(mini_recipe, "quantization=null"), is_shared=True
    )
    slot.load(tmp_path / "embeddings")
    assert not torch.equal(compute_logits(slot.model), expected)
    assert torch.equal(compute_logits(base), expected)
