"""Everything runs on the CPU, in float32, with no network."""

import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("HW3_TEST_GPU", "")

import json
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, settings
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

# Shared machines stall; a slow draw is no failure.
settings.register_profile("hw3", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("hw3")

REPOSITORY = Path(__file__).parent.parent
SHARED = REPOSITORY.parent / "shared"
# Enough characters for the rows below; ids follow from the order: <pad> 0, <eos> 1, <bos> 2, <unk> 3, 甲 4 ...
CHARACTERS = "甲乙丙丁戊己庚辛壬癸天地玄黃宇宙洪荒日月盈昃辰宿列張問答：\n。，"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Sums over threads depend on their number; equalities are asserted at one."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


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


@pytest.fixture(scope="session")
def mini_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma-2 of 0.1 M parameters with the character tokenizer, soft-caps and a sliding window."""
    folder = tmp_path_factory.mktemp("mini") / "base"
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=16,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    Gemma2ForCausalLM(config).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int, *, start: int = 0) -> Path:
    """Rows of 4 to 25 characters, each different, made by counting."""
    rows = []
    for number in range(start, start + count):
        text = "".join(CHARACTERS[(number * 7 + at * (number % 5 + 1)) % 28] for at in range(3 + number % 12))
        rows.append({"id": f"row-{number}", "instruction": f"{text}。\n問", "output": text[::-1][: 2 + number % 9]})
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture
def mini_recipe(tmp_path: Path, mini_base: Path) -> Path:
    """A recipe file: NF4 and LoRA on the mini base, 8 rows a step, 12 steps, a checkpoint every 4."""
    return write_recipe(tmp_path, mini_base)


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


@pytest.fixture(scope="session")
def scored_run(tmp_path_factory: pytest.TempPathFactory, mini_base: Path) -> Path:
    """The mini recipe's run with its three checkpoints and scores. Copy it to change it."""
    from hw3.cli import main

    folder = tmp_path_factory.mktemp("scored")
    assert main(["train", str(write_recipe(folder, mini_base)), "--run", str(folder / "run")]) == 0
    assert main(["eval", str(folder / "run")]) == 0
    return folder / "run"
