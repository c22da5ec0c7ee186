"""The commands on a run whose products are float16: it trains, scores and predicts as one in float32."""

import json
from pathlib import Path

import pytest
from helpers import hw3, read_losses
from safetensors import safe_open

FLOAT16 = ["model.dtype=float16", "quantization.bnb_4bit_compute_dtype=float16"]


def test_float16_run_trains_scores_predicts_and_exports(mini_recipe: Path, tmp_path: Path) -> None:
    scores, outputs = {}, {}
    for name, overrides in {"float32": [], "float16": FLOAT16}.items():
        run = tmp_path / name
        hw3("train", mini_recipe, "--run", run, *overrides)
        hw3("eval", run)
        hw3("predict", run, "--output", tmp_path / f"{name}.json")
        results = json.loads((run / "eval/eval/results.json").read_text(encoding="utf-8"))
        scores[name] = [entry["mean_perplexity"] for entry in results["entries"]]
        outputs[name] = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    losses = {name: [loss for loss, _ in read_losses(tmp_path / name).values()] for name in scores}
    assert losses["float16"] == pytest.approx(losses["float32"], rel=0.01) and losses["float16"] != losses["float32"]
    # The base has float32 weights. A few of them fall on another 4-bit value when they are rounded to float16 first.
    assert scores["float16"] == pytest.approx(scores["float32"], rel=0.01)
    assert len(outputs["float16"]) == len(outputs["float32"])
    hw3("export", tmp_path / "float16", "--output", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "bfloat16"  # other programs would compute float16 with overflows
    with safe_open(tmp_path / "model/model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in list(weights.keys())} == {"BF16"}
    assert "Complete weights in bfloat16." in (tmp_path / "model/README.md").read_text(encoding="utf-8")
