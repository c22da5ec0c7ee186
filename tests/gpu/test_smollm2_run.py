"""A run with real weights on a real GPU: the CUDA-graph step of SmolLM2-135M-Instruct against TRL's own, then scoring.

`make smollm2` writes the model, then `make test-gpu` runs this.
"""

import json
from pathlib import Path

import pytest
from helpers import REPOSITORY, SMOLLM2, hw3, read_losses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("smollm2 run"),  # the tests share a run, so one process runs all of them
    pytest.mark.skipif(not SMOLLM2.is_dir(), reason=f"needs {SMOLLM2}: make smollm2, or HW3_SMOLLM2=DIR"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run with the CUDA-graph step and one with TRL's own step, by `speed`: 20 steps of the sample rows."""
    folder = tmp_path_factory.mktemp("smollm2")
    settings = [
        f"model.pretrained_model_name_or_path={SMOLLM2}",
        "data.train=data/train.json",
        "data.eval=data/eval.json",
        "training.report_to=none",
        "training.max_steps=20",
        "training.save_steps=10",
        "training.logging_steps=1",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        for speed in ("auto", "plain"):
            hw3("train", "recipes/smollm2/qlora.yaml", "--run", folder / speed, *settings, f"speed={speed}")
    return {speed: folder / speed for speed in ("auto", "plain")}


def test_auto_captures_the_step_of_real_weights(runs: dict[str, Path]) -> None:
    manifests = {speed: json.loads((run / "manifest.json").read_text(encoding="utf-8")) for speed, run in runs.items()}
    assert {speed: manifest["speed"]["cuda_graphs"] for speed, manifest in manifests.items()} == {
        "auto": True,
        "plain": False,
    }


def test_captured_step_of_real_weights_has_the_losses_of_trls_own_step(runs: dict[str, Path]) -> None:
    """Both see the same rows in the same steps; in bfloat16 the losses differ by rounding."""
    auto, plain = read_losses(runs["auto"]), read_losses(runs["plain"])
    assert list(auto) == list(plain) == list(range(1, 21))
    assert [tokens for _, tokens in auto.values()] == [tokens for _, tokens in plain.values()]
    for step, (loss, _) in auto.items():
        assert loss == pytest.approx(plain[step][0], rel=0.02), step


def test_captured_step_of_real_weights_lowers_the_score(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    hw3("eval", runs["auto"])
    entries = json.loads((runs["auto"] / "eval/eval/results.json").read_text(encoding="utf-8"))["entries"]
    scores = {entry["step"]: entry["mean_perplexity"] for entry in entries}
    assert scores[20] < scores[10] < scores[0] < 100
