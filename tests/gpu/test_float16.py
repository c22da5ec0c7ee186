"""QLoRA on a GPU that has no bfloat16: products in float16, captured, with float32's losses, scores and predictions."""

import json
from pathlib import Path

import pytest
import torch
from gpu_runs import read_manifest
from helpers import read_losses

from hw3.config.recipe import load_recipe
from hw3.evaluation.evaluate import evaluate_run
from hw3.modeling.float16_products import multiply
from hw3.runs.run import Run
from hw3.training.train import train

pytestmark = pytest.mark.gpu

FLOAT32 = ["model.dtype=float32", "training.bf16=false", "quantization.bnb_4bit_compute_dtype=float32", "speed=plain"]


def train_and_score(recipe_file: Path, run: Path, overrides: list[str]) -> tuple[list[float], list[float]]:
    """Train and score; return the losses, and the mean perplexity of the base and of each checkpoint."""
    assert train(load_recipe(recipe_file, overrides), run) == 0
    assert evaluate_run(Run(run), shots=[0]) == 0
    entries = json.loads((run / "eval/eval/results.json").read_text(encoding="utf-8"))["entries"]
    losses = [loss for loss, _ in read_losses(run).values()]
    return losses, [entry["mean_perplexity"] for entry in entries]


@pytest.mark.parametrize("speed", ["auto", "plain"])
def test_auto_dtype_on_a_gpu_without_bfloat16_computes_as_float32(
    shape_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speed: str
) -> None:
    expected_losses, expected_scores = train_and_score(shape_recipe, tmp_path / "float32", FLOAT32)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: False)
    run = tmp_path / "run"
    losses, scores = train_and_score(shape_recipe, run, ["model.dtype=auto", f"speed={speed}"])
    assert load_recipe(run / "recipe.yaml").model.dtype == "float16"
    assert read_manifest(run)["speed"]["cuda_graphs"] == (speed == "auto")
    assert losses == pytest.approx(expected_losses, rel=5e-3)
    assert scores == pytest.approx(expected_scores, rel=5e-3)


def test_multiply_sums_in_float32(device: torch.device) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(64, 16384, device=device).half(), torch.randn(16384, 64, device=device).half()
    exact = a.double() @ b.double()
    assert (multiply(a, b) - exact).norm() < 1e-5 * exact.norm()
    assert multiply(1000 * a, 1000 * b).isfinite().all()
