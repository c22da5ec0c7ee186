"""Measure the seconds of an optimizer step under Unsloth, on the same base model and rows per step as `train_step.py`.

Unsloth needs other versions of the libraries than this project. It therefore runs in a separate process, from a folder
made by `pip install --target`. This process writes the rows, as token ids and labels, and the report.

    python benchmarks/unsloth_step.py --site DIR --tokenizer DIR --data FILE [--llama]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

STEPS, WARMUP_STEPS, WINDOW_STEPS = 40, 15, 5
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Setting(NamedTuple):
    """How Unsloth trains.

    Attributes:
        name: The row's name in the report.
        rows_per_device: Rows per micro-batch.
        accumulation: Micro-batches per step.
        checkpointing: `use_gradient_checkpointing` of `get_peft_model`.
        optim: The optimizer's name.
    """

    name: str
    rows_per_device: int
    accumulation: int
    checkpointing: str | bool
    optim: str


SETTINGS = [
    Setting("Unsloth's defaults: 4 x 2, its activation checkpointing, 8-bit AdamW", 4, 2, "unsloth", "adamw_8bit"),
    Setting("Unsloth hand-tuned: 8 x 1, no activation checkpointing, fused AdamW", 8, 1, False, "adamw_torch_fused"),
]


def measure(base: Path, work_file: Path, setting: Setting) -> dict[str, Any]:
    """Train in Unsloth's process; return one row of the report."""
    from unsloth import FastLanguageModel  # Unsloth asks to be imported before all other libraries

    # isort: split
    import torch
    from datasets import Dataset

    model, tokenizer = FastLanguageModel.from_pretrained(
        str(base), max_seq_length=1024, load_in_4bit=True, dtype=torch.bfloat16, local_files_only=True
    )
    work = json.loads(work_file.read_text(encoding="utf-8"))
    model = FastLanguageModel.get_peft_model(
        model, **work["lora"], target_modules=TARGET_MODULES, use_gradient_checkpointing=setting.checkpointing
    )
    step_ends: list[float] = []
    trainer = make_trainer(model, tokenizer, Dataset.from_list(work["rows"]), setting, work_file.parent, step_ends)
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    return make_row(setting, step_ends, torch.cuda.max_memory_allocated(), trainer.state.log_history)


def make_trainer(model: Any, tokenizer: Any, data: Any, setting: Setting, folder: Path, step_ends: list[float]) -> Any:
    """Return TRL's trainer for rows in a fixed order; it appends the time at the end of each window to `step_ends`."""
    import torch
    from torch.utils.data import SequentialSampler
    from transformers import DataCollatorForSeq2Seq, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step >= WARMUP_STEPS and state.global_step % WINDOW_STEPS == 0:
                torch.cuda.synchronize()
                step_ends.append(time.perf_counter())

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder / "run"),
            per_device_train_batch_size=setting.rows_per_device,
            gradient_accumulation_steps=setting.accumulation,
            max_steps=STEPS,
            bf16=True,
            optim=setting.optim,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            max_grad_norm=0.3,
            logging_steps=10,
            report_to="none",
            save_strategy="no",
            max_length=1024,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
            disable_tqdm=True,
        ),
        train_dataset=data,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[Clock()],
    )
    trainer._get_train_sampler = lambda *_: SequentialSampler(data)  # the rows are in the order of this project's steps
    return trainer


