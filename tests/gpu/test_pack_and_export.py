"""`hw3 eval`, `pack`, `export` and `verify` of a run that was trained on a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import hw3
from transformers import AutoModelForCausalLM

from hw3.config.recipe import load_recipe
from hw3.data.rows import read_rows
from hw3.data.tokenization import Encoder
from hw3.evaluation.perplexity import score_rows
from hw3.export.merge import MAX_RELATIVE_PERPLEXITY_CHANGE
from hw3.modeling.loading import load_tokenizer
from hw3.submission.folder import SUBMISSION_FILES

# The tests share a run, so one process runs all of them.
pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("finished run")]


def test_pack_verifies_the_submission_with_the_graders_call(finished_gpu_run: Path, tmp_path: Path) -> None:
    """`hw3 pack` ends with 0 only if the grader's call, in a process of its own, gives the score of `hw3 eval`."""
    folder = tmp_path / "pack"
    rows = load_recipe(finished_gpu_run / "recipe.yaml").data.eval
    hw3("pack", finished_gpu_run, "--grader-year", "2024", "--input", rows, "--output", folder)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == set(SUBMISSION_FILES)
    best = json.loads((finished_gpu_run / "eval/eval/results.json").read_text(encoding="utf-8"))["best"]["checkpoint"]
    weights = (finished_gpu_run / best / "adapter_model.safetensors").read_bytes()
    assert (folder / "adapter_checkpoint/adapter_model.safetensors").read_bytes() == weights


def test_exported_model_has_the_score_of_its_checkpoint(
    finished_gpu_run: Path, device: torch.device, tmp_path: Path
) -> None:
    """Transformers alone loads the exported model; its score differs from that of `hw3 eval` by rounding."""
    hw3("export", finished_gpu_run, "--checkpoint", "checkpoint-12", "--output", tmp_path / "exported")
    entries = json.loads((finished_gpu_run / "eval/eval/results.json").read_text(encoding="utf-8"))["entries"]
    scores = {entry["step"]: entry["mean_perplexity"] for entry in entries}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "exported", dtype=torch.bfloat16, attn_implementation="eager", device_map={"": device}
    ).eval()
    recipe = load_recipe(finished_gpu_run / "recipe.yaml")
    encoder = Encoder(load_tokenizer(recipe.model), recipe.prompt)
    rows = [encoder.encode(row) for row in read_rows(Path(recipe.data.eval))]
    perplexities = [score.perplexity for score in score_rows(model, rows, tokens_per_batch=512)]
    assert sum(perplexities) / len(perplexities) == pytest.approx(
        scores[12], rel=MAX_RELATIVE_PERPLEXITY_CHANGE["bfloat16"]
    )
    assert scores[12] < scores[0]


def test_verify_confirms_a_run_on_a_gpu(finished_gpu_run: Path) -> None:
    hw3("verify", finished_gpu_run)
