"""Helpers for tests: paths, a small tokenizer, rows, recipes, and functions that run commands."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("HW3_TEST_GPU", "")

import contextlib
import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hw3.cli import main
from hw3.data.tokenization import EncodedRow
from hw3.runs.checkpoints import find_complete_checkpoints
from hw3.runs.results_file import PromptReference, ScoreEntry, ScoringSettings

REPOSITORY = Path(__file__).parent.parent
SHARED = REPOSITORY.parent / "shared"
# SmolLM2-135M-Instruct, which `make smollm2` writes.
SMOLLM2 = Path(os.environ.get("HW3_SMOLLM2", REPOSITORY / "data/smollm2")).absolute()
# The characters of all rows below. Their order gives the ids: <pad> 0, <eos> 1, <bos> 2, <unk> 3, 甲 4, ...
CHARACTERS = "甲乙丙丁戊己庚辛壬癸天地玄黃宇宙洪荒日月盈昃辰宿列張問答：\n。，"


def character_tokenizer(*, bos: bool = True) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character; ids follow the order of CHARACTERS, from 4."""
    vocabulary = {token: id for id, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"bos_token": "<bos>"} if bos else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", **special
    )


def copy_run_with_scaled_scores(run: Path, copy: Path, factor: float) -> Path:
    """Copy a scored run and multiply the mean perplexities in its results by a factor; return the copy."""
    file = shutil.copytree(run, copy) / "eval/eval/results.json"
    results = json.loads(file.read_text(encoding="utf-8"))
    for entry in results["entries"]:
        entry["mean_perplexity"] *= factor
    file.write_text(json.dumps(results), encoding="utf-8")
    return copy


def write_rows(path: Path, count: int, *, start: int = 0) -> Path:
    """Write `count` different rows of a few characters each; return the path."""
    rows = []
    for number in range(start, start + count):
        text = "".join(CHARACTERS[(number * 7 + at * (number % 5 + 1)) % 28] for at in range(3 + number % 12))
        rows.append({"id": f"row-{number}", "instruction": f"{text}。\n問", "output": text[::-1][: 2 + number % 9]})
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def write_recipe(folder: Path, mini_base: Path) -> Path:
    """Write `mini/qlora.yaml` and its data files to a folder; return the recipe's path."""
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


def save_adapter(base: PreTrainedModel, folder: Path, config: PeftConfig) -> Path:
    """Save an adapter with random weights, made by PEFT alone; return its folder. The base cannot be used again."""
    torch.manual_seed(0)
    model = get_peft_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def compute_row_perplexity(model: PreTrainedModel, row: EncodedRow) -> float:
    """Return the course's metric of one row by its definition, in float64 from the model's own logits."""
    ids = row.prompt_ids + row.output_ids
    probabilities = torch.softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)
    losses = [-math.log(probabilities[at - 1, ids[at]]) for at in range(len(row.prompt_ids), len(ids))]
    return math.exp(sum(losses) / len(losses))


SCORING_SETTINGS = ScoringSettings(
    dtype="float32",
    attn_implementation="eager",
    quantization=None,
    dequantized=False,
    base_sha256="base",
    tokenizer_sha256="tokenizer",
    bootstrap_samples=100,
    bootstrap_seed=0,
)


def make_score_entry(
    step: int = 0,
    mean_perplexity: float = 10.0,
    *,
    checkpoint: str | None = None,
    shots: int = 0,
    prompt: str = "own",
    adapter_sha256: str | None = None,
) -> ScoreEntry:
    """Return a score of 2 rows with an interval of plus and minus 1. `checkpoint` defaults to that of `step`."""
    checkpoint = checkpoint or (f"checkpoint-{step}" if step else None)
    return ScoreEntry(
        key=f"{checkpoint or 'base'}+{shots} {prompt}",
        step=step,
        checkpoint=checkpoint,
        shots=shots,
        prompt=PromptReference(name=prompt, sha256=prompt),
        example_ids=None,
        adapter_sha256=adapter_sha256,
        mean_perplexity=mean_perplexity,
        mean_perplexity_ci95=(mean_perplexity - 1, mean_perplexity + 1),
        token_perplexity=5.5,
        median_perplexity=6.25,
        bits_per_character=2.5,
        rows=2,
        tokens=7,
        unknown_tokens=0,
        by_direction={},
        by_length={},
        top_contributors=[],
        seconds=0.125,
    )


IMPORT_PATH = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": IMPORT_PATH}


def hw3(*arguments: str | Path, expected: int = 0) -> tuple[str, str]:
    """Run `hw3` in this process, which saves the seconds of its imports; return its stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    assert status == expected, out.getvalue() + err.getvalue()
    return out.getvalue(), err.getvalue()


# Float32 without dropout, because dropout masks differ between processes.
DETERMINISTIC_SETTINGS = [
    "training.logging_steps=1", "lora.lora_dropout=0.0", "quantization=null", "training.learning_rate=0.001",
]  # fmt: skip


CPU2_LAUNCH_OPTIONS = [
    "--config_file",
    "accelerate_configs/cpu2.yaml",
    "--num_processes",
    "2",
    "--main_process_port",
    "0",
]


def launch(*arguments: str | Path, options: list[str] | None = None, **environment: str) -> subprocess.CompletedProcess:
    """Run `accelerate launch` with two CPU processes; the result has stdout and stderr in one text."""
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *(options or CPU2_LAUNCH_OPTIONS), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT | environment, cwd=REPOSITORY,
        timeout=300,
    )  # fmt: skip


def read_losses(run: Path) -> dict[int, tuple[float, float]]:
    """Return (loss, number of tokens so far) by step."""
    state = json.loads((find_complete_checkpoints(run)[-1].path / "trainer_state.json").read_text(encoding="utf-8"))
    return {log["step"]: (log["loss"], log["num_tokens"]) for log in state["log_history"] if "loss" in log}


def assert_same_run(run: Path, other: Path) -> None:
    """Assert that two runs agree: losses of every step and final weights to 1e-5, token counts exactly."""
    assert read_losses(run).keys() == read_losses(other).keys() and len(read_losses(run)) == 12
    for step, (loss, tokens) in read_losses(run).items():
        assert read_losses(other)[step] == (pytest.approx(loss, abs=1e-5), tokens), step
    one, two = (load_file(find_complete_checkpoints(r)[-1].path / "adapter_model.safetensors") for r in (run, other))
    for name, tensor in one.items():
        assert torch.allclose(two[name], tensor, rtol=0, atol=1e-5), name


def train_smollm2_on_cpu(folder: Path, rows: list[dict[str, str]], *settings: str) -> Path:
    """Train SmolLM2 for 4 steps on the CPU in float32, score base and checkpoints on `rows`, and return the run."""
    data = folder / "eval.json"
    data.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    common = [
        f"model.pretrained_model_name_or_path={SMOLLM2}",
        "model.dtype=float32",
        "quantization.bnb_4bit_compute_dtype=float32",
        "data.train=data/train.json",
        f"data.eval={data}",
        "training.use_cpu=true",
        "training.bf16=false",
        "training.report_to=none",
        "training.per_device_train_batch_size=4",
        "training.warmup_steps=0",
        "training.max_steps=4",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        hw3("train", "recipes/smollm2/qlora.yaml", "--run", folder / "run", *common, *settings)
        hw3("eval", folder / "run")
    return folder / "run"
