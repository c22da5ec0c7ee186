"""The grader's call and the `evaluate` module: the evaluator's own numbers."""

import math
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest
import torch
from helpers import REPOSITORY
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hw3.config.recipe import load_recipe
from hw3.data.rows import read_rows
from hw3.evaluation.perplexity import RowScore, summarize
from hw3.runs.checkpoints import complete_checkpoints
from hw3.submission.grader import grade, main
from hw3.training.train import train

UTILS = """
from transformers import BitsAndBytesConfig

def get_prompt(instruction: str) -> str:
    return f"天地<bos>{instruction}答："

def get_bnb_config() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
"""


def the_homeworks_ppl(base: Path, adapter: Path, data: Path) -> float:
    """The metric as the homework defines it: one row at a time, cut at 2,048."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    namespace: dict = {}
    exec(UTILS, namespace)
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=namespace["get_bnb_config"](), attn_implementation="eager"
    )
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False
    model = PeftModel.from_pretrained(model, adapter).eval()
    perplexities = []
    for row in read_rows(data):
        prompt = [2, *tokenizer(namespace["get_prompt"](row.instruction), add_special_tokens=False)["input_ids"]]
        output = [*tokenizer(row.output, add_special_tokens=False)["input_ids"], 1]
        ids = torch.tensor([(prompt + output)[:2048]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits.float()
        losses = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
        mask = torch.tensor(([0] * len(prompt) + [1] * len(output))[:2048])[1:]
        perplexities.append(math.exp(float((losses * mask).sum() / mask.sum())))
    return sum(perplexities) / len(perplexities)


def test_grader_prints_the_homeworks_number(
    mini_recipe: Path, mini_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(mini_recipe, ["training.max_steps=4"])
    train(recipe, tmp_path / "run")
    (checkpoint,) = complete_checkpoints(tmp_path / "run")
    (tmp_path / "utils.py").write_text(UTILS, encoding="utf-8")
    data = Path(recipe.data.eval)
    mean = grade(str(mini_base), checkpoint.path, data, tmp_path / "utils.py", dtype="float32")
    assert mean == pytest.approx(the_homeworks_ppl(mini_base, checkpoint.path, data), rel=1e-5)
    capsys.readouterr()
    words = ["--base_model_path", str(mini_base), "--peft_path", str(checkpoint.path), "--test_data_path", str(data)]
    assert main([*words, "--utils", str(tmp_path / "utils.py"), "--dtype", "float32"]) == 0
    assert capsys.readouterr().out == f"Mean perplexity: {mean}\n"
    assert main([*words, "--utils", str(tmp_path / "none.py")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_the_metric_loads_offline_and_gives_the_evaluators_figures() -> None:
    scores = [RowScore("a", math.log(8) + 1e-12, 1, 1), RowScore("b", 3 * math.log(2), 3, 2)]
    metric = evaluate.load(str(REPOSITORY / "hw3/metrics/output_perplexity"))
    for score in scores:
        metric.add_batch(predictions=[score.nll], references=[score.tokens], characters=[score.characters])
    figures = metric.compute()
    expected = summarize(scores)
    # Equal, not close: the sums pass through in float64.
    assert figures["mean_perplexity"] == expected.mean_perplexity == pytest.approx(5)
    assert figures["token_perplexity"] == expected.token_perplexity
    assert figures["bits_per_character"] == expected.bits_per_character
    assert (figures["rows"], figures["tokens"]) == (2, 4)
    combined = evaluate.combine([evaluate.load(str(REPOSITORY / "hw3/metrics/output_perplexity"))])
    values = {"predictions": [score.nll for score in scores], "references": [1, 3], "characters": [1, 2]}
    assert combined.compute(**values)["mean_perplexity"] == expected.mean_perplexity


def test_grader_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hw3.submission.grader"], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 2 and "--base_model_path" in done.stderr
