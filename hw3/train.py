"""`hw3 train`: a recipe becomes a run folder of complete checkpoints. Reads from top to bottom."""

from __future__ import annotations

import datetime
import gc
import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase
from transformers.integrations import get_reporting_integration_callbacks
from trl import SFTConfig

from hw3.captured_step import unallocated_bytes
from hw3.encoding import EncodedRow, Encoder, apply_max_length, count_unknown, lengths_of
from hw3.errors import UserError
from hw3.files import write_atomically, write_json
from hw3.model import (
    base_sha256,
    dequantize,
    device_of,
    device_problems,
    load_base,
    load_config,
    load_tokenizer,
    parameter_counts,
    quantized_already,
    tokenizer_sha256,
)
from hw3.processes import check_same, gather, rank, world_size
from hw3.recipe import Recipe, StepLayout, step_layout
from hw3.rows import Row, read_rows
from hw3.run_folder import (
    MANIFEST,
    RECIPE,
    TOKENIZER,
    Checkpoint,
    check_disk,
    check_resume,
    check_state,
    check_unchanged,
    check_writable,
    complete_checkpoints,
    data_facts,
    environment,
    read_manifest,
    remove_torn,
)
from hw3.sft_config import TIMEOUT, disk_needed, sft_config, total_steps
from hw3.speed import EQUAL_ADAMW, FUSED_ADAMW, GIB, Speed, choose_speed, sharded_by
from hw3.trainer import CompletionTrainer

COURSE_DATA = Path("data/homework")
MISSING_DATA = (
    "put the course's train.json and public_test.json into data/homework/",
    "build a set like it from a public corpus: make data CORPUS=... (README, Data)",
    "use the sample in this repository: make train MODEL={model} TRAIN=data/train.json EVAL=data/eval.json",
)


def read_data(recipe: Recipe) -> dict[str, list[Row]]:
    """The recipe's files, all read and checked, by their key in the `data` section.

    Raises:
        UserError: files are missing (the course's with three ways on) or hold bad rows, all of them named.
    """
    files = {key: Path(name) for key in ("train", "eval", "dev") if (name := getattr(recipe.data, key)) is not None}
    missing = [path for path in files.values() if not path.exists()]
    if missing and not any(path.parent == COURSE_DATA for path in missing):
        raise UserError(*(f"data.{key}: {path}: no such file" for key, path in files.items() if path in missing))
    if missing:
        model = recipe.name.partition("-")[0]
        ways = [f"  {number}. {way.format(model=model)}" for number, way in enumerate(MISSING_DATA, 1)]
        raise UserError(f"no such file: {', '.join(map(str, missing))}. Three ways on:", *ways)
    rows, problems = {}, []
    for key, path in files.items():
        try:
            rows[key] = read_rows(path)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return rows


def encode_training_rows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rows: list[Row]
) -> tuple[list[EncodedRow], list[str]]:
    """Training rows as ids under the recipe's length policy, and lines that say what was done.

    Raises:
        UserError: rows are too long, or too few for one step.
    """
    encoder = Encoder(tokenizer, recipe.prompt)
    encoded, lengths = apply_max_length(
        [encoder.encode(row) for row in rows],
        recipe.data.max_length,
        recipe.data.too_long,
        source=recipe.data.train,
        has_bos=encoder.bos_id is not None,
    )
    if len(encoded) < recipe.rows_per_step:
        raise UserError(
            f"{recipe.data.train}: {len(encoded)} rows do not fill one step of {recipe.rows_per_step} rows; lower "
            "training.per_device_train_batch_size or training.gradient_accumulation_steps"
        )
    tokens = sorted(len(row) for row in encoded)
    notes = [
        f"{len(encoded)} rows of {recipe.data.train}: {tokens[len(tokens) // 2]} tokens in the middle, "
        f"{tokens[-1]} at most"
    ]
    if recipe.prompt.turn.endswith(" "):
        notes.append("the prompt ends with a space; most vocabularies write a word's space before the word")
    if lengths.dropped:
        notes.append(f"{len(lengths.dropped)} rows over data.max_length={recipe.data.max_length} left out")
    if lengths.truncated:
        notes.append(
            f"{len(lengths.truncated)} prompts cut at their beginning to data.max_length={recipe.data.max_length}"
        )
    if unknown := count_unknown(encoded, tokenizer.unk_token_id):
        notes.append(f"{unknown} output tokens are unknown to the tokenizer")
    return encoded, notes


