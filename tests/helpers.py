"""What tests share: paths, small tokenizers, rows and recipes, and commands run in this process or as others."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("HW3_TEST_GPU", "")

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hw3.cli import main
from hw3.runs.checkpoints import complete_checkpoints

REPOSITORY = Path(__file__).parent.parent
SHARED = REPOSITORY.parent / "shared"
# Enough characters for the rows below; ids follow from the order: <pad> 0, <eos> 1, <bos> 2, <unk> 3, 甲 4 ...
CHARACTERS = "甲乙丙丁戊己庚辛壬癸天地玄黃宇宙洪荒日月盈昃辰宿列張問答：\n。，"


def character_tokenizer(*, bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a character, ids in the order of CHARACTERS from 4."""
    vocabulary = {token: id for id, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"bos_token": "<bos>"} if bos else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", **special
    )


def with_scores_times(run: Path, copy: Path, factor: float) -> Path:
    """A copy of a scored run whose results say other mean perplexities."""
    file = shutil.copytree(run, copy) / "eval/eval/results.json"
    results = json.loads(file.read_text())
    for entry in results["entries"]:
        entry["mean_perplexity"] *= factor
    file.write_text(json.dumps(results))
    return copy


def write_rows(path: Path, count: int, *, start: int = 0) -> Path:
    """Rows of 4 to 25 characters, each different, made by counting."""
    rows = []
    for number in range(start, start + count):
        text = "".join(CHARACTERS[(number * 7 + at * (number % 5 + 1)) % 28] for at in range(3 + number % 12))
        rows.append({"id": f"row-{number}", "instruction": f"{text}。\n問", "output": text[::-1][: 2 + number % 9]})
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def write_recipe(folder: Path, mini_base: Path) -> Path:
    """`mini/qlora.yaml` and its data files in a folder."""
    recipe = {
        "model": {
            "pretrained_model_name_or_path": str(mini_base),
            "dtype": "float32",
            "attn_implementation": "eager",
        },
        "quantization": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"},
        "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"},
        "prompt": {"system": "天地玄黃", "turn": "問：{instruction}\n答：", "examples": []},
        "data": {
            "train": str(write_rows(folder / "train.json", 44)),
            "eval": str(write_rows(folder / "eval.json", 10, start=100)),
            "max_length": 64,
        },
        "training": {
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "max_steps": 12,
            "save_steps": 4,
            "logging_steps": 3,
            "learning_rate": 0.01,
            "lr_scheduler_type": "constant",
            "optim": "adamw_torch",
            "max_grad_norm": 0.3,
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "seed": 7,
        },
    }
    path = folder / "mini" / "qlora.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    return path


ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def hw3(*words: str | Path, expected: int = 0) -> tuple[str, str]:
    """Run a command in this process, seconds of imports spared; returns what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(word) for word in words])
    assert status == expected, out.getvalue() + err.getvalue()
    return out.getvalue(), err.getvalue()


# Float32 and no dropout, whose draws differ between processes.
SETTINGS = [
    "training.logging_steps=1", "lora.lora_dropout=0.0", "quantization=null", "training.learning_rate=0.001",
]  # fmt: skip


CPU2 = ["--config_file", "accelerate_configs/cpu2.yaml", "--num_processes", "2", "--main_process_port", "0"]


def launch(*words: str | Path, options: list[str] | None = None, **environment: str) -> subprocess.CompletedProcess:
    """`accelerate launch` with two CPU processes; returns what it printed, both streams in one."""
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *(options or CPU2), *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT | environment, cwd=REPOSITORY,
        timeout=300,
    )  # fmt: skip


def losses(run: Path) -> dict[int, tuple[float, float]]:
    """(loss, tokens so far) by step."""
    state = json.loads((complete_checkpoints(run)[-1].path / "trainer_state.json").read_text())
    return {log["step"]: (log["loss"], log["num_tokens"]) for log in state["log_history"] if "loss" in log}


def assert_same_run(run: Path, other: Path) -> None:
    """Losses of every step and weights of the last to 1e-5, token counts exactly."""
    assert losses(run).keys() == losses(other).keys() and len(losses(run)) == 12
    for step, (loss, tokens) in losses(run).items():
        assert losses(other)[step] == (pytest.approx(loss, abs=1e-5), tokens), step
    one, two = (load_file(complete_checkpoints(r)[-1].path / "adapter_model.safetensors") for r in (run, other))
    for name, tensor in one.items():
        assert torch.allclose(two[name], tensor, rtol=0, atol=1e-5), name
