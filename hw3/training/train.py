"""`hw3 train`: a recipe becomes a run folder of complete checkpoints. Reads from top to bottom."""

from __future__ import annotations

import datetime
import gc
import hashlib
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig

from hw3.common.atomic_io import write_atomically, write_json
from hw3.common.distributed import check_same, gather, rank, world_size
from hw3.config.recipe import Recipe
from hw3.cuda_graphs.training_step import unallocated_bytes
from hw3.data.tokenization import lengths_of
from hw3.modeling.devices import device_of
from hw3.modeling.loading import load_base, load_config
from hw3.modeling.quantization import dequantize
from hw3.runs.checkpoints import remove_torn
from hw3.runs.run_dir import MANIFEST, RECIPE, TOKENIZER, environment, read_manifest
from hw3.training.memory_estimate import GIB
from hw3.training.plan import Plan, least_memory, plan_run
from hw3.training.sft_arguments import sft_config
from hw3.training.sharding import sharded_by
from hw3.training.step_strategy import Speed, choose_speed
from hw3.training.trainer import CompletionTrainer


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
            memory, failed = least_memory(recipe, device), f"the captured one {reason}"
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
