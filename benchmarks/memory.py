"""Memory a GPU of each strategy, on random bases of 2B, 8B and 27B, beside what `hw3 check` says beforehand.

Each case is the real `hw3 train`, six steps of eight rows, the file's longest, so that one step is as wide as a run's
widest, which is what `hw3 check` counts with; one that fails or takes too long is a row of the report that says so.
Bases are saved in 4 bits, stored as bfloat16 as sharding needs, so that one GPU makes the largest in a minute. Memory
is each process's own, by PyTorch's allocator, so that cases may share the GPUs, and several processes of one case one
GPU (`launching.py`).

    python benchmarks/memory.py [--only 2b-one-auto '27b-*'] [--at-once 6] [--data FILE] [--tokenizer DIR]
    python benchmarks/memory.py --list
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from bases import config_of
from launching import RunEnded, figures, train
from logs import held_gib
from report import kept_rows, machine, table, write_report
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
)
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from hw3.common.atomic_io import write_atomically, write_json
from hw3.config.recipe import load_recipe
from hw3.data.rows import read_rows
from hw3.data.sampler import StepSampler
from hw3.data.tokenization import EncodedRow, Encoder, lengths_of
from hw3.modeling.loading import load_config, load_tokenizer, parameter_counts
from hw3.training.batch_layout import step_layout
from hw3.training.memory_estimate import GIB, PARTS
from hw3.training.sharding import sharded_as
from hw3.training.step_strategy import Speed, choose_speed

STEPS, ROWS_TAKEN = 6, 48
STORED = "quantization.bnb_4bit_quant_storage=bfloat16"
ROWS = ["training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=2"]
RECIPES = {"2b": "recipes/gemma/qlora.yaml", "8b": "recipes/llama/qlora.yaml", "27b": "recipes/gemma/qlora.yaml"}
SHAPES = {"2b": "gemma", "8b": "llama", "27b": "gemma-27b"}  # in shapes.json
# Strategy: the accelerate file, none for one GPU; overrides.
KEPT, AGAIN = "training.activation_checkpointing=false", "training.activation_checkpointing=true"
STRATEGIES: dict[str, tuple[str | None, list[str]]] = {
    "one-auto": (None, ["speed=auto"]),
    "one-plain": (None, ["speed=plain"]),
    "one-lean": (None, ["speed=lean"]),
    "ddp": ("ddp", ["speed=auto"]),
    "fsdp2": ("fsdp2", ["speed=auto", KEPT]),
    "fsdp2-checkpointing": ("fsdp2", ["speed=auto", AGAIN]),
    "zero3": ("zero3", ["speed=auto", KEPT]),
    "zero3-checkpointing": ("zero3", ["speed=auto", AGAIN]),
}
# (Shape, strategy, processes) by name.
CASES = {
    f"{shape}-{strategy}" + (f"-{processes}" if accelerate else ""): (shape, strategy, processes)
    for shape in SHAPES
    for strategy, (accelerate, _) in STRATEGIES.items()
    for processes in ((2, 4) if accelerate else (1,))
}


def make_quantized_base(folder: Path, config: PretrainedConfig, tokenizer: Path, storage: str, device: str) -> None:
    """Random weights of a shape, saved as 4-bit ones: NF4, double quantization.

    Args:
        folder: where to; made whole or not at all.
        config: the shape.
        tokenizer: a tokenizer's folder, whose vocabulary is no larger than the shape's.
        storage: dtype in which packed weights are stored, which is the compute dtype as well.
        device: where weights are drawn and quantized; in that dtype they must fit there.
    """
    ids = AutoTokenizer.from_pretrained(tokenizer)
    if len(ids) > config.vocab_size:
        raise SystemExit(f"{tokenizer}: {len(ids)} tokens, more than the {config.vocab_size} of {folder.name}")
    config.bos_token_id, config.eos_token_id = ids.bos_token_id, ids.eos_token_id
    config.pad_token_id = ids.pad_token_id
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=storage,
        bnb_4bit_quant_storage=storage,
    )
    dtype = getattr(torch, storage)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    torch.set_default_dtype(torch.float32)
    for name, module in list(model.base_model.named_modules()):
        if not isinstance(module, torch.nn.Linear):
            continue
        parent, _, child = name.rpartition(".")
        packed = bnb.nn.Linear4bit(
            module.in_features, module.out_features, bias=False, compute_dtype=dtype, quant_type="nf4",
            quant_storage=dtype, device="meta",
        )  # fmt: skip
        packed.weight = bnb.nn.Params4bit(
            module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, quant_storage=dtype
        ).to(device)
        setattr(model.base_model.get_submodule(parent), child, packed)
    model.config.quantization_config = quantization
    model.hf_quantizer = Bnb4BitHfQuantizer(quantization, pre_quantized=True)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part, max_shard_size="2GB")
    ids.save_pretrained(part)
    part.rename(folder)


def longest_rows(data: Path, out: Path, count: int) -> Path:
    """A file's longest rows; with as many as six steps take, the longest of all is in one of the steps."""
    rows = json.loads(data.read_text(encoding="utf-8"))
    rows.sort(key=lambda row: len(row["instruction"]) + len(row["output"]), reverse=True)
    out.write_text(json.dumps(rows[:count], ensure_ascii=False), encoding="utf-8")
    return out


