"""The block about GGUF files."""

from __future__ import annotations

from document_blocks.sources import format_table, read_json


def gguf() -> str:
    """How far the scores of GGUF files are from their checkpoint's, by type."""
    report = read_json("docs/serving/gguf.json")
    rows = [
        (
            f"`{row['setting']}`",
            row["size"],
            f"{row['mean_perplexity_checkpoint']:.4f}",
            f"{row['mean_perplexity_llama_cpp']:.4f}",
            f"{row['largest_difference_nats']:.4f}",
            f"{row['largest_difference_nats_per_token']:.5f}",
            row["max_difference_nats_per_token"],
        )
        for row in report["rows"]
    ]
    headings = ["`QUANT=`", "file", "checkpoint", "llama.cpp", "largest difference, nats", "per token", "bound"]
    first, versions = report["rows"][0], report["versions"]
    return (
        f"{format_table(headings, rows)}\n\n"
        f"Mean perplexity of {first['scored_rows']} rows. All files have the tokens of the training for the prompts of "
        f"{first['prompts']} rows, and for one in each of the {first['wordings']} wordings of the homework. "
        f"llama-cpp-python {versions['llama-cpp-python']}, transformers {versions['transformers']}."
    )
