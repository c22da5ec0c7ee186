"""Compare a GGUF file with its checkpoint: the tokens of the prompts, and the scores of some rows."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hw3.common.errors import RunError
from hw3.config.recipe import Recipe
from hw3.data.prompt import render_turn
from hw3.data.rows import Row, read_rows
from hw3.data.tokenization import EncodedRow, Encoder
from hw3.evaluation.perplexity import RowScore, summarize
from hw3.evaluation.results import EvalResults
from hw3.evaluation.selection import ScoredCheckpoint
from hw3.modeling.float16_products import get_export_dtype

# Rows that llama.cpp scores, spread over the data file.
NUM_ROWS = 16
# Largest difference of a row's score that rounding explains, in nats per token, by type of the weights: at least twice
# what was measured with SmolLM2-135M (docs/serving.md). llama.cpp keeps keys and values in float16 for every type, and
# rounds the inputs of layers to 8 bits for q8_0.
MAX_DIFFERENCE = {"f32": 0.01, "f16": 0.01, "bf16": 0.05, "q8_0": 0.2}
_TYPE_OF_DTYPE = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Comparison:
    """A checkpoint's scores of some rows, and those of the GGUF file.

    Attributes:
        checkpoint: the checkpoint's scores, as `hw3 eval` computed them.
        llama_cpp: llama.cpp's scores of the same rows.
        max_difference: the largest difference that rounding explains, in nats per token; infinite if none is stated.
        version: of llama-cpp-python.
    """

    checkpoint: list[RowScore]
    llama_cpp: list[RowScore]
    max_difference: float
    version: str

    @property
    def differences(self) -> list[float]:
        """Difference of each row in nats, llama.cpp minus checkpoint."""
        return [other.nll - score.nll for score, other in zip(self.checkpoint, self.llama_cpp, strict=True)]

    @property
    def per_token(self) -> list[float]:
        """Absolute difference of each row in nats per token."""
        return [
            abs(difference) / score.tokens for difference, score in zip(self.differences, self.checkpoint, strict=True)
        ]

    @property
    def is_explained(self) -> bool:
        """Whether rounding explains all differences; not if one is NaN."""
        return all(difference <= self.max_difference for difference in self.per_token)

    def describe(self) -> str:
        """Return a table with the scores of each row, and a summary."""
        lines = [f"  {'row':<16} {'tokens':>6} {'checkpoint':>11} {'llama.cpp':>11} {'difference':>11}  (nats)"]
        for score, other, difference in zip(self.checkpoint, self.llama_cpp, self.differences, strict=True):
            lines.append(
                f"  {score.id:<16} {score.tokens:>6} {score.nll:>11.4f} {other.nll:>11.4f} {difference:>+11.4f}"
            )
        before, after = (summarize(scores).mean_perplexity for scores in (self.checkpoint, self.llama_cpp))
        bound = "" if math.isinf(self.max_difference) else f", of at most {self.max_difference}"
        lines.append(
            f"  mean perplexity of these {len(self.checkpoint)} rows: {before:.4f} for the checkpoint, {after:.4f} in "
            f"llama.cpp; largest difference of a row {max(map(abs, self.differences)):.4f} nats, "
            f"{max(self.per_token):.5f} per token{bound}"
        )
        return "\n".join(lines)


def is_llama_cpp_installed() -> bool:
    """Return whether llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def check_tokens(file: Path, encoder: Encoder, rows: Sequence[Row]) -> None:
    """Check that llama.cpp makes the same ids of all prompts, BOS included, and has the same EOS.

    Args:
        file: the GGUF file, with weights or without.
        encoder: the encoder of the run.
        rows: rows whose prompts are compared.

    Raises:
        RunError: an id differs, or llama.cpp failed.
    """
    response = run_llama_cpp(file, encoder, rows, [])
    _compare_tokens(response, encoder, rows)