def overrides_of(case: str, base: Path, given: list[str]) -> list[str]:
    """A case's overrides of its recipe."""
    _, settings = STRATEGIES[CASES[case][1]]
    return [f"model.pretrained_model_name_or_path={base}", *given, *ROWS, *settings, STORED]


def measure(case: str, base: Path, given: list[str], run: Path, seconds: float, gpu: int) -> dict[str, Any]:
    """One case; returns a row of the report, which says why where it did not work."""
    shape, strategy, processes = CASES[case]
    accelerate, _ = STRATEGIES[strategy]
    overrides = overrides_of(case, base, given)
    row: dict[str, Any] = {"setting": case, "shape": shape, "strategy": strategy, "gpus": processes, "rows": ROWS_TAKEN}
    row["estimate"] = estimate(RECIPES[shape], overrides, accelerate, processes)
    steps = [f"training.max_steps={STEPS}", f"training.save_steps={STEPS}", "training.logging_steps=1"]
    try:
        train(
            RECIPES[shape],
            [*overrides, *steps, "training.report_to=none"],
            run,
            processes=processes,
            accelerate=accelerate or "ddp",
            seconds=seconds,
            environment={"CUDA_VISIBLE_DEVICES": str(gpu)} if processes == 1 else None,
        )
    except RunEnded as problem:
        return row | {"failed": str(problem)}
    found = {key: value for key, value in figures(run, warm_up=2).items() if not key.startswith("seconds")}
    shutil.rmtree(run)
    return row | found


@functools.cache
def _base_and_rows(recipe_file: str, base: str, data: str) -> tuple[Any, list[EncodedRow]]:
    """A base's configuration, and the rows that a run on it trains on."""
    recipe = load_recipe(Path(recipe_file), [f"model.pretrained_model_name_or_path={base}", f"data.train={data}"])
    encoder = Encoder(load_tokenizer(recipe.model), recipe.prompt)
    rows = [encoder.encode(row) for row in read_rows(Path(data))]
    return load_config(recipe.model), [row for row in rows if len(row) <= recipe.data.max_length]


def estimate(recipe_file: str, overrides: list[str], accelerate: str | None, processes: int) -> dict[str, Any]:
    """What `hw3 check` says of the case on a GPU that is large enough: GiB of a step, by part.

    The captured step has made room for the file's widest row; TRL's own takes it for the rows of its steps.
    """
    recipe = load_recipe(Path(recipe_file), overrides)
    config, rows = _base_and_rows(recipe_file, recipe.model.pretrained_model_name_or_path, recipe.data.train)
    drawn = StepSampler([len(row) for row in rows], recipe.rows_per_step, recipe.seed).steps(0)[:STEPS]
    taken = [rows[index] for step in drawn for index in step]

    def chosen(lengths: list[tuple[int, int]]) -> Speed:
        return choose_speed(
            recipe,
            step_layout(recipe, processes),
            config,
            parameter_counts(recipe, config)[0],
            lengths,
            torch.device("cuda"),
            None,
            sharded=None if accelerate is None else sharded_as(Path(f"accelerate_configs/{accelerate}.yaml")),
        )

    speed = chosen(lengths_of(rows))
    speed = speed if speed.captured else chosen(lengths_of(taken))
    parts = {part: round(getattr(speed.memory, part) / GIB, 2) for part in PARTS}
    return {"gib": round(speed.memory.total / GIB, 2), **parts, "captured": speed.captured}


def with_error(row: dict[str, Any]) -> dict[str, Any]:
    """A row with how far the estimate of its steps is from what they held, the graphs' memory included."""
    if "failed" in row:
        return row
    held, told = held_gib(row), row["estimate"]["gib"]
    return row | {"held_gib": held, "estimate_gib": told, "estimate_error": f"{told / held - 1:+.0%}"}