@dataclass(frozen=True)
class Plan:
    """A run that has been checked, nothing written yet.

    Attributes:
        layout: how the recipe shares out a step's rows.
        speed: how a step will be made.
        config: arguments of the Trainer.
        tokenizer: the base's.
        rows: encoded training rows.
        files: what the manifest says of each data file.
        steps: optimizer steps of the whole run.
        resume: the checkpoint to go on from.
        content: hashes of training rows, base and tokenizer.
        trained: parameters that are trained.
        total: parameters of the base.
        notes: lines for the user.
    """

    layout: StepLayout
    speed: Speed
    config: SFTConfig
    tokenizer: PreTrainedTokenizerBase
    rows: list[EncodedRow]
    files: dict[str, dict[str, Any]]
    steps: int
    resume: Checkpoint | None
    content: dict[str, str]
    trained: int
    total: int
    notes: list[str]

    @property
    def done(self) -> bool:
        """Whether there is nothing left to train."""
        return self.resume is not None and self.resume.step >= self.steps


class NoBase(UserError):
    """Problems, the base among them: its configuration or tokenizer cannot be had."""


def plan_run(recipe: Recipe, run: Path, processes: int, sharded: str | None = None) -> Plan:
    """Check recipe, machine, data, model and run folder together; load no weights, write nothing.

    Args:
        recipe: the checked recipe.
        run: the run folder, which may not be there yet.
        processes: of the run.
        sharded: what the launcher shards the model with, from `hw3.speed.sharded_by`.

    Raises:
        UserError: every problem that could be found; `NoBase` where those are all that can be without the base.
    """
    problems = device_problems(recipe, processes) + _sharding_problems(recipe, sharded)

    def tried(check: Callable[..., Any], *arguments: Any) -> Any:
        """What a check gives; None where it found problems, which are kept."""
        try:
            return check(*arguments)
        except UserError as error:
            problems.extend(error.problems)

    layout = tried(step_layout, recipe, processes)
    tried(check_writable, run)
    tried(_check_trackers, recipe)
    data = tried(read_data, recipe)
    base_config = tried(load_config, recipe.model)
    # Without the one there is hardly the other, and one message says how to get both.
    tokenizer = None if base_config is None else tried(load_tokenizer, recipe.model)
    counts = None if base_config is None else tried(parameter_counts, recipe, base_config)
    if base_config is not None:
        problems += quantized_already(recipe, base_config)
    encoded = None
    if data is not None and tokenizer is not None:
        encoded = tried(encode_training_rows, recipe, tokenizer, data["train"])
    if tokenizer is None:
        raise NoBase(*problems)
    if problems:
        raise UserError(*problems)
    (rows, notes), (trained, total) = encoded, counts
    files = {key: data_facts(Path(getattr(recipe.data, key)), rows) for key, rows in data.items()}
    content = {
        "train": files["train"]["sha256"],
        "base": base_sha256(recipe.model, base_config),
        "tokenizer": tokenizer_sha256(tokenizer),
    }
    checkpoints = complete_checkpoints(run)
    resumable = [checkpoint for checkpoint in checkpoints if checkpoint.resumable]
    if checkpoints:
        check_resume(run, recipe)
        check_unchanged(run, content)
        if not resumable:
            raise UserError(f"{run}: no checkpoint has the optimizer's state any more; start anew: RUN={run}-2")
    device = device_of(recipe)
    memory = _least_memory(recipe, device) if device.type == "cuda" else None
    speed = choose_speed(recipe, layout, base_config, trained, lengths_of(rows), device, memory, sharded=sharded)
    notes += speed.notes
    try:
        config = sft_config(recipe, speed, run)
    except (ValueError, ImportError) as error:
        raise UserError(f"training: {error}") from error
    steps = total_steps(config, len(rows), recipe.rows_per_step)
    resume = resumable[-1] if resumable else None
    if resume is not None and resume.step < steps:
        check_state(resume, sharded, processes)
    notes.append(f"{trained:,} parameters are trained; the base has {total:,}")
    per_epoch = len(rows) // recipe.rows_per_step
    who = "one process" if processes == 1 else f"each of {processes} processes"
    notes.append(
        f"{steps} steps of {recipe.rows_per_step} rows, {steps / per_epoch:.2g} times through the file; {who} takes "
        f"{speed.layout.rows_per_device} rows x {speed.layout.accumulation}"
    )
    to_go = max(0, steps - (resume.step if resume else 0))
    notes.append(
        check_disk(run, disk_needed(config, recipe.training.get("save_total_limit"), trained, to_go, per_epoch))
    )
    return Plan(layout, speed, config, tokenizer, rows, files, steps, resume, content, trained, total, notes)


