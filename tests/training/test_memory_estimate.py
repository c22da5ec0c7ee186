"""Memory estimates: exact for small shapes under sharding, and within 10 % of the measurements in docs/benchmarks."""

import functools
import json
from typing import Any

import pytest
import torch
from helpers import REPOSITORY
from memory import STRATEGIES
from transformers import AutoConfig, LlamaConfig

from hw3.config.recipe import Recipe, load_recipe
from hw3.modeling.loading import count_parameters
from hw3.training.batch_layout import divide_batch
from hw3.training.memory_estimate import GIB, MemoryEstimate, StepShape, WeightCounts, count_weights, estimate_memory
from hw3.training.sharding import Sharding
from hw3.training.step_strategy import Workload, choose_step_strategy

# 4,096,000 weights in linear layers, 10 layers of them; 2 * 640,000 in embedding and head; norms 2,688.
SMALL_LLAMA = LlamaConfig(
    vocab_size=5000, hidden_size=128, intermediate_size=896, num_hidden_layers=10, num_attention_heads=4,
    num_key_value_heads=4, head_dim=32,
)  # fmt: skip


def estimate_small_llama(sharding: Sharding | None, processes: int, *overrides: str) -> MemoryEstimate:
    recipe = load_recipe(REPOSITORY / "recipes/llama/qlora.yaml", list(overrides))
    step = StepShape(1, 10, 5, "adamw_torch_fused", processes=processes, sharding=sharding)
    return estimate_memory(recipe, SMALL_LLAMA, count_weights(SMALL_LLAMA), 1_000_000, step)


def test_estimate_memory_of_sharded_models() -> None:
    assert count_weights(SMALL_LLAMA) == WeightCounts(linear=4_096_000, other=1_282_688)
    # bfloat16: 8,192,000 bytes in layers, 2,565,376 elsewhere; 4-bit: 2,048,000 and 65,000 of scales.
    unsharded = estimate_small_llama(None, 2, "quantization=null")
    assert (unsharded.weights, unsharded.adapters, unsharded.optimizer) == (10_757_376, 12_000_000, 8_000_000)
    fsdp = estimate_small_llama("FSDP", 2, "quantization=null")
    assert fsdp.weights == 10_757_376 // 2 + 2 * 819_200 + 1_280_000
    assert (fsdp.adapters, fsdp.optimizer) == (4_000_000, 4_000_000)
    fsdp_4bit = estimate_small_llama("FSDP", 4)
    assert fsdp_4bit.weights == (2_048_000 + 2_565_376) // 4 + 65_000 + 2 * 204_800 + 1_280_000
    zero3 = estimate_small_llama("DeepSpeed", 4, "quantization=null")
    # All parameters of this small base model may stay gathered. Adapters and gradients have float32 copies; the buffer.
    assert zero3.weights == 10_757_376 // 4 + 10_757_376
    assert (zero3.adapters, zero3.optimizer) == (3_000_000 + 10**9, 2_000_000)
    assert fsdp.activations == zero3.activations == unsharded.activations


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_estimate_memory_counts_float32_activations_beside_float16_weights(cuda_graphs: bool) -> None:
    estimates = {}
    for dtype in ("float16", "bfloat16", "float32"):
        recipe = load_recipe(REPOSITORY / "recipes/llama/qlora.yaml", ["quantization=null", f"model.dtype={dtype}"])
        step = StepShape(1, 10, 5, "adamw_torch_fused", cuda_graphs=cuda_graphs)
        estimates[dtype] = estimate_memory(recipe, SMALL_LLAMA, count_weights(SMALL_LLAMA), 1_000_000, step)
    assert estimates["float16"].weights == estimates["bfloat16"].weights == 10_757_376
    assert estimates["float16"].activations == estimates["float32"].activations > estimates["bfloat16"].activations
    assert estimates["float16"].adapters == estimates["float32"].adapters


def read_measurements(report: str) -> list[dict[str, Any]]:
    return json.loads((REPOSITORY / f"docs/benchmarks/{report}.json").read_text(encoding="utf-8"))["rows"]


def find_measurement(report: str, setting: str) -> dict[str, Any]:
    return next(row for row in read_measurements(report) if row["setting"].endswith(setting))


def memory_measurements(cuda_graphs: bool) -> list[dict[str, Any]]:
    """Return the cases of benchmarks/memory.py that worked."""
    rows = read_measurements("memory")
    return [row for row in rows if "failed" not in row and row["speed"]["cuda_graphs"] == cuda_graphs]


def load_shape(name: str) -> Any:
    return AutoConfig.for_model(**json.loads((REPOSITORY / "benchmarks/shapes.json").read_text(encoding="utf-8"))[name])


@functools.cache
def load_recipe_and_counts(shape: str) -> tuple[Recipe, WeightCounts, int]:
    """Return the recipe for a shape, the counts of its weights, and its number of trained parameters."""
    recipe = load_recipe(REPOSITORY / f"recipes/{'llama' if shape == 'llama' else 'gemma'}/qlora.yaml")
    config = load_shape(shape)
    return recipe, count_weights(config), count_parameters(recipe, config)[0]


