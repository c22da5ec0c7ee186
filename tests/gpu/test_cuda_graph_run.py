"""A run of the embedded model on a real GPU: the CUDA-graph step against TRL's own, then scoring and prediction.

`make test-gpu` runs it.
"""

import json
from pathlib import Path

import pytest
import torch
from helpers import REPOSITORY, hw3, read_losses

# The tests share a run, so one process runs all of them.
pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("tiny run")]

GPU_SETTINGS = (
    "training.use_cpu=false",
    "training.bf16=true",
    "model.dtype=bfloat16",
    "quantization.bnb_4bit_compute_dtype=bfloat16",
    "training.report_to=none",
    "training.max_steps=20",
    "training.save_steps=10",
    "training.logging_steps=1",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run with the CUDA-graph step and one with TRL's own step, by `speed`."""
    folder = tmp_path_factory.mktemp("gpu")
    recipe = REPOSITORY / "recipes/tiny/qlora.yaml"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        for speed in ("auto", "plain"):
            hw3("train", recipe, "--run", folder / speed, *GPU_SETTINGS, f"speed={speed}")
    return {speed: folder / speed for speed in ("auto", "plain")}


def test_auto_uses_cuda_graphs_and_plain_does_not(runs: dict[str, Path]) -> None:
    manifests = {speed: json.loads((run / "manifest.json").read_text(encoding="utf-8")) for speed, run in runs.items()}
    assert {speed: manifest["speed"]["cuda_graphs"] for speed, manifest in manifests.items()} == {
        "auto": True,
        "plain": False,
    }
    assert all(manifest["device"] == torch.cuda.get_device_name() for manifest in manifests.values())


def test_cuda_graph_step_has_the_losses_of_trls_own_step(runs: dict[str, Path]) -> None:
    """Both see the same rows in the same steps; in bfloat16 the losses differ by rounding."""
    auto, plain = read_losses(runs["auto"]), read_losses(runs["plain"])
    assert list(auto) == list(plain) == list(range(1, 21))
    assert [tokens for _, tokens in auto.values()] == [tokens for _, tokens in plain.values()]
    for step, (loss, _) in auto.items():
        assert loss == pytest.approx(plain[step][0], rel=0.02), step


def test_run_is_scored_and_predicts(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fine-tuning lowers the mean perplexity of the base model, 9.70 in float32."""
    monkeypatch.chdir(REPOSITORY)
    hw3("eval", runs["auto"])
    entries = json.loads((runs["auto"] / "eval/eval/results.json").read_text(encoding="utf-8"))["entries"]
    scores = {entry["step"]: entry["mean_perplexity"] for entry in entries}
    assert scores[0] == pytest.approx(9.70, rel=0.02)
    assert scores[20] < scores[10] < scores[0]
    hw3("predict", runs["auto"], "--checkpoint", "last")
    predictions = json.loads((runs["auto"] / "predictions/eval/checkpoint-20.json").read_text(encoding="utf-8"))
    assert len(predictions) == 144 and all(isinstance(prediction["output"], str) for prediction in predictions)
