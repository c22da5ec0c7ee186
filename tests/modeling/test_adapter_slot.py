"""Adapters that are swapped in one base model give the scores of fresh loads; adapters that do not fit are named."""

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import compute_row_perplexity, save_adapter
from peft import LilyConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from hw3.config.recipe import load_recipe
from hw3.data.tokenization import EncodedRow
from hw3.evaluation.perplexity import score_rows
from hw3.modeling.adapter_io import InvalidAdapterError
from hw3.modeling.adapter_slot import AdapterSlot
from hw3.modeling.loading import load_base_model
from hw3.runs.checkpoints import find_complete_checkpoints
from hw3.training.train import train

CPU = torch.device("cpu")


def test_swapped_adapters_score_like_fresh_loads(
    mini_recipe: Path, tmp_path: Path, encoded_rows: list[EncodedRow]
) -> None:
    """On an NF4 base, B after A is bitwise B without A; and B equals the definition through a fresh PEFT load."""
    recipe = load_recipe(mini_recipe)
    train(recipe, tmp_path / "run")
    folders = [checkpoint.path for checkpoint in find_complete_checkpoints(tmp_path / "run")]
    base = load_base_model(recipe, CPU).eval()
    base_scores = score_rows(base, encoded_rows, tokens_per_batch=200)
    slot = AdapterSlot(base)
    swapped = []
    for folder in (folders[0], folders[2], folders[1]):
        slot.load(folder)
        swapped.append(score_rows(base, encoded_rows, tokens_per_batch=200))
    fresh = load_base_model(recipe, CPU).eval()
    AdapterSlot(fresh).load(folders[1])
    assert score_rows(fresh, encoded_rows, tokens_per_batch=200) == swapped[2]
    assert len({scores[0].nll for scores in (base_scores, *swapped)}) == 4
    peft_model = PeftModel.from_pretrained(load_base_model(recipe, CPU), folders[1]).eval()
    for score, row in zip(swapped[2], encoded_rows, strict=True):
        assert score.perplexity == pytest.approx(compute_row_perplexity(peft_model, row), rel=1e-5)


def test_swapped_adapters_of_other_kinds_score_like_fresh_loads(
    mini_base: Path, tmp_path: Path, encoded_rows: list[EncodedRow]
) -> None:
    """LoRA, DoRA and other target modules in any order. An adapter that does not fit leaves the slot usable."""

    def load_base() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(mini_base, attn_implementation="eager").eval()

    def score(slot: AdapterSlot) -> list[float]:
        return [score.nll for score in score_rows(slot._base, encoded_rows, tokens_per_batch=200)]

    kinds: dict[str, dict[str, Any]] = {
        "lora": {"target_modules": "all-linear"},
        "dora": {"target_modules": "all-linear", "use_dora": True},
        "queries": {"target_modules": ["q_proj"]},
    }
    torch.manual_seed(0)
    fresh_scores = {}
    for name, options in kinds.items():
        adapted = get_peft_model(load_base(), LoraConfig(r=2, task_type="CAUSAL_LM", **options))
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        adapted.save_pretrained(tmp_path / name)
        slot = AdapterSlot(load_base())
        slot.load(tmp_path / name)
        fresh_scores[name] = score(slot)
    config = json.loads((tmp_path / "queries/adapter_config.json").read_text(encoding="utf-8"))
    shutil.copytree(tmp_path / "queries", tmp_path / "foreign")
    (tmp_path / "foreign/adapter_config.json").write_text(
        json.dumps(config | {"target_modules": ["c_attn"]}), encoding="utf-8"
    )
    slot = AdapterSlot(load_base())
    with pytest.raises(InvalidAdapterError, match=r"foreign: it does not fit the base: .*c_attn"):
        slot.load(tmp_path / "foreign")
    for name in ("lora", "dora", "lora", "queries", "dora", "queries", "lora"):
        slot.load(tmp_path / name)
        assert score(slot) == fresh_scores[name], name
        with pytest.raises(InvalidAdapterError, match="it does not fit the base"):
            slot.load(tmp_path / "foreign")


