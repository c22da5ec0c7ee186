"""Translate the rows of a JSON file with the base model and the adapter. run.sh calls this script.

    python3 predict.py BASE_MODEL ADAPTER_CHECKPOINT INPUT.json OUTPUT.json

INPUT is a list of {"id", "instruction"}. OUTPUT becomes a list of {"id", "output"} in the same order. The script works
with transformers 4.45 or later and Python 3.10 or later.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import sys
import time

import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from utils import CHAT_TEMPLATE, get_bnb_config, get_prompt

# The same as in training and scoring.
DTYPE = "bfloat16"
ATTENTION = None
# Arguments of GenerationConfig that differ from greedy search.
GENERATION = {}
# Token ids that end an output.
STOPS = [1]
# Maximum number of new tokens per output; None: estimated from LONGEST.
MAX_NEW_TOKENS = None
# Longest training outputs: (minimum characters of the instruction, tokens of the output).
LONGEST = [(1, 128)]
TOKENS_PER_BATCH = 4096  # prompt and output, with padding


def load(base: str, adapter: str) -> torch.nn.Module:
    """Load the base model, quantized as in training, with the adapter."""
    # transformers 4.56 renamed the argument torch_dtype to dtype.
    old = tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 56)
    model = AutoModelForCausalLM.from_pretrained(
        base,
        **{"torch_dtype" if old else "dtype": getattr(torch, DTYPE)},
        quantization_config=get_bnb_config(),
        attn_implementation=ATTENTION,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On CPUs with AVX512-BF16, bitsandbytes would repack 4-bit weights and lose precision. GPUs are unaffected.
            module.support_avx512bf16_for_cpu = False
    return PeftModel.from_pretrained(model, adapter).eval()


def limit(instruction: str) -> int:
    """Return the maximum number of new tokens: twice the longest output of similar training rows, at least 32."""
    if MAX_NEW_TOKENS is not None:
        return MAX_NEW_TOKENS
    longest = [tokens for characters, tokens in LONGEST if characters <= len(instruction)] or [LONGEST[0][1]]
    known = LONGEST[-1][0]  # longer instructions get proportionally more
    return max(32, round(2 * (longest[-1] * max(len(instruction), known) / known)))


def encode_prompts(tokenizer: transformers.PreTrainedTokenizerBase, instructions: list[str]) -> list[list[int]]:
    """Return the ids of each prompt. A special or other added token typed in an instruction is encoded as text."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompts = [get_prompt(text) for text in instructions]
    # White space, also SentencePiece's, is text anyway.
    added = [token for token in map(str, tokenizer.added_tokens_decoder.values()) if token.replace("▁", " ").strip()]
    if not CHAT_TEMPLATE and any(token in prompt for token in added for prompt in prompts):
        # `split_special_tokens` splits special tokens only. Only a copy is changed: outputs keep the other tokens.
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_tokens(added, special_tokens=True)
    plain = {"add_special_tokens": False, "split_special_tokens": not CHAT_TEMPLATE}
    return [bos + tokenizer(prompt, **plain)["input_ids"] for prompt in prompts]


@torch.inference_mode()
def answers(
    model: torch.nn.Module, tokenizer: transformers.PreTrainedTokenizerBase, instructions: list[str]
) -> list[str]:
    """Return one output per instruction. Batches start with the longest prompts and are padded on the left."""
    prompts = encode_prompts(tokenizer, instructions)
    room = model.config.max_position_embeddings
    limits = [min(room - len(ids), limit(text)) for ids, text in zip(prompts, instructions, strict=True)]
    # Replace the model's own generation settings, which may include sampling or penalties.
    model.generation_config = GenerationConfig(**GENERATION, eos_token_id=STOPS, pad_token_id=STOPS[0])
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    outputs = [""] * len(prompts)
    while order:
        width, longest = len(prompts[order[0]]), max(limits[index] for index in order)
        batch = order[: max(1, TOKENS_PER_BATCH // (width + longest))]
        order = order[len(batch) :]
        padding = [width - len(prompts[index]) for index in batch]
        # Padding is masked. It repeats the prompt's first id, so a repetition penalty is not affected either.
        ids = [prompts[index][:1] * empty + prompts[index] for index, empty in zip(batch, padding, strict=True)]
        mask = [[0] * empty + [1] * (width - empty) for empty in padding]
        made = model.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=max(limits[index] for index in batch),
        )
        for index, new in zip(batch, made[:, width:].tolist(), strict=True):
            new = new[: limits[index]]
            end = next((place for place, id in enumerate(new) if id in STOPS), len(new))
            outputs[index] = tokenizer.decode(new[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        print(f"{len(prompts) - len(order)} of {len(prompts)} rows done", file=sys.stderr, flush=True)
    return outputs


def main() -> None:
    """Read the rows, translate them and write the outputs. The output file appears only when it is complete."""
    base, adapter, source, target = sys.argv[1:]
    with open(source, encoding="utf-8") as file:
        rows = json.load(file)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = load(base, adapter)
    began = time.perf_counter()
    outputs = answers(model, tokenizer, [row["instruction"] for row in rows])
    seconds = time.perf_counter() - began
    with open(target + ".part", "w", encoding="utf-8") as file:
        pairs = [{"id": row["id"], "output": output} for row, output in zip(rows, outputs, strict=True)]
        json.dump(pairs, file, ensure_ascii=False, indent=2)
        file.write("\n")
    os.replace(target + ".part", target)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = peak / (2**30 if sys.platform == "darwin" else 2**20)  # macOS reports bytes, Linux KiB
    gpu = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    print(f"{len(rows)} rows in {seconds:.1f} s; peak {memory:.2f} GiB of memory, {gpu:.2f} GiB of GPU memory")


if __name__ == "__main__":
    main()