def make_bases(shapes: list[str], arguments: argparse.Namespace) -> None:
    """The shapes' bases that are not there yet, each in a process of its own, which gives its memory back."""
    started = []
    for number, shape in enumerate(shape for shape in shapes if not (arguments.scratch / shape).exists()):
        words = ["--make", shape, "--tokenizer", str(arguments.tokenizer), "--scratch", str(arguments.scratch)]
        gpu = {"CUDA_VISIBLE_DEVICES": str(number % torch.cuda.device_count())}
        started.append(subprocess.Popen([sys.executable, __file__, *words], env=os.environ | gpu))
    if sum(process.wait() != 0 for process in started):
        raise SystemExit("a base could not be made")


def main() -> int:
    """Measure each case and write the report after each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="CASE", help="names, or patterns of them")
    parser.add_argument("--list", action="store_true", help="print the names and end")
    parser.add_argument("--estimates", action="store_true", help="measure nothing; what hw3 check says now, anew")
    parser.add_argument("--at-once", type=int, default=1, help="cases that share the GPUs")
    parser.add_argument("--tokenizer", type=Path, default=Path("data/tiny"))
    parser.add_argument("--seconds", type=float, default=150, help="the longest that a case may take")
    parser.add_argument("--data", type=Path, default=Path("data/train.json"))
    parser.add_argument("--scratch", type=Path, default=Path("scratch/memory"))
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--make", choices=SHAPES, nargs="+", help="make these shapes' bases and end")
    arguments = parser.parse_args()
    chosen = [case for case in CASES if any(fnmatch.fnmatchcase(case, pattern) for pattern in arguments.only)]
    if arguments.list:
        print("\n".join(chosen))
        return 0
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    if arguments.estimates:
        estimate_again(arguments)
        return 0
    if arguments.make and len(arguments.make) == 1:
        (shape,) = arguments.make
        config = config_of(SHAPES[shape])
        make_quantized_base(arguments.scratch / shape, config, arguments.tokenizer, "bfloat16", "cuda")
        return 0
    make_bases(arguments.make or list(dict.fromkeys(CASES[case][0] for case in chosen)), arguments)
    if arguments.make:
        return 0
    rows = kept_rows(arguments.out, "memory")
    given = given_rows(arguments, ROWS_TAKEN)
    with ThreadPoolExecutor(arguments.at_once) as threads:
        started = [
            threads.submit(
                measure,
                case,
                arguments.scratch / CASES[case][0],
                given,
                arguments.scratch / f"run-{case}",
                arguments.seconds,
                number % torch.cuda.device_count(),
            )
            for number, case in enumerate(reversed(chosen))  # the largest first
        ]
        for finished in as_completed(started):
            row = with_error(finished.result())
            rows[row["setting"]] = row
            print(json.dumps({key: row[key] for key in COLUMNS if key in row}), flush=True)
            write_report(arguments.out, "memory", machine(), [rows[name] for name in CASES if name in rows], COLUMNS)
    return 0


def given_rows(arguments: argparse.Namespace, count: int) -> list[str]:
    """Overrides that name the rows to train on."""
    file = longest_rows(arguments.data, arguments.scratch / f"rows-{count}.json", count)
    return [f"data.train={file}", "data.eval=data/eval.json", "data.too_long=drop"]


def estimate_again(arguments: argparse.Namespace) -> None:
    """Put what `hw3 check` says now into the report that is there; a base's configuration is enough for that."""
    file = arguments.out / "memory.json"
    report = json.loads(file.read_text(encoding="utf-8"))
    for row in report["rows"]:
        shape, strategy, processes = CASES[row["setting"]]
        base = arguments.scratch / f"{shape}-config"
        config_of(SHAPES[shape]).save_pretrained(base)
        AutoTokenizer.from_pretrained(arguments.tokenizer).save_pretrained(base)
        overrides = overrides_of(row["setting"], base, given_rows(arguments, row["rows"]))
        row["estimate"] = estimate(RECIPES[shape], overrides, STRATEGIES[strategy][0], processes)
        row |= with_error(row)
    write_json(file, report)
    write_atomically(file.with_suffix(".md"), table(report))


COLUMNS = {
    "setting": "setting",
    "gpus": "processes",
    "held_gib": "GiB a process, steps",
    "peak_steps_reserved_gib": "reserved",
    "peak_gib": "with loading",
    "estimate_gib": "hw3 check",
    "estimate_error": "off by",
    "failed": "failed",
}


if __name__ == "__main__":
    sys.exit(main())