def _least_memory(recipe: Recipe, device: torch.device) -> tuple[int, int]:
    """Bytes of the GPU, free and in all; the least of all processes', since all must choose alike."""
    found = torch.cuda.mem_get_info(device)
    if world_size() == 1:
        return found
    # Joins the processes, as the Trainer would.
    PartialState(timeout=datetime.timedelta(seconds=recipe.training.get("ddp_timeout", TIMEOUT)))
    least = torch.tensor(found, device=device)
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    return int(least[0]), int(least[1])


def _sharding_problems(recipe: Recipe, sharded: str | None) -> list[str]:
    """What cannot be sharded. FSDP2 and ZeRO-3 gather parameters as one floating-point dtype, packed ones too."""
    if sharded is None:
        return []
    problems, quantization, training, dtype = [], recipe.quantization, recipe.training, recipe.model.dtype
    if quantization is not None and quantization.bnb_4bit_quant_storage != dtype:
        problems.append(
            f"quantization.bnb_4bit_quant_storage: found {quantization.bnb_4bit_quant_storage}; {sharded} shards 4-bit "
            f'weights in the dtype of the model alone; this works: SET="quantization.bnb_4bit_quant_storage={dtype}"'
        )
    optim = training.get("optim", FUSED_ADAMW)
    if optim not in EQUAL_ADAMW and ("paged" in optim or "bit" in optim or "bnb" in optim):
        problems.append(
            f"training.optim: {optim} is bitsandbytes', which knows no sharded parameters; this works: "
            f'SET="training.optim={FUSED_ADAMW}"'
        )
    if sharded == "FSDP" and quantization is not None and (recipe.lora or {}).get("layers_to_transform") is not None:
        problems.append(
            "lora.layers_to_transform: FSDP2 gathers a 4-bit layer without an adapter wrongly on a GPU; adapt every "
            "layer, or use quantization=null"
        )
    if sharded == "DeepSpeed":
        if find_spec("deepspeed") is None:
            install = "pip install --no-build-isolation -c constraints.txt '.[deepspeed]'"
            problems.append(f"DeepSpeed is not installed; this installs it: {install}")
        mixed = "float16" if training.get("fp16") else "float32" if training.get("bf16") is False else "bfloat16"
        if mixed != dtype:
            problems.append(
                f"model.dtype: found {dtype}; DeepSpeed computes in the dtype of the weights, and training.bf16 and "
                f'fp16 ask for {mixed}; this works: SET="model.dtype={mixed}"'
            )
    return problems


def _check_trackers(recipe: Recipe) -> None:
    """Refuse a `report_to` that does not exist or is not installed.

    Raises:
        UserError: names it.
    """
    names = recipe.training.get("report_to", "tensorboard")
    try:
        for callback in get_reporting_integration_callbacks(names):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"training.report_to: {names}: {error}") from error


