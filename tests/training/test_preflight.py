"""What `hw3 check` prints."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import hw3
from tokenizers import normalizers
from transformers import AutoTokenizer

from hw3.config.recipe import load_recipe
from hw3.training.preflight import check_recipe


def test_check_recipe_estimates_no_time_on_a_cpu(
    mini_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_recipe(load_recipe(mini_recipe), tmp_path / "run") == 0
    assert "extrapolated from" not in capsys.readouterr().out


def test_check_counts_rows_that_the_tokenizer_changes(mini_recipe: Path, mini_base: Path, tmp_path: Path) -> None:
    assert "the tokenizer changes" not in hw3("check", mini_recipe)[0]
    base = shutil.copytree(mini_base, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("甲", "乙")
    tokenizer.save_pretrained(base)
    rows = json.loads((tmp_path / "train.json").read_text(encoding="utf-8"))
    changed = [row["id"] for row in rows if "甲" in row["instruction"] + row["output"]]
    out = hw3("check", mini_recipe, f"model.pretrained_model_name_or_path={base}")[0]
    assert f"warning: the tokenizer changes the text of {len(changed)} of 44 rows of {tmp_path}/train.json, such" in out
    assert f"characters; the first is {changed[0]}\n" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_check_of_a_recipe_for_a_gpu_is_a_notice_without_one(mini_recipe: Path, tmp_path: Path) -> None:
    out, err = hw3("check", mini_recipe, "training.use_cpu=false", "training.bf16=true")
    assert err.startswith("nothing else is wrong, but this machine has no GPU that PyTorch can use; to train on the")
    (row,) = [line for line in out.splitlines() if line.startswith("lean ")]
    assert len(re.findall(r"[\d.]+ (?:GiB|MiB)", row)) == 6 and "0.0 GiB" not in out
    _, err = hw3("check", mini_recipe, "training.use_cpu=false", "training.bf16=true", "lora.r=9999", expected=2)
    assert "this machine has no GPU" in err and "lora.r: found 9999" in err
