"""Make base models with random weights; time and memory do not depend on the values of the weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import bitsandbytes as bnb
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PretrainedConfig
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

SHAPES = Path(__file__).with_name("shapes.json")  # published configurations, by name of the recipe's folder


def load_shape_config(shape: str) -> PretrainedConfig:
    """Return the configuration of a shape in `shapes.json`."""
    return AutoConfig.for_model(**json.loads(SHAPES.read_text(encoding="utf-8"))[shape])


def make_random_base(folder: Path, tokenizer: Path, shape: str = "gemma") -> None:
    """Write a base model with random bfloat16 weights and a tokenizer, unless the folder has a model already.

    Args:
        folder: Where to write.
        tokenizer: A folder that AutoTokenizer reads. Its vocabulary may be smaller than the shape's.
        shape: `gemma`, `llama` or `qwen`.
    """
    if (folder / "config.json").exists():
        return
    config = load_shape_config(shape)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="2GB")  # published models are sharded too
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    del model
    torch.cuda.empty_cache()


def make_quantized_base(
    folder: Path, config: PretrainedConfig, tokenizer: Path, storage_dtype: str, device: str
) -> None:
    """Write a base model with random weights that are saved in 4 bits: NF4 with double quantization.

    The folder appears only when it is complete.

    Args:
        folder: Where to write.
        config: The model's configuration.
        tokenizer: A folder that AutoTokenizer reads.
        storage_dtype: The dtype in which 4-bit weights are stored; also the compute dtype.
        device: Where weights are drawn and quantized. They must fit there in `storage_dtype`.

    Raises:
        SystemExit: The tokenizer's vocabulary is larger than the model's.
    """
    loaded_tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    if len(loaded_tokenizer) > config.vocab_size:
        raise SystemExit(f"{tokenizer}: {len(loaded_tokenizer)} tokens; {folder.name} has only {config.vocab_size}")
    config.bos_token_id, config.eos_token_id = loaded_tokenizer.bos_token_id, loaded_tokenizer.eos_token_id
    config.pad_token_id = loaded_tokenizer.pad_token_id
    dtype = getattr(torch, storage_dtype)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    torch.set_default_dtype(torch.float32)
    for name, module in list(model.base_model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.base_model.get_submodule(parent), child, _quantize_linear(module, dtype, device))
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=storage_dtype,
        bnb_4bit_quant_storage=storage_dtype,
    )
    model.config.quantization_config = quantization
    model.hf_quantizer = Bnb4BitHfQuantizer(quantization, pre_quantized=True)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part, max_shard_size="2GB")
    loaded_tokenizer.save_pretrained(part)
    part.rename(folder)


def _quantize_linear(linear: torch.nn.Linear, dtype: torch.dtype, device: str) -> bnb.nn.Linear4bit:
    quantized = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=dtype,
        quant_type="nf4",
        quant_storage=dtype,
        device="meta",
    )
    weight = bnb.nn.Params4bit(
        linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, quant_storage=dtype
    )
    quantized.weight = weight.to(device)
    return quantized