def train(recipe: Recipe, run: Path) -> int:
    """Fine-tune, or resume. Everything a user can get wrong is checked before anything is written.

    Args:
        recipe: the checked recipe.
        run: the run folder, made if absent.

    Returns:
        0, or 128 plus a signal's number when one stopped the run after a complete checkpoint.

    Raises:
        UserError: recipe, data, machine or run folder do not fit; nothing has been written.
        NonFiniteLoss: the loss became NaN or infinite.
    """

    def say(line: str) -> None:
        if rank() == 0:
            print(line, flush=True)

    # --- check ------------------------------------------------------------------------------------------------------
    began = time.time()
    plan = plan_run(recipe, run, world_size(), sharded_by())
    for note in plan.notes:
        say(note)
    check_same(
        {
            f"{run}": f"step {plan.resume.step} ({plan.resume.sha256[:8]})" if plan.resume else "no checkpoint",
            "recipe": hashlib.sha256(recipe.to_yaml().encode()).hexdigest()[:8],
            **{key: sha256[:8] for key, sha256 in plan.content.items()},
        }
    )
    if plan.done:
        say(f"{run} is complete: step {plan.steps} of {plan.steps}. Next: make eval RUN={run}")
        return 0
    device = device_of(recipe)
    if (
        device.type == "cuda"
        and world_size() == 1
        and recipe.model.device_map is None
        and torch.cuda.device_count() > 1
    ):
        count = torch.cuda.device_count()
        others = f"make train GPUS={count}, or accelerate launch --num_processes {count} -m hw3 train ..."
        say(f"using the first of {count} GPUs; all of them: {others}")

    # --- build: base, adapters, trainer -----------------------------------------------------------------------------
    trainer = _build(recipe, plan.config, plan.speed, plan, device)
    if plan.speed.captured:
        say(f"capturing {len(plan.speed.widths)} widths of batch; the layers are compiled first")
        if reason := trainer.capture():
            del trainer
            gc.collect()
            torch._dynamo.reset()
            torch.cuda.empty_cache()
            memory, failed = _least_memory(recipe, device), f"the captured one {reason}"
            config, lengths = load_config(recipe.model), lengths_of(plan.rows)
            speed = choose_speed(recipe, plan.layout, config, plan.trained, lengths, device, memory, failed)
            for note in speed.notes:
                say(note)
            trainer = _build(recipe, sft_config(recipe, speed, run), speed, plan, device)
        else:
            say(f"captured in {trainer.seconds_capturing:.0f} s; the first step's loss and gradient agree with TRL's")

    # --- write: recipe, manifest, tokenizer -------------------------------------------------------------------------
    manifest = read_manifest(run) if plan.resume else {}
    if trainer.args.should_save:
        for folder in remove_torn(run):
            say(f"{folder}: not complete, removed")
        manifest = {
            "schema": 1,
            "name": recipe.name,
            "started": manifest.get("started", datetime.datetime.now(datetime.UTC).isoformat()),
            **environment(),
            "data": plan.files,
            "prompt_sha256": recipe.prompt.sha256,
            "quantization": None if recipe.quantization is None else recipe.quantization.model_dump(),
            "base": {"name": recipe.model.pretrained_model_name_or_path, "sha256": plan.content["base"]},
            "tokenizer_sha256": plan.content["tokenizer"],
            "tokens": {
                "bos": plan.tokenizer.bos_token_id,
                "eos": plan.tokenizer.eos_token_id,
                "pad": plan.tokenizer.pad_token_id,
            },
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "layout": asdict(trainer.speed.layout),
            "speed": {
                "asked": recipe.speed,
                **{
                    key: getattr(trainer.speed, key)
                    for key in ("captured", "dequantized", "activation_checkpointing", "optim")
                },
            },
            "parameters": {"trained": plan.trained, "total": plan.total},
            "sessions": manifest.get("sessions", []),
        }
        write_json(run / MANIFEST, manifest)
        write_atomically(run / RECIPE, recipe.to_yaml())
        plan.tokenizer.save_pretrained(run / TOKENIZER)

    # --- train ------------------------------------------------------------------------------------------------------
    first = plan.resume.step if plan.resume else 0
    if plan.resume:
        say(f"resuming {run} from step {first} of {plan.steps}")
    with trainer.stop.installed():
        trainer.train(resume_from_checkpoint=str(plan.resume.path) if plan.resume else None)

    # --- close ------------------------------------------------------------------------------------------------------
    last = trainer.state.global_step
    peaks = _peaks(trainer) if device.type == "cuda" else {}
    if trainer.args.should_save:
        manifest["sessions"].append(_session(began, first, last, world_size()) | peaks)
        write_json(run / MANIFEST, manifest)
    if trainer.stop.signal and last < plan.steps:
        say(f"stopped at step {last} of {plan.steps}; the same command goes on from there")
        return 128 + trainer.stop.signal
    say(f"{run}: {plan.steps} steps done. Next: make eval RUN={run}")
    return 0


def _build(recipe: Recipe, config: SFTConfig, speed: Speed, plan: Plan, device: torch.device) -> CompletionTrainer:
    """Base and trainer; adapters are made by the trainer."""
    model = load_base(recipe, device)
    if speed.dequantized:
        model = dequantize(model)
    return CompletionTrainer(recipe, config, speed, model, plan.tokenizer, plan.rows)


def _session(began: float, first: int, last: int, processes: int) -> dict[str, Any]:
    """One stretch of training, for the manifest."""
    return {
        "began": datetime.datetime.fromtimestamp(began, datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - began, 1),
        "from_step": first,
        "to_step": last,
        "processes": processes,
    }


def _peaks(trainer: CompletionTrainer) -> dict[str, float]:
    """GPU memory of the process that had most, for the manifest: of the whole session, and of its steps alone."""
    before, steps = trainer.peak_memory.before, trainer.peak_memory.now()
    found = [
        *(max(pair) for pair in zip(before, steps, strict=True)),
        *steps,
        unallocated_bytes(trainer.args.device, of_graphs=True) if trainer.captured_step else 0,
    ]
    most = (max(values) / GIB for values in zip(*gather(found), strict=True))
    names = ("peak_gib", "peak_reserved_gib", "peak_steps_gib", "peak_steps_reserved_gib", "graphs_gib")
    figures = {name: round(value, 3) for name, value in zip(names, most, strict=True)}
    return {"seconds_capturing": round(trainer.seconds_capturing, 1), **figures}