def test_load_refuses_incomplete_and_ineffective_adapters(mini_recipe: Path, tmp_path: Path) -> None:
    recipe = load_recipe(mini_recipe, ["training.max_steps=4"])
    train(recipe, tmp_path / "run")
    (checkpoint,) = find_complete_checkpoints(tmp_path / "run")
    file = checkpoint.path / "adapter_model.safetensors"
    weights = load_file(file)
    slot = AdapterSlot(load_base_model(recipe, CPU))
    save_file({name: tensor for index, (name, tensor) in enumerate(weights.items()) if index}, file)
    with pytest.raises(InvalidAdapterError, match="1 weights do not fit the base; it misses"):
        slot.load(checkpoint.path)
    save_file({name: tensor * ("lora_B" not in name) for name, tensor in weights.items()}, file)
    with pytest.raises(InvalidAdapterError, match="every B matrix is zero"):
        slot.load(checkpoint.path)
    save_file({name: tensor[:2].contiguous() for name, tensor in weights.items()}, file)
    with pytest.raises(InvalidAdapterError, match="its weights do not fit the base"):
        slot.load(checkpoint.path)


def test_a_fresh_base_is_loaded_after_the_one_before_is_freed(mini_base: Path, tmp_path: Path) -> None:
    """The memory of a GPU may hold one base only. LoRA adapters need no fresh base."""
    bases: list[weakref.ref[PreTrainedModel]] = []

    def load_base() -> PreTrainedModel:
        assert all(base() is None for base in bases)
        model = AutoModelForCausalLM.from_pretrained(mini_base, attn_implementation="eager").eval()
        bases.append(weakref.ref(model))
        return model

    options: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]}
    for name, more in {"lora": {}, "dora": {"use_dora": True}, "pissa": {"init_lora_weights": "pissa"}}.items():
        save_adapter(load_base(), tmp_path / name, LoraConfig(**options | more))
    bases.clear()
    slot = AdapterSlot(load_base(), load_base)
    loads = []
    for name in ("lora", "dora", "lora", "pissa", "pissa", "lora", "dora", "lora"):
        slot.load(tmp_path / name)
        loads.append(len(bases))
    assert loads == [1, 1, 1, 1, 2, 3, 3, 3]


def test_an_adapter_after_full_weights_gets_the_base_again(
    mini_base: Path, tmp_path: Path, encoded_rows: list[EncodedRow]
) -> None:
    def load_base() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(mini_base, attn_implementation="eager").eval()

    def score(slot: AdapterSlot) -> list[float]:
        return [score.nll for score in score_rows(slot.model, encoded_rows, tokens_per_batch=200)]

    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    adapter = save_adapter(load_base(), tmp_path / "lora", config)
    full = load_base()
    for parameter in full.parameters():
        parameter.data *= 1.1
    full.save_pretrained(tmp_path / "full")
    slot = AdapterSlot(load_base(), load_base)
    slot.load(adapter)
    adapter_scores = score(slot)
    refused = LilyConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    with pytest.raises(InvalidAdapterError):  # after its layers were added to the base
        slot.load(save_adapter(load_base(), tmp_path / "lily", refused))
    for _ in range(2):
        slot.load_full_weights(tmp_path / "full")
        full_scores = score(slot)
    assert full_scores == [score.nll for score in score_rows(full, encoded_rows, tokens_per_batch=200)]
    slot.load(adapter)
    assert score(slot) == adapter_scores != full_scores


def test_load_full_weights_names_a_tensor_that_is_not_finite(mini_model: PreTrainedModel, tmp_path: Path) -> None:
    mini_model.model.norm.weight.data[3] = float("inf")
    mini_model.save_pretrained(tmp_path / "full")
    with pytest.raises(InvalidAdapterError, match=r"full: model\.norm\.weight has NaN or infinite weights"):
        AdapterSlot(mini_model).load_full_weights(tmp_path / "full")


def test_load_names_a_kind_that_mixes_a_row_with_its_padding(mini_base: Path, tmp_path: Path) -> None:
    """Lily routes by the mean over all tokens of a row, so its scores would depend on the batch."""

    def load_base() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(mini_base, attn_implementation="eager").eval()

    config = LilyConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    folder = save_adapter(load_base(), tmp_path / "lily", config)
    slot = AdapterSlot(load_base(), load_base)
    with pytest.raises(InvalidAdapterError, match=r"lily: this kind of adapter \(LILY\) cannot be scored: the logits"):
        slot.load(folder)
