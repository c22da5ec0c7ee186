"""Tokenize and score with llama.cpp. A program of its own, because a fault of llama.cpp would end the whole process.

    python -m hw3.export.llama_cpp_scores < request.json > response.json

It needs only llama-cpp-python, so any environment can run it. `hw3.export.gguf_check` writes the request.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import llama_cpp


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Return llama.cpp's ids and scores.

    Args:
        request: `model` (GGUF file), `texts` (prompts without BOS), `special` (whether the texts contain control
            tokens), `rows` (pairs of the ids of a prompt, BOS included, and of an output, EOS included).

    Returns:
        `version` of llama-cpp-python, `bos`, `eos`, `ids` of each text, as a server encodes a prompt, and `nll` of each
        row: the negative log-likelihood of its output, in nats, summed in float64.
    """
    import llama_cpp  # an optional package, which `hw3` itself never imports

    rows = request["rows"]
    longest = max((len(prompt) + len(output) for prompt, output in rows), default=0)
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    model = llama_cpp.Llama(
        request["model"],
        n_ctx=longest or 512,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=-1,
        vocab_only=not rows,
        logits_all=True,
        verbose=False,
    )
    return {
        "version": llama_cpp.__version__,
        "bos": model.token_bos(),
        "eos": model.token_eos(),
        "ids": [model.tokenize(text.encode(), add_bos=True, special=request["special"]) for text in request["texts"]],
        "nll": [score(model, prompt, output) for prompt, output in rows],
    }


def score(model: llama_cpp.Llama, prompt: list[int], output: list[int]) -> float:
    """Return the negative log-likelihood of an output, in nats, as `hw3.evaluation.perplexity` defines it."""
    model.reset()
    model.eval(prompt + output[:-1])
    logits = model.scores[len(prompt) - 1 : len(prompt) + len(output) - 1].astype(np.float64)  # (T, vocabulary)
    logits -= logits.max(axis=1, keepdims=True)
    log_sums = np.log(np.exp(logits).sum(axis=1))
    return float((log_sums - logits[np.arange(len(output)), output]).sum())


def main() -> None:
    """Read a request from standard input, and write the response to standard output."""
    request = json.load(sys.stdin)
    # llama.cpp may print to standard output, which is only for the response.
    response_file = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    json.dump(answer(request), response_file)
    response_file.close()


if __name__ == "__main__":
    main()
