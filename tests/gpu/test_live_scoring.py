"""`evaluation.during_training` on a GPU: the weights of a run without it, and the scores of `hw3 eval`."""

import json
from pathlib import Path
from typing import Any

import pytest
from gpu_runs import read_manifest
from helpers import hw3

pytestmark = pytest.mark.gpu

STEPS = (4, 8, 12)


def read_scores(run: Path) -> dict[int, float]:
    """Return the mean perplexity by step, as `results.json` has it."""
    results: dict[str, Any] = json.loads((run / "eval/eval/results.json").read_text(encoding="utf-8"))
    return {entry["step"]: entry["mean_perplexity"] for entry in results["entries"]}


@pytest.mark.parametrize(
    ("shape_recipe", "settings", "is_captured"),
    [
        ("gemma", [], True),
        ("llama", [], True),
        ("qwen", [], True),
        ("gemma", ["lora.lora_dropout=0.1"], True),
        ("gemma", ["speed=plain", "lora.lora_dropout=0.1"], False),
        ("gemma", ["speed=lean"], False),
        ("gemma", ["lora.modules_to_save=[embed_tokens]"], False),
    ],
    ids=["gemma", "llama", "qwen", "dropout", "plain with dropout", "lean", "trained embeddings"],
    indirect=["shape_recipe"],
)
def test_scoring_during_training_changes_neither_weights_nor_scores(
    shape_recipe: Path, tmp_path: Path, settings: list[str], is_captured: bool
) -> None:
    """Weights are equal bitwise; scores differ only if other free memory makes other batches."""
    live, plain = tmp_path / "live", tmp_path / "plain"
    hw3("train", shape_recipe, "--run", plain, *settings)
    hw3("train", shape_recipe, "--run", live, *settings, "evaluation.during_training=true")
    assert [read_manifest(run)["speed"]["cuda_graphs"] for run in (live, plain)] == [is_captured] * 2
    for step in STEPS:
        adapters = [(run / f"checkpoint-{step}/adapter_model.safetensors").read_bytes() for run in (live, plain)]
        assert adapters[0] == adapters[1], step
    results = (live / "eval/eval/results.json").read_bytes()
    hw3("eval", live)
    assert (live / "eval/eval/results.json").read_bytes() == results
    hw3("eval", plain)
    assert read_scores(live).keys() == {0, *STEPS}
    assert read_scores(live) == pytest.approx(read_scores(plain), rel=1e-6)