def make_row(setting: Setting, step_ends: list[float], peak_bytes: int, logs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one row of the report from the measurements, with the versions of Unsloth's process."""
    import importlib.metadata

    windows = [(later - earlier) / WINDOW_STEPS for earlier, later in itertools.pairwise(step_ends)]
    seconds_per_step = (step_ends[-1] - step_ends[0]) / (STEPS - WARMUP_STEPS)
    rows_per_step = setting.rows_per_device * setting.accumulation
    packages = ("unsloth", "unsloth_zoo", "torch", "transformers", "trl", "peft", "bitsandbytes")
    return {
        "setting": setting.name,
        "steps": STEPS,
        "rows_per_step": rows_per_step,
        "seconds_per_step": round(seconds_per_step, 4),
        "seconds_per_step_range": [round(min(windows), 4), round(max(windows), 4)],
        "rows_per_second": round(rows_per_step / seconds_per_step, 1),
        "peak_gib": round(peak_bytes / 2**30, 3),
        "losses": [entry["loss"] for entry in logs if "loss" in entry],
        "compiler": os.environ.get("UNSLOTH_COMPILE_DISABLE", "0") == "0",
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def prepare_work(shape: str, base: Path, data: Path) -> dict[str, Any]:
    """Return a recipe's LoRA settings, and the rows of its first steps, in order, as token ids and labels."""
    from hw3.config.recipe import load_recipe
    from hw3.data.rows import read_rows
    from hw3.data.sampler import StepSampler
    from hw3.data.tokenization import Encoder
    from hw3.modeling.loading import load_tokenizer

    overrides = [f"model.pretrained_model_name_or_path={base}", f"data.train={data}", "data.eval=data/eval.json"]
    recipe = load_recipe(Path(f"recipes/{shape}/qlora.yaml"), overrides)
    encoder = Encoder(load_tokenizer(recipe.model), recipe.prompt)
    rows = [encoder.encode(row) for row in read_rows(data)]
    sampler = StepSampler([len(row) for row in rows], recipe.rows_per_step, recipe.seed)
    return {
        "lora": {key: recipe.lora[key] for key in ("r", "lora_alpha", "lora_dropout")},
        "rows": [
            {"input_ids": rows[index].input_ids, "labels": rows[index].labels}
            for step in sampler.steps_in_epoch(0)[:STEPS]
            for index in step
        ],
    }


def run_in_unsloths_environment(number: int, site: Path, *, use_compiler: bool) -> subprocess.CompletedProcess:
    """Start this script for one setting, with the packages of `site`."""
    variables = {"PYTHONPATH": str(site.resolve()), "UNSLOTH_DISABLE_STATISTICS": "1", "HF_HUB_OFFLINE": "1"}
    if not use_compiler:
        variables |= {"UNSLOTH_COMPILE_DISABLE": "1", "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, __file__, *sys.argv[1:], "--setting", str(number)]
    return subprocess.run(command, env=os.environ | variables, stderr=subprocess.PIPE, text=True)


def main() -> int:
    """Measure each setting in a separate process, with Unsloth's compiler and, if that fails, without."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--site", type=Path, required=True, help="folder with Unsloth and the packages that it imports")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("data/train.json"))
    parser.add_argument("--scratch", type=Path, default=Path("scratch/train_step"))
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--only", type=int, nargs="+", help="settings to measure, by number from 0")
    parser.add_argument("--no-compiler", action="store_true", help="do not try Unsloth's compiler first")
    parser.add_argument("--llama", action="store_true", help="Llama-3-8B's shape instead of Gemma-2-2B's")
    parser.add_argument("--setting", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = "llama" if arguments.llama else "gemma"
    base, work_file, row_file = (arguments.scratch / name for name in (shape, "unsloth-work.json", "unsloth-row.json"))
    if arguments.setting is not None:
        row_file.write_text(json.dumps(measure(base, work_file, SETTINGS[arguments.setting])), encoding="utf-8")
        return 0
    # Not at the top: Unsloth's process cannot import this project's dependencies.
    from benchmark_report import STEP_COLUMNS, describe_machine, read_previous_rows, write_report
    from random_models import make_random_base

    make_random_base(base, arguments.tokenizer, shape)
    work_file.write_text(json.dumps(prepare_work(shape, base, arguments.data)), encoding="utf-8")
    name = "unsloth_step_llama" if arguments.llama else "unsloth_step"
    rows = read_previous_rows(arguments.output, name)
    for number, setting in enumerate(SETTINGS):
        if arguments.only and number not in arguments.only:
            continue
        for use_compiler in (False,) if arguments.no_compiler else (True, False):
            row_file.unlink(missing_ok=True)
            done = run_in_unsloths_environment(number, arguments.site, use_compiler=use_compiler)
            if done.returncode == 0:
                rows[setting.name] = row = json.loads(row_file.read_text(encoding="utf-8"))
                print(json.dumps({key: row[key] for key in STEP_COLUMNS}), flush=True)
                write_report(arguments.output, name, describe_machine(), list(rows.values()), STEP_COLUMNS)
                break
            print(f"{setting.name}, compiler {use_compiler}: failed\n{done.stderr[-2000:]}", flush=True)
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
