"""`python -m hw3.submission.grader` prints the number that the homework's ppl.py prints."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ENVIRONMENT, REPOSITORY
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hw3.config.recipe import load_recipe
from hw3.data.rows import read_rows
from hw3.runs.checkpoints import find_complete_checkpoints
from hw3.submission.grader import grade, main
from hw3.training.train import train

UTILS = """
from transformers import BitsAndBytesConfig

def get_prompt(instruction: str) -> str:
    return f"天地<bos>{instruction}答："

def get_bnb_config() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
"""


def compute_homework_perplexity(base: Path, adapter: Path, data: Path) -> float:
    """Return the metric as the homework defines it: one row at a time, cut off after 2,048 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    namespace: dict[str, Any] = {}
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


def test_grader_prints_the_number_of_the_homework(
    mini_recipe: Path, mini_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(mini_recipe, ["training.max_steps=4"])
    train(recipe, tmp_path / "run")
    (checkpoint,) = find_complete_checkpoints(tmp_path / "run")
    (tmp_path / "utils.py").write_text(UTILS, encoding="utf-8")
    data = Path(recipe.data.eval)
    mean = grade(str(mini_base), checkpoint.path, data, tmp_path / "utils.py", dtype="float32")
    assert mean == pytest.approx(compute_homework_perplexity(mini_base, checkpoint.path, data), rel=1e-5)
    capsys.readouterr()
    words = ["--base_model_path", str(mini_base), "--peft_path", str(checkpoint.path), "--test_data_path", str(data)]
    assert main([*words, "--utils", str(tmp_path / "utils.py"), "--dtype", "float32"]) == 0
    assert capsys.readouterr().out == f"Mean perplexity: {mean}\n"
    assert main([*words, "--utils", str(tmp_path / "none.py")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_grader_without_arguments_prints_its_usage() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "hw3.submission.grader"], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert process.returncode == 2 and "--base_model_path" in process.stderr


def test_grader_imports_neighbors_of_utils_from_any_folder(
    tmp_path: Path, mini_base: Path, mini_recipe: Path, scored_run: Path
) -> None:
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "utils.py").write_text(
        "from wording import BEFORE\n" + UTILS.replace("天地<bos>{instruction}", "{BEFORE}{instruction}"),
        encoding="utf-8",
    )
    (folder / "wording.py").write_text("BEFORE = '天地<bos>'\n", encoding="utf-8")
    (checkpoint, *_) = find_complete_checkpoints(scored_run)
    command = [sys.executable, "-m", "hw3.submission.grader", "--utils", "student/utils.py", "--dtype", "float32"]
    command += ["--base_model_path", str(mini_base), "--peft_path", str(checkpoint.path)]
    command += ["--test_data_path", load_recipe(mini_recipe).data.eval]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("Mean perplexity: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("from nowhere import x", "cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
        ("def get_prompt(:", "cannot be imported: SyntaxError: invalid syntax"),
        ("", "does not define get_prompt"),
    ],
)
def test_grader_reports_utils_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    utils = tmp_path / "utils.py"
    utils.write_text(content, encoding="utf-8")
    words = ["--base_model_path", "base", "--peft_path", "adapter", "--test_data_path", "rows.json"]
    assert main([*words, "--utils", str(utils)]) == 2
    assert f"{utils}: {message}" in capsys.readouterr().err
