"""Time and memory of a T4, computed from its data sheet."""

from dataclasses import replace

import pytest
from helpers import REPOSITORY
from random_models import load_shape_config

from hw3.config.recipe import load_recipe
from hw3.modeling.loading import count_parameters
from hw3.training.batch_layout import divide_batch
from hw3.training.datasheet_estimate import (
    T4,
    DataSheet,
    StepSize,
    choose_strategy_for,
    compute_step_seconds,
    describe_run_on,
)
from hw3.training.memory_estimate import WeightCounts
from hw3.training.step_strategy import Workload


def build_workload(shape: str, *overrides: str) -> Workload:
    recipe, config = load_recipe(REPOSITORY / f"recipes/{shape}/qlora.yaml", list(overrides)), load_shape_config(shape)
    lengths = [(120, 30), (130, 20), (125, 25)] * 8
    return Workload(recipe, divide_batch(recipe, 1), config, count_parameters(recipe, config)[0], lengths)


@pytest.mark.parametrize(("dtype", "rate"), [("float16", 65e12), ("float32", 8.1e12)])
def test_compute_step_seconds_adds_products_attention_and_memory_traffic(dtype: str, rate: float) -> None:
    workload, size = build_workload("gemma"), StepSize(tokens=1000, output_tokens=200, length=125, dequantizations=2)
    recipe = replace(workload.recipe, model=workload.recipe.model.model_copy(update={"dtype": dtype}))
    counts, itemsize = WeightCounts(linear=2_000_000_000, other=0), 2 if dtype == "float16" else 4
    products = 1000 * (4 * 2e9 + 6 * 10e6) + 200 * 4 * 256_000 * 2304
    attention = 12 * 1000 * 125 * 8 * 256 * 26
    activation_bytes = 5 * 4 * (2 * 9216 + 3 * 2304 + 4 * 8 * 256) * 1000 * 26
    weight_bytes = 2e9 * (2 * itemsize + 2 * (0.5 + itemsize))
    expected = products / rate + attention / 8.1e12 + (activation_bytes + weight_bytes) / 320e9
    assert compute_step_seconds(T4, recipe, workload.config, counts, 10_000_000, size) == pytest.approx(expected)


def test_a_t4_holds_gemma_2_2b_in_4_bits_with_the_cuda_graph_step() -> None:
    strategy = choose_strategy_for(T4, build_workload("gemma"))
    assert strategy.cuda_graphs and not strategy.dequantized
    line = describe_run_on(T4, build_workload("gemma"))
    assert line.startswith("computed from the data sheet of a T4, not measured: ")
    assert " of 14.90 GiB with the CUDA-graph step in float16; 3500 steps of at least 0.26 s, in all 15 min" in line


def test_describe_run_on_counts_the_steps_of_epochs() -> None:
    workload = build_workload("smollm2", "training.max_steps=-1", "training.num_train_epochs=4")
    assert "; 12 steps of at least " in describe_run_on(T4, workload)


def test_a_gpu_without_enough_memory_gets_trls_step() -> None:
    small = DataSheet("GPU of 4 GB", 65e12, 8.1e12, 320e9, 4e9)
    assert not choose_strategy_for(small, build_workload("gemma")).cuda_graphs
    assert "with TRL's step in float16" in describe_run_on(small, build_workload("gemma"))