def compare_scores(file: Path, scored: ScoredCheckpoint, encoder: Encoder, quantization: str | None) -> Comparison:
    """Score some rows of the run's `data.eval` with llama.cpp.

    Args:
        file: the GGUF file.
        scored: the checkpoint, with its scores.
        encoder: the encoder of the run.
        quantization: type of the file's weights, a key of `MAX_DIFFERENCE`; None for any other.

    Raises:
        RunError: a token differs, or llama.cpp failed.
    """
    rows = read_rows(scored.data_file)
    rows = rows[:: max(len(rows) // NUM_ROWS, 1)][:NUM_ROWS]
    encoded = [encoder.encode(row) for row in rows]
    response = run_llama_cpp(file, encoder, rows, encoded)
    _compare_tokens(response, encoder, rows)
    own_scores = {score.id: score for score in _read_scores(scored)}
    return Comparison(
        checkpoint=[own_scores[row.id] for row in rows],
        llama_cpp=[
            RowScore(row.id, nll, len(row.output_ids), row.characters)
            for row, nll in zip(encoded, response["nll"], strict=True)
        ],
        max_difference=math.inf if quantization is None else _select_bound(quantization, scored.recipe),
        version=response["version"],
    )


def _select_bound(quantization: str, recipe: Recipe) -> float:
    """Return the bound of the coarsest type: of the file, of the model, or of the checkpoint's computation."""
    dtypes = {recipe.model.dtype, get_export_dtype(recipe.model.dtype)}
    if recipe.quantization is not None:
        dtypes.add(recipe.quantization.bnb_4bit_compute_dtype)
    return max(MAX_DIFFERENCE[name] for name in (quantization, *(_TYPE_OF_DTYPE[dtype] for dtype in dtypes)))


def _read_scores(scored: ScoredCheckpoint) -> list[RowScore]:
    """Return the checkpoint's scores of all rows of `data.eval`."""
    found = scored.run.read_results_on(scored.data_file)
    assert found is not None, "the checkpoint was selected by these results"
    results = EvalResults.read(found[0], scored.recipe.prompt.sha256, scored.manifest.started)
    return results.row_scores[scored.entry.key]


def run_llama_cpp(file: Path, encoder: Encoder, rows: Sequence[Row], encoded: Sequence[EncodedRow]) -> dict[str, Any]:
    """Tokenize prompts and score rows with llama.cpp, in a process of its own.

    Args:
        file: the GGUF file.
        encoder: the encoder of the run.
        rows: rows whose prompts are tokenized.
        encoded: rows to score.

    Returns:
        The response of `hw3.export.llama_cpp_scores`.

    Raises:
        RunError: llama.cpp failed.
    """
    request = {
        "model": str(file),
        "texts": [render_prompt_text(encoder, row.instruction) for row in rows],
        "special": encoder.prompt.chat_template,
        "rows": [(row.prompt_ids, row.output_ids) for row in encoded],
    }
    done = subprocess.run(
        [sys.executable, "-m", "hw3.export.llama_cpp_scores"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RunError(f"{file}: llama.cpp failed: {lines[-1]}")
    response: dict[str, Any] = json.loads(done.stdout)
    return response


def render_prompt_text(encoder: Encoder, instruction: str) -> str:
    """Return a zero-shot prompt as text, without BOS, as a server passes it to the tokenizer."""
    before, after = encoder.turn_prefix_and_suffix()
    turn = render_turn(encoder.prompt, instruction)
    return before + (turn.strip() if encoder.prompt.chat_template else turn) + after


def _compare_tokens(response: dict[str, Any], encoder: Encoder, rows: Sequence[Row]) -> None:
    """Compare llama.cpp's ids with the run's.

    Raises:
        RunError: an id differs.
    """
    special = [("EOS", encoder.eos_token_id, response["eos"])]
    if encoder.bos_token_id is not None:
        special.insert(0, ("BOS", encoder.bos_token_id, response["bos"]))
    for name, own, other in special:
        if own != other:
            raise RunError(f"{name} is {own} in the run's tokenizer, but {other} in llama.cpp, so outputs would differ")
    for row, other_ids in zip(rows, response["ids"], strict=True):
        own_ids = encoder.encode_prompt(row.instruction)
        if own_ids != other_ids:
            pairs = zip([*own_ids, None], [*other_ids, None], strict=False)
            position = next(index for index, (own, other) in enumerate(pairs) if own != other)
            own_part, other_part = own_ids[position : position + 5], other_ids[position : position + 5]
            raise RunError(
                f"row {row.id}: llama.cpp makes other tokens of the prompt: {other_part} instead of {own_part} from "
                f"token {position} on, {len(other_ids)} instead of {len(own_ids)} in all"
            )
