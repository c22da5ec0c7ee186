"""The part of `check_pack.py` that runs with the course's packages, without hw3. Prints a JSON object.

python check_pack_course_env.py base llama TOKENIZER.json FOLDER     create a small random base model
python check_pack_course_env.py score BASE PACK ROWS.json            score with the homework's metric, row by row
"""

from __future__ import annotations

import importlib
import json
import math
import platform
import sys
from importlib.metadata import version

import torch
from peft import LoraConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)


def create_base(model: str, tokenizer_file: str, folder: str) -> dict:
    """Write a random base model of about a million parameters with the repository's vocabulary."""
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=tokenizer_file, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.1,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if model == "llama":
        network = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        network = Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=32, query_pre_attn_scalar=32, sliding_window=64))
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"parameters": network.num_parameters()}


@torch.no_grad()
def score_pack(base_folder: str, pack: str, rows_file: str) -> dict:
    """Return the mean over rows of exp(mean cross-entropy of the output's tokens and EOS), in float32."""
    sys.path.insert(0, pack)
    utils = importlib.import_module("utils")
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    model = AutoModelForCausalLM.from_pretrained(
        base_folder, torch_dtype=torch.float32, quantization_config=utils.get_bnb_config()
    )
    model = PeftModel.from_pretrained(model, f"{pack}/adapter_checkpoint").eval()
    perplexities = []
    with open(rows_file, encoding="utf-8") as file:
        rows = json.load(file)
    for row in rows:
        prompt = tokenizer(utils.get_prompt(row["instruction"]), add_special_tokens=False)["input_ids"]
        output = tokenizer(row["output"], add_special_tokens=False)["input_ids"]
        start = len(prompt) + 1
        ids = torch.tensor([[tokenizer.bos_token_id, *prompt, *output, tokenizer.eos_token_id]])
        logits = model(input_ids=ids).logits[0].float()
        perplexities.append(math.exp(torch.nn.functional.cross_entropy(logits[start - 1 : -1], ids[0, start:])))
    packages = ("torch", "transformers", "tokenizers", "peft", "accelerate", "safetensors")
    return {
        "mean_perplexity": sum(perplexities) / len(perplexities),
        "versions": {package: version(package) for package in packages} | {"python": platform.python_version()},
        "lora_config_keys": sorted(LoraConfig().to_dict()),
    }


if __name__ == "__main__":
    print(json.dumps({"base": create_base, "score": score_pack}[sys.argv[1]](*sys.argv[2:])))