def estimate_trl_step(shape: str, step: StepShape) -> float:
    """Return the GiB of TRL's step on a 4-bit base model."""
    recipe, counts, trained_parameters = load_recipe_and_counts(shape)
    return estimate_memory(recipe, load_shape(shape), counts, trained_parameters, step).total / GIB


def estimate_chosen_step(
    name: str, trained_parameters: int, lengths: list[tuple[int, int]], *overrides: str, processes: int = 1
) -> float:
    """Return the GiB of the step that `choose_step_strategy` takes on a GPU that is large enough."""
    recipe = load_recipe(REPOSITORY / f"recipes/{name}/qlora.yaml", list(overrides))
    workload = Workload(recipe, divide_batch(recipe, processes), load_shape(name), trained_parameters, lengths)
    return choose_step_strategy(workload, torch.device("cuda"), None).memory.total / GIB


def test_every_strategy_was_measured() -> None:
    assert [len(memory_measurements(cuda_graphs)) for cuda_graphs in (True, False)] == [4, 16]
    measured = {(row["shape"], row["strategy"]) for uses in (True, False) for row in memory_measurements(uses)}
    strategies = {name: {strategy for shape, strategy in measured if shape == name} for name in ("2b", "8b", "27b")}
    assert strategies["2b"] == strategies["8b"] == set(STRATEGIES)
    # The other strategies do not fit into the GPU.
    assert strategies["27b"] == {"1gpu-lean", "fsdp2-checkpointing", "zero3-checkpointing"}


@pytest.mark.parametrize("row", memory_measurements(cuda_graphs=False), ids=lambda row: row["setting"])
def test_estimate_memory_of_trls_step_is_within_10_percent(row: dict[str, Any]) -> None:
    """The longest batch of those runs had 509 tokens per row, and 984 output tokens in four rows, or 492 in two."""
    shape = {"2b": "gemma", "8b": "llama", "27b": "gemma-27b"}[row["shape"]]
    rows, output_tokens = (2, 492) if row["gpus"] == 4 else (4, 984)
    strategy, _, checkpointing = row["strategy"].partition("-")
    if strategy == "1gpu":
        step = StepShape(rows, 509, output_tokens, "paged_adamw_32bit", activation_checkpointing=True)
    else:
        step = StepShape(
            rows, 509, output_tokens, "adamw_torch_fused",
            activation_checkpointing=checkpointing == "checkpointing", processes=row["gpus"],
            sharding={"fsdp2": "FSDP", "zero3": "DeepSpeed"}[strategy],
        )  # fmt: skip
    assert estimate_trl_step(shape, step) == pytest.approx(row["held_gib"], rel=0.1)


@pytest.mark.parametrize(
    ("report", "shape", "batch"),
    [("train_step", "gemma", (8, 426, 894)), ("train_step_llama", "llama", (8, 521, 1079))],
)
def test_estimate_memory_of_one_micro_batch_is_within_10_percent(
    report: str, shape: str, batch: tuple[int, int, int]
) -> None:
    row = find_measurement(report, "TRL hand-tuned: 8 x 1, no activation checkpointing, fused AdamW")
    assert estimate_trl_step(shape, StepShape(*batch, "adamw_torch_fused")) == pytest.approx(row["peak_gib"], rel=0.1)


def test_estimate_memory_of_chosen_step_is_within_10_percent() -> None:
    """The lengths are the longest row and output of the course's file, and of the sample's."""
    auto = estimate_chosen_step("gemma", 83_066_880, [(100, 20), (459, 120)])
    assert auto == pytest.approx(find_measurement("train_step", "speed: auto")["peak_gib"], rel=0.1)
    llama = estimate_chosen_step("llama", 41_943_040, [(147, 30), (547, 160)])
    assert llama == pytest.approx(find_measurement("train_step_llama", "speed: auto")["peak_gib"], rel=0.1)
    plain = estimate_chosen_step("gemma", 83_066_880, [(201, 71)], "speed=plain")
    assert plain == pytest.approx(find_measurement("gpu_recipe", "unchanged recipe")["peak_gib"], rel=0.1)


@pytest.mark.parametrize("row", memory_measurements(cuda_graphs=True), ids=lambda row: row["setting"])
def test_estimate_memory_of_cuda_graph_step_is_within_10_percent(row: dict[str, Any]) -> None:
    """The measurement includes the graphs' memory. The longest row has 509 tokens, the longest output 253."""
    name, trained_parameters = {"2b": ("gemma", 83_066_880), "8b": ("llama", 41_943_040)}[row["shape"]]
    overrides = ["training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=2"]
    lengths = [(300, 100), (509, 253)]
    estimate = estimate_chosen_step(name, trained_parameters, lengths, *overrides, processes=row["gpus"])
    assert estimate == pytest.approx(row["held_gib"], rel=0.1)
