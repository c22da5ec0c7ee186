"""Train with the same command in several processes on one GPU, and compare what they write, bit for bit.

For each setting one run is straight, a second repeats it, and a third is killed twice with SIGKILL and resumed. They
run at the same time, each with empty compiler caches, so that timings differ. Compared are the adapters of the last
checkpoint, and the losses and gradient norms of all steps.

    python benchmarks/reproducibility.py --tokenizer DIR [--smollm2 DIR] [--only NUMBER ...]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from benchmark_report import describe_machine, read_previous_rows, write_report
from random_models import make_random_base
from training_logs import read_loss_logs

from hw3.common.hashing import file_sha256
from hw3.runs.run import Run

STEPS, SAVE_STEPS, KILLED_AFTER = 60, 10, (20, 40)
OVERRIDES = (
    f"data.train=data/train.json data.eval=data/eval.json training.max_steps={STEPS} training.save_steps={SAVE_STEPS} "
    "training.logging_steps=1 training.report_to=none"
)
EMBEDDED = "training.use_cpu=false training.bf16=true model.dtype=bfloat16 quantization.bnb_4bit_compute_dtype=bfloat16"
DROPOUT = "lora.lora_dropout=0.1"
PLAIN = "speed=plain training.full_determinism=true"
COLUMNS = {
    "setting": "setting",
    "steps": "steps",
    "repeated_is_equal": "a second process: same adapter",
    "killed_is_equal": "killed twice and resumed: same adapter",
    "first_step_that_differs": "first step that differs",
    "seconds_per_step": "s/step, three runs at once",
}


class Setting(NamedTuple):
    """What to train.

    Attributes:
        name: The row's name in the report.
        recipe: The recipe's folder under `recipes/`.
        shape: The shape of the random base model, in `shapes.json`; None for the recipe's own model.
        overrides: Overrides of the recipe, separated by spaces.
    """

    name: str
    recipe: str
    shape: str | None
    overrides: str


SETTINGS = [
    Setting("embedded model", "tiny", None, EMBEDDED),
    Setting("embedded model, dropout", "tiny", None, f"{EMBEDDED} {DROPOUT}"),
    Setting("embedded model, plain, full_determinism", "tiny", None, f"{EMBEDDED} {PLAIN}"),
    Setting("SmolLM2-135M", "smollm2", "smollm2", ""),
    Setting("SmolLM2-135M, dropout", "smollm2", "smollm2", DROPOUT),
    Setting("SmolLM2-135M, plain, full_determinism", "smollm2", "smollm2", PLAIN),
    Setting("Gemma-2-2B shape", "gemma", "gemma", ""),
    Setting("Gemma-2-2B shape, dropout", "gemma", "gemma", DROPOUT),
    Setting("Llama-3-8B shape", "llama", "llama", ""),
]


class TrainingProcess:
    """`hw3 train` in a separate process, with compiler caches of its own."""

    def __init__(self, folder: Path, recipe: str, overrides: list[str]) -> None:
        self.run = folder / "run"
        folder.mkdir(parents=True, exist_ok=True)
        caches = {name: str(folder / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        command = [sys.executable, "-m", "hw3", "train", f"recipes/{recipe}/qlora.yaml", "--run", str(self.run)]
        self._log = (folder / "log").open("ab")
        self.process = subprocess.Popen(
            [*command, *overrides], env=os.environ | caches, stdout=self._log, stderr=self._log
        )

    def kill_after(self, step: int) -> None:
        """Wait until the checkpoint of a step or a later one is complete, then kill the process."""
        while self.process.poll() is None and all(saved.step < step for saved in Run(self.run).complete_checkpoints()):
            time.sleep(0.05)
        self.process.kill()
        self.process.wait()

    def finish(self) -> None:
        """Wait for the process to end.

        Raises:
            SystemExit: it failed; shows the end of its log.
        """
        if self.process.wait():
            raise SystemExit(Path(self._log.name).read_text(encoding="utf-8")[-3000:])


def train_straight(folder: Path, recipe: str, overrides: list[str]) -> Run:
    """Train without interruption."""
    process = TrainingProcess(folder, recipe, overrides)
    process.finish()
    return Run(process.run)


def train_killed(folder: Path, recipe: str, overrides: list[str]) -> Run:
    """Train, kill the process twice, and resume each time."""
    for step in KILLED_AFTER:
        TrainingProcess(folder, recipe, overrides).kill_after(step)
    return train_straight(folder, recipe, overrides)


def read_outcome(run: Run) -> tuple[str, list[tuple[float, float]]]:
    """Return the hash of the last checkpoint's adapter, and (loss, gradient norm) of each step."""
    logs = read_loss_logs(run.path)
    adapter = run.complete_checkpoints()[-1].path / "adapter_model.safetensors"
    return file_sha256(adapter), [(entry["loss"], entry["grad_norm"]) for entry in logs]


