"""The part of `check_harness.py` that runs with lm-evaluation-harness, without hw3. Prints a JSON object.

python check_harness_env.py MODEL ROWS.json
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version

from lm_eval.models.huggingface import HFLM


def score(folder: str, rows_file: str) -> dict:
    """Return the log-likelihood of each row's output and EOS in nats, computed in float32.

    The harness gets token ids, because it encodes prompt and output as one text and strips spaces between them.

    Args:
        folder: the exported model.
        rows_file: a JSON list of `prompt_ids` (BOS first), `output_ids` (EOS last) and the text `output`.
    """
    with open(rows_file, encoding="utf-8") as file:
        rows = json.load(file)
    longest = max(len(row["prompt_ids"]) + len(row["output_ids"]) for row in rows)
    # A shorter `max_length` would cut prompts on the left.
    model = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=8, max_length=longest)
    requests = [(("", ""), row["prompt_ids"], row["output_ids"]) for row in rows]
    results = model._loglikelihood_tokens(requests, disable_tqdm=True)
    return {
        "loglikelihoods": [loglikelihood for loglikelihood, _ in results],
        "equal_ids": sum(
            row["prompt_ids"][0] == model.prefix_token_id
            and row["output_ids"] == [*model.tok_encode(row["output"], add_special_tokens=False), model.eot_token_id]
            for row in rows
        ),
        "versions": {package: version(package) for package in ("lm_eval", "torch", "transformers", "tokenizers")},
    }


if __name__ == "__main__":
    print(json.dumps(score(*sys.argv[1:])))
