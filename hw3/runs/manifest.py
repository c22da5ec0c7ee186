"""`manifest.json`: what a run was trained with, and when."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from hw3.config.schema import BestBy
from hw3.data.fingerprint import DatasetFingerprint
from hw3.data.rows import DataFileKey
from hw3.runs.file_model import FileModel

PACKAGES = ("torch", "trl", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "tokenizers")


class BaseModelRecord(FileModel):
    """The base model: its name in the recipe, and a hash of its content."""

    name: str
    sha256: str


class SpecialTokenIds(FileModel):
    """Ids of the tokenizer's special tokens; None where it has no such token."""

    bos: int | None
    eos: int | None
    pad: int | None


class BatchLayoutRecord(FileModel):
    """How the rows of an optimizer step were divided."""

    processes: int
    rows_per_device: int
    accumulation: int


class StepStrategyRecord(FileModel):
    """How the optimizer steps were computed.

    Attributes:
        requested: `speed` of the recipe.
        cuda_graphs: whether the CUDA-graph step replaced TRL's own.
        dequantized: whether the 4-bit base model was dequantized once after loading.
        activation_checkpointing: whether activations were recomputed in the backward pass.
        optim: the optimizer that was used.
        tokens_per_replay: most tokens of one replay of the CUDA-graph step, unless a row has more; 0 for TRL's step.
    """

    requested: str
    cuda_graphs: bool
    dequantized: bool
    activation_checkpointing: bool
    optim: str
    tokens_per_replay: int = 0


class ParameterCounts(FileModel):
    """Numbers of parameters: trained ones, and those of the base model."""

    trained: int
    total: int


class Session(FileModel):
    """One uninterrupted stretch of training. Memory is that of the process that used most, in GiB; GPU runs only.

    Attributes:
        started: ISO 8601, UTC.
        seconds: wall-clock time.
        from_step: optimizer steps before.
        to_step: optimizer steps after.
        processes: number of processes.
        seconds_capturing: time to compile and capture the CUDA-graph step.
        peak_gib: peak of allocated memory, loading included.
        peak_reserved_gib: peak of reserved memory, loading included.
        peak_steps_gib: peak of allocated memory during the steps.
        peak_steps_reserved_gib: peak of reserved memory during the steps.
        graphs_gib: memory that only the CUDA graphs can use.
    """

    started: str
    seconds: float
    from_step: int
    to_step: int
    processes: int
    seconds_capturing: float | None = None
    peak_gib: float | None = None
    peak_reserved_gib: float | None = None
    peak_steps_gib: float | None = None
    peak_steps_reserved_gib: float | None = None
    graphs_gib: float | None = None

    @model_serializer(mode="wrap")
    def _without_absent_memory(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialize(self).items() if value is not None}


StopReason = Literal["patience", "pruned"]


class EarlyStop(FileModel):
    """Why a run ended before its last step, by the scores of its checkpoints.

    Attributes:
        step: optimizer steps that were done.
        reason: `patience` if the score had not improved for `patience` checkpoints, `pruned` by a search.
        patience: `evaluation.patience` of the recipe then.
        best_by: `evaluation.best_by` of the recipe then.
    """

    step: int
    reason: StopReason
    patience: int | None
    best_by: BestBy


class Manifest(FileModel):
    """The manifest of a run.

    Attributes:
        name: name of the recipe.
        started: when the run began, ISO 8601, UTC; identifies the run among those that used the same folder.
        versions: installed version by package.
        python: version of Python.
        git_commit: commit of this repository; None for a copy without history.
        data: fingerprint by key of the recipe's `data` section: `train`, `eval`, `dev`.
        prompt_sha256: hash of the prompt.
        chat_template_date: the fixed date in the prompt, if a chat template asks for one; `YYYY-MM-DD`.
        quantization: the recipe's `quantization` section; None without.
        base: the base model.
        tokenizer_sha256: hash of the tokenizer.
        tokens: ids of the special tokens.
        device: `cpu`, or the GPU's name.
        layout: how a step's rows were divided.
        speed: how the steps were computed.
        parameters: numbers of parameters.
        sessions: stretches of training, in order.
        stopped_early: why the run ended before its last step; None if it did not.
    """

    schema_version: Literal[1] = Field(1, alias="schema")
    name: str
    started: str
    versions: dict[str, str]
    python: str
    git_commit: str | None
    data: dict[DataFileKey, DatasetFingerprint]
    prompt_sha256: str
    chat_template_date: str | None = None
    quantization: dict[str, Any] | None
    base: BaseModelRecord
    tokenizer_sha256: str
    tokens: SpecialTokenIds
    device: str
    layout: BatchLayoutRecord
    speed: StepStrategyRecord
    parameters: ParameterCounts
    sessions: list[Session]
    stopped_early: EarlyStop | None = None


def installed_versions() -> dict[str, str]:
    """Return the installed version of each package that a run depends on."""
    return {package: version(package) for package in PACKAGES}


def python_version() -> str:
    """Return the running Python's version, such as `3.11.7`."""
    return ".".join(map(str, sys.version_info[:3]))


def git_commit() -> str | None:
    """Return the commit of this repository; None for a copy without history, unless `GIT_COMMIT` is set."""
    if "GIT_COMMIT" in os.environ:
        return os.environ["GIT_COMMIT"]
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