def compare_runs(setting: Setting, model: Path | None, scratch: Path) -> dict[str, Any]:
    """Train three times with a setting; return its row of the report."""
    overrides = [*OVERRIDES.split(), *setting.overrides.split()]
    if model is not None:
        overrides.append(f"model.pretrained_model_name_or_path={model}")
    folder = scratch / setting.name.replace(" ", "-")
    trainings = (train_straight, train_straight, train_killed)
    with ThreadPoolExecutor(len(trainings)) as threads:
        started = [
            threads.submit(training, folder / str(number), setting.recipe, overrides)
            for number, training in enumerate(trainings)
        ]
        runs = [future.result() for future in started]
    (straight, values), *others = map(read_outcome, runs)
    differing = [
        step
        for _, other_values in others
        for step, (value, expected) in enumerate(zip(other_values, values, strict=True), start=1)
        if value != expected
    ]
    manifest = runs[0].read_manifest()
    assert manifest is not None, "a complete run has a manifest"
    logs = read_loss_logs(runs[0].path)
    later = logs[len(logs) // 2 :]
    seconds = (later[-1]["train_runtime"] - later[0]["train_runtime"]) / (later[-1]["step"] - later[0]["step"])
    return {
        "setting": setting.name,
        "overrides": setting.overrides,
        "steps": STEPS,
        "killed_after": list(KILLED_AFTER),
        "sessions_of_killed_run": len(KILLED_AFTER) + 1,
        "cuda_graphs": manifest.speed.cuda_graphs,
        "adapter_sha256": [straight, *(sha256 for sha256, _ in others)],
        "repeated_is_equal": others[0][0] == straight,
        "killed_is_equal": others[1][0] == straight,
        "first_step_that_differs": min(differing, default=None),
        "last_loss": values[-1][0],
        "seconds_per_step": round(seconds, 4),
    }


def main() -> int:
    """Compare each setting, and write the report after each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--tokenizer", type=Path, required=True, help="Gemma's; a folder that AutoTokenizer reads")
    parser.add_argument("--smollm2", type=Path, help="SmolLM2-135M-Instruct; random weights of its shape without it")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the settings, counted from 0")
    parser.add_argument("--scratch", type=Path, default=Path("scratch/reproducibility"))
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    arguments = parser.parse_args()
    rows = read_previous_rows(arguments.output, "reproducibility")
    for number in arguments.only or range(len(SETTINGS)):
        setting, model = SETTINGS[number], None
        if setting.shape == "smollm2" and arguments.smollm2 is not None:
            model = arguments.smollm2
        elif setting.shape is not None:
            model = arguments.scratch / f"{setting.shape}-random"
            # The tokenizer of the embedded model has fewer tokens than any of the shapes.
            tokenizer = arguments.tokenizer if setting.shape == "gemma" else Path("data/tiny")
            make_random_base(model, tokenizer, setting.shape)
        rows[setting.name] = compare_runs(setting, model, arguments.scratch)
        print(rows[setting.name], flush=True)
        ordered = [rows[setting.name] for setting in SETTINGS if setting.name in rows]
        write_report(arguments.output, "reproducibility", describe_machine(), ordered, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
