"""Build the manifest of a run, and the record of one session of training."""

from __future__ import annotations

import datetime
import time
from dataclasses import asdict

from hw3.common.distributed import gather_objects, get_world_size
from hw3.data.chat_rendering import get_chat_template_date
from hw3.modeling.devices import describe_device, select_device
from hw3.runs.manifest import (
    BaseModelRecord,
    BatchLayoutRecord,
    Manifest,
    ParameterCounts,
    Session,
    SpecialTokenIds,
    StepStrategyRecord,
    git_commit,
    installed_versions,
    python_version,
)
from hw3.training.cuda_graph_support import count_unused_reserved_bytes
from hw3.training.memory_estimate import GIB
from hw3.training.plan import Plan
from hw3.training.trainer import CompletionTrainer


def build_manifest(plan: Plan, previous: Manifest | None) -> Manifest:
    """Build the manifest of a run that is about to train.

    Args:
        plan: the run.
        previous: the manifest of the run that is resumed; its start and sessions are taken over.
    """
    recipe, strategy, tokenizer = plan.workload.recipe, plan.strategy, plan.tokenizer
    return Manifest(
        name=recipe.name,
        started=datetime.datetime.now(datetime.UTC).isoformat() if previous is None else previous.started,
        versions=installed_versions(),
        python=python_version(),
        git_commit=git_commit(),
        data=plan.data,
        prompt_sha256=recipe.prompt.sha256,
        chat_template_date=get_chat_template_date(tokenizer) if recipe.prompt.chat_template else None,
        quantization=None if recipe.quantization is None else recipe.quantization.model_dump(),
        base=BaseModelRecord(name=recipe.model.pretrained_model_name_or_path, sha256=plan.content["base"]),
        tokenizer_sha256=plan.content["tokenizer"],
        tokens=SpecialTokenIds(bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id, pad=tokenizer.pad_token_id),
        device=describe_device(select_device(recipe)),
        layout=BatchLayoutRecord(**asdict(strategy.layout)),
        speed=StepStrategyRecord(
            requested=recipe.speed,
            cuda_graphs=strategy.cuda_graphs,
            dequantized=strategy.dequantized,
            activation_checkpointing=strategy.activation_checkpointing,
            optim=strategy.optim,
            tokens_per_replay=strategy.tokens_per_replay,
        ),
        parameters=ParameterCounts(trained=plan.workload.trained_parameters, total=plan.total_parameters),
        sessions=[] if previous is None else previous.sessions,
    )


def build_session(trainer: CompletionTrainer, started: float, first_step: int) -> Session:
    """Build the record of a session that has ended. All processes must call it, because it compares their memory.

    Args:
        trainer: the trainer, after training.
        started: when the session started, as `time.time()` returns it.
        first_step: optimizer steps that were done before.
    """
    return Session(
        started=datetime.datetime.fromtimestamp(started, datetime.UTC).isoformat(timespec="seconds"),
        seconds=round(time.time() - started, 1),
        from_step=first_step,
        to_step=trainer.state.global_step,
        processes=get_world_size(),
        **(_peak_memory(trainer) if trainer.args.device.type == "cuda" else {}),
    )


def _peak_memory(trainer: CompletionTrainer) -> dict[str, float]:
    """Return the GPU memory of the process that used most, in GiB, as fields of `Session`."""
    before_training, steps = trainer.peak_memory.before_training, trainer.peak_memory.read()
    peaks = [
        *(max(pair) for pair in zip(before_training, steps, strict=True)),
        *steps,
        count_unused_reserved_bytes(trainer.args.device, in_graph_pools=True) if trainer.cuda_graph_step else 0,
    ]
    largest = (max(values) / GIB for values in zip(*gather_objects(peaks), strict=True))
    names = ("peak_gib", "peak_reserved_gib", "peak_steps_gib", "peak_steps_reserved_gib", "graphs_gib")
    return {
        "seconds_capturing": round(trainer.capture_seconds, 1),
        **{name: round(value, 3) for name, value in zip(names, largest, strict=True)},
    }
