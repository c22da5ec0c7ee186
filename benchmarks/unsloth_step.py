"""Seconds of an optimizer step under Unsloth, beside `train_step.py`: the same base, the same rows in the same steps.

Unsloth wants other versions of the libraries than this project, so it runs in a process of its own, from a folder that
`pip install --target` made; this process writes the rows, as ids and labels, and the report.

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
from typing import Any

STEPS, WARM, WINDOW = 40, 15, 5
# Name, rows per device, accumulation, Unsloth's own activation checkpointing, optimizer.
SETTINGS = [
    ("Unsloth's defaults: 4 x 2, its activation checkpointing, 8-bit AdamW", 4, 2, "unsloth", "adamw_8bit"),
    ("Unsloth tuned by hand: 8 x 1, activations kept, fused AdamW", 8, 1, False, "adamw_torch_fused"),
]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def measure(base: Path, file: Path, number: int) -> dict[str, Any]:
    """Train under one setting, in Unsloth's process; returns one row of the report."""
    from unsloth import FastLanguageModel  # before all others, as it asks

    # isort: split
    import importlib.metadata

    import torch
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import DataCollatorForSeq2Seq, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    setting, micro, accumulation, checkpointing, optim = SETTINGS[number]
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(base), max_seq_length=1024, load_in_4bit=True, dtype=torch.bfloat16, local_files_only=True
    )
    work = json.loads(file.read_text())
    model = FastLanguageModel.get_peft_model(
        model, **work["lora"], target_modules=TARGETS, use_gradient_checkpointing=checkpointing
    )
    data = Dataset.from_list(work["rows"])
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step >= WARM and state.global_step % WINDOW == 0:
                torch.cuda.synchronize()
                ends.append(time.perf_counter())

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(file.with_name("run")),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            max_steps=STEPS,
            bf16=True,
            optim=optim,
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
    trainer._get_train_sampler = lambda *_: SequentialSampler(data)  # rows are in the order of our own steps
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    windows = [(later - earlier) / WINDOW for earlier, later in itertools.pairwise(ends)]
    step = (ends[-1] - ends[0]) / (STEPS - WARM)
    packages = ("unsloth", "unsloth_zoo", "torch", "transformers", "trl", "peft", "bitsandbytes")
    return {
        "setting": setting,
        "steps": STEPS,
        "rows_per_step": micro * accumulation,
        "seconds_per_step": round(step, 4),
        "seconds_per_step_range": [round(min(windows), 4), round(max(windows), 4)],
        "rows_per_second": round(micro * accumulation / step, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3),
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "compiler": os.environ.get("UNSLOTH_COMPILE_DISABLE", "0") == "0",
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def work_of(shape: str, base: Path, data: Path) -> dict[str, Any]:
    """A recipe's adapters, and the rows of its first steps, in order, as ids and labels."""
    from hw3.config.recipe import load_recipe
    from hw3.data.rows import read_rows
    from hw3.data.sampler import StepSampler
    from hw3.data.tokenization import Encoder
    from hw3.modeling.loading import load_tokenizer

    overrides = [f"model.pretrained_model_name_or_path={base}", f"data.train={data}", "data.eval=data/eval.json"]
    recipe = load_recipe(Path(f"recipes/{shape}/qlora.yaml"), overrides)
    encoder = Encoder(load_tokenizer(recipe.model), recipe.prompt)
    rows = [encoder.encode(row) for row in read_rows(data)]
    steps = StepSampler([len(row) for row in rows], recipe.rows_per_step, recipe.seed).steps(0)[:STEPS]
    return {
        "lora": {key: recipe.lora[key] for key in ("r", "lora_alpha", "lora_dropout")},
        "rows": [{"input_ids": rows[row].input_ids, "labels": rows[row].labels} for step in steps for row in step],
    }


def main() -> int:
    """Measure each setting in a process of its own, with Unsloth's compiler and, where that fails, without."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--site", type=Path, required=True, help="folder that holds Unsloth and what it imports")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("data/train.json"))
    parser.add_argument("--scratch", type=Path, default=Path("scratch/train_step"))
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--only", type=int, nargs="+", help="settings to measure, by number from 0")
    parser.add_argument("--no-compiler", action="store_true", help="do not try Unsloth's compiler first")
    parser.add_argument("--llama", action="store_true", help="Llama-3-8B's shape instead of Gemma-2-2B's")
    parser.add_argument("--setting", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = "llama" if arguments.llama else "gemma"
    base, file, found = (arguments.scratch / name for name in (shape, "unsloth-rows.json", "unsloth-row.json"))
    if arguments.setting is not None:
        found.write_text(json.dumps(measure(base, file, arguments.setting)))
        return 0
    from bases import make_base
    from report import STEP_COLUMNS, kept_rows, machine, write_report

    make_base(base, arguments.tokenizer, shape)
    file.write_text(json.dumps(work_of(shape, base, arguments.data)))
    name = "unsloth_step_llama" if arguments.llama else "unsloth_step"
    rows = kept_rows(arguments.out, name)
    for number, (setting, *_) in enumerate(SETTINGS):
        if arguments.only and number not in arguments.only:
            continue
        command = [sys.executable, __file__, *sys.argv[1:], "--setting", str(number)]
        found.unlink(missing_ok=True)
        for without in ({}, {"UNSLOTH_COMPILE_DISABLE": "1", "TORCHDYNAMO_DISABLE": "1"})[arguments.no_compiler :]:
            own = {
                "PYTHONPATH": str(arguments.site.resolve()),
                "UNSLOTH_DISABLE_STATISTICS": "1",
                "HF_HUB_OFFLINE": "1",
            }
            done = subprocess.run(command, env=os.environ | own | without, stderr=subprocess.PIPE, text=True)
            if done.returncode == 0:
                rows[setting] = json.loads(found.read_text())
                break
            print(f"{setting} {without}: failed\n{done.stderr[-2000:]}", flush=True)
        else:
            continue
        print(json.dumps({key: rows[setting][key] for key in STEP_COLUMNS}), flush=True)
        write_report(arguments.out, name, machine(), list(rows.values()), STEP_COLUMNS)
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
