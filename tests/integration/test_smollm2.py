"""The commands on the CPU with real weights: SmolLM2-135M-Instruct, as `make smollm2` writes it. Takes minutes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import REPOSITORY, SMOLLM2, hw3, read_losses, train_smollm2_on_cpu
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SMOLLM2.is_dir(), reason=f"needs {SMOLLM2}: make smollm2"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps of 8 rows, scored on 12 rows."""
    rows = json.loads((REPOSITORY / "data/eval.json").read_text(encoding="utf-8"))
    folder = tmp_path_factory.mktemp("smollm2")
    return train_smollm2_on_cpu(folder, rows[:12], "training.save_steps=2", "training.logging_steps=1")


def test_training_lowers_loss_and_score_of_real_weights(run: Path) -> None:
    losses = read_losses(run)
    assert list(losses) == [1, 2, 3, 4] and losses[4][0] < losses[1][0]
    entries = json.loads((run / "eval/eval/results.json").read_text(encoding="utf-8"))["entries"]
    scores = {entry["step"]: entry["mean_perplexity"] for entry in entries}
    assert list(scores) == [0, 2, 4]
    # Random weights would score as many as the vocabulary has tokens, 49,152.
    assert scores[4] < scores[2] < scores[0] < 100


def test_prediction_ends_at_the_end_token(run: Path) -> None:
    hw3("predict", run, "--checkpoint", "last", "generation.max_new_tokens=24")
    predictions = json.loads((run / "predictions/eval/checkpoint-4.json").read_text(encoding="utf-8"))
    assert len(predictions) == 12
    assert all(prediction["output"] and "<|im_end|>" not in prediction["output"] for prediction in predictions)


def test_exported_model_loads_again_and_continues_a_prompt(run: Path, tmp_path: Path) -> None:
    hw3("export", shutil.copytree(run, tmp_path / "run"), "--output", tmp_path / "model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), AutoTokenizer.from_pretrained(SMOLLM2)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("今日 12²").input_ids == tokenizer("今日 12²").input_ids
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1]) == " Paris"
