"""Compute the time and memory of a run on a GPU that is not there, from the numbers of its data sheet.

The time is a lower bound: all matrix products run at the data sheet's rate, and all other work at its bandwidth.
Nothing is measured.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from typing import Any

import torch

from hw3.common.disk import format_bytes
from hw3.config.recipe import Recipe
from hw3.modeling.supported_models import LayerShape
from hw3.training.cuda_graph_support import compute_rows_per_replay
from hw3.training.memory_estimate import WeightCounts, count_weights
from hw3.training.step_strategy import StepStrategy, Workload, choose_step_strategy
from hw3.training.time_estimate import format_duration

# Times that a step writes or reads each activation: forward, its saved copy, backward, and the gradient twice.
ACTIVATION_PASSES = 5


@dataclass(frozen=True)
class DataSheet:
    """Numbers of a GPU's data sheet.

    Attributes:
        name: the GPU.
        float16_flops: operations per second of float16 matrix products.
        float32_flops: operations per second in float32.
        bytes_per_second: memory bandwidth.
        memory_bytes: size of the memory.
    """

    name: str
    float16_flops: float
    float32_flops: float
    bytes_per_second: float
    memory_bytes: float


# NVIDIA T4 Tensor Core GPU, data sheet of March 2019. Colab's free GPU.
T4 = DataSheet("T4", 65e12, 8.1e12, 320e9, 16e9)


@dataclass(frozen=True)
class StepSize:
    """What one optimizer step computes.

    Attributes:
        tokens: tokens of its rows.
        output_tokens: those of the outputs, whose logits are computed.
        length: tokens of a row, on average.
        dequantizations: how often all 4-bit weights are dequantized; 0 if they were before training.
    """

    tokens: float
    output_tokens: float
    length: float
    dequantizations: int = 0


def compute_step_seconds(
    sheet: DataSheet, recipe: Recipe, config: Any, counts: WeightCounts, trained_parameters: int, size: StepSize
) -> float:
    """Return the least seconds of a QLoRA step.

    Args:
        sheet: the GPU.
        recipe: the recipe; its `model.dtype` decides at which rate products run.
        config: the base model's configuration.
        counts: weights of the base model.
        trained_parameters: number of trained parameters.
        size: the step.
    """
    text, shape = config.get_text_config(), LayerShape.from_config(config)
    layers, dtype = text.num_hidden_layers, getattr(torch, recipe.model.dtype)
    # Forward and the gradient of the input; for adapters also that of the weight. Two operations per product.
    head = text.vocab_size * text.hidden_size
    products = size.tokens * (4 * counts.linear + 6 * trained_parameters) + size.output_tokens * 4 * head
    # Scores and their product with the values, forward and backward, in float32.
    attention = 12 * size.tokens * size.length * shape.heads * shape.head_dim * layers
    rate = sheet.float32_flops if dtype == torch.float32 else sheet.float16_flops
    elements = 2 * shape.intermediate_size + 3 * shape.hidden_size + 4 * shape.heads * shape.head_dim
    activation_bytes = ACTIVATION_PASSES * 4 * elements * size.tokens * layers
    # A product reads its weights. A dequantization reads 4 bits per weight and writes the compute dtype.
    weight_bytes = counts.linear * (
        max(2, size.dequantizations) * dtype.itemsize + size.dequantizations * (0.5 + dtype.itemsize)
    )
    seconds = products / rate + attention / sheet.float32_flops
    return seconds + (activation_bytes + weight_bytes) / sheet.bytes_per_second


def choose_strategy_for(sheet: DataSheet, workload: Workload) -> StepStrategy:
    """Return how `speed: auto` would compute the workload on this GPU, in float16."""
    recipe, quantization = workload.recipe, workload.recipe.quantization
    if quantization is not None:
        quantization = quantization.model_copy(update={"bnb_4bit_compute_dtype": "float16"})
    recipe = replace(
        recipe,
        model=recipe.model.model_copy(update={"dtype": "float16"}),
        quantization=quantization,
        training=recipe.training | {"bf16": False},
        speed="auto",
    )
    memory = int(sheet.memory_bytes)
    return choose_step_strategy(replace(workload, recipe=recipe), torch.device("cuda"), (memory, memory))


@dataclass(frozen=True)
class ComputedRun:
    """A run that was computed, not measured.

    Attributes:
        steps: optimizer steps.
        seconds_per_step: the least seconds of a step.
        strategy: how steps would be computed.
    """

    steps: int
    seconds_per_step: float
    strategy: StepStrategy


def compute_run(sheet: DataSheet, workload: Workload, dtype: str = "float16") -> ComputedRun:
    """Compute a QLoRA run on a GPU.

    Args:
        sheet: the GPU.
        workload: what the steps compute, in any dtype.
        dtype: in which matrix products are computed instead.
    """
    recipe = workload.recipe
    recipe = replace(recipe, model=recipe.model.model_copy(update={"dtype": dtype}))
    training, rows = recipe.training, recipe.rows_per_step
    steps = training.get("max_steps") or -1
    if steps < 0:
        steps = math.ceil(training["num_train_epochs"] * (len(workload.lengths) // rows))
    strategy = choose_strategy_for(sheet, workload)
    length, outputs = (statistics.mean(counts) for counts in zip(*workload.lengths, strict=True))
    passes = strategy.layout.accumulation
    if strategy.cuda_graphs:
        passes = math.ceil(rows / compute_rows_per_replay(rows, math.ceil(length), strategy.tokens_per_replay))
    is_packed = recipe.quantization is not None and not strategy.dequantized
    size = StepSize(rows * length, rows * outputs, length, 2 * passes if is_packed else 0)
    counts = count_weights(workload.config)
    seconds = compute_step_seconds(sheet, recipe, workload.config, counts, workload.trained_parameters, size)
    return ComputedRun(steps, seconds, strategy)


def describe_run_on(sheet: DataSheet, workload: Workload) -> str:
    """Return a line on the time and memory of a QLoRA run on a GPU in float16, marked as computed."""
    run = compute_run(sheet, workload)
    step = "the CUDA-graph step" if run.strategy.cuda_graphs else "TRL's step"
    return (
        f"computed from the data sheet of a {sheet.name}, not measured: {format_bytes(run.strategy.memory.total)} of "
        f"{format_bytes(int(sheet.memory_bytes))} with {step} in float16; {run.steps} steps of at least "
        f"{run.seconds_per_step:.2g} s, in all {format_duration(run.steps * run.seconds_per_step)}"
    )
