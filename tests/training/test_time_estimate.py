"""The time of a run, estimated from a few steps of small base models."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import Gemma2Config

from hw3.config.recipe import load_recipe
from hw3.data.tokenization import EncodedRow
from hw3.modeling.loading import build_random_base, load_model_config, load_tokenizer
from hw3.training.plan import plan_run
from hw3.training.time_estimate import (
    COMPILED_FRACTION,
    PASSES,
    TIMED_STEPS,
    StepTimings,
    _TimedTrainer,
    extrapolate_layers,
    format_duration,
    format_run_time,
    representative_steps,
    time_steps,
)

CPU = torch.device("cpu")


def test_extrapolate_layers_is_linear_and_never_falls() -> None:
    assert extrapolate_layers({1: 0.05, 3: 0.13}, 26) == pytest.approx(1.05)
    assert extrapolate_layers({1: 0.05, 3: 0.05}, 26) == 0.05
    assert extrapolate_layers({1: 0.05, 3: 0.04}, 26) == 0.05  # noise
    assert StepTimings({1: 0.05, 3: 0.13}, {}, {}).seconds_per_step(26) == pytest.approx(1.05)


def test_seconds_per_step_with_cuda_graphs_adds_products_compiled_rest_and_optimizer() -> None:
    graphs, optimizer = {1: 0.004, 3: 0.010}, {1: 0.0001, 3: 0.0003}
    timings = StepTimings({1: 0.006, 3: 0.007}, graphs, optimizer, products=(0.001, 0.0005))
    # 26 layers: graphs 0.079, products 0.0265, optimizer 0.0026.
    assert timings.seconds_per_step(26) == pytest.approx(0.0265 + COMPILED_FRACTION * (0.079 - 0.0265) + 0.0026)


def test_seconds_per_step_with_cuda_graphs_is_at_least_that_of_the_cpu() -> None:
    """A CPU that needs 60 ms to launch a step sets the pace."""
    graphs, optimizer = {1: 0.004, 3: 0.010}, {1: 0.0001, 3: 0.0003}
    timings = StepTimings({1: 0.060, 3: 0.061}, graphs, optimizer, products=(0.001, 0.0005))
    assert timings.seconds_per_step(26) == 0.060


def test_format_duration_and_run_time() -> None:
    assert [format_duration(seconds) for seconds in (50, 89.4, 90, 719, 4800, 7170)] == [
        "50 s", "89 s", "2 min", "12 min", "1 h 20 min", "2 h 0 min",
    ]  # fmt: skip
    assert format_run_time(3500, 1.36, "NVIDIA L4", False) == (
        "about 1 h 20 min on NVIDIA L4: 3500 steps of 1.4 s each, extrapolated from 1 and 6 layers; the first step "
        "starts after about 10 s"
    )


def test_representative_steps_are_as_long_as_the_run_on_average() -> None:
    rows = [EncodedRow(str(number), [1] * (20 + number % 150), [2] * (1 + number % 30), 5) for number in range(1600)]
    steps = representative_steps(rows, 8, seed=7)
    tokens = [sum(len(rows[row]) for row in step) for step in steps]
    assert len(steps) == TIMED_STEPS and {len(step) for step in steps} == {8} and tokens == sorted(tokens)
    assert sum(tokens) / TIMED_STEPS == pytest.approx(8 * sum(map(len, rows)) / len(rows), rel=0.05)


@pytest.mark.parametrize("dequantized", [False, True])
def test_build_random_base_has_the_recipes_shape(mini_recipe: Path, dequantized: bool) -> None:
    recipe = load_recipe(mini_recipe)
    config = load_model_config(recipe.model)
    model = build_random_base(recipe, config, 1, CPU, dequantized=dequantized)
    assert config.num_hidden_layers == 2  # unchanged
    (layer,) = model.base_model.layers
    assert isinstance(layer.mlp.up_proj, Linear4bit) != dequantized
    assert (layer.mlp.up_proj.in_features, layer.mlp.up_proj.out_features) == (64, 128)
    assert model.get_output_embeddings().weight.shape == (64, 64)
    assert model.dtype == torch.float32 and model.config._attn_implementation == "eager"
    assert not model.config.use_cache


def test_build_random_base_cuts_the_types_of_layers(mini_recipe: Path) -> None:
    recipe = load_recipe(mini_recipe)
    config = Gemma2Config(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32,
    )  # fmt: skip
    model = build_random_base(recipe, config, 3, CPU, dequantized=True)
    assert model.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]


@pytest.mark.parametrize("overrides", [[], ["quantization=null", "training.gradient_accumulation_steps=2"]])
def test_time_steps_on_a_cpu_is_silent_and_writes_nothing(
    mini_recipe: Path, tmp_path: Path, overrides: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(mini_recipe, overrides)
    plan = plan_run(recipe, tmp_path / "run", 1)
    capfd.readouterr()
    timings = time_steps(recipe, plan.strategy, load_tokenizer(recipe.model), plan.rows, CPU)
    assert set(timings.wall) == {1, 6} and min(timings.wall.values()) > 0 and not timings.graphs
    assert timings.seconds_per_step(26) >= timings.seconds_per_step(1) > 0
    out, err = capfd.readouterr()
    assert out == ""  # neither losses nor progress
    assert "loss" not in err
    assert not (tmp_path / "run").exists()


def test_timed_trainer_times_the_cuda_graph_steps_of_the_last_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hw3.training.trainer.CompletionTrainer.training_step", lambda *_: torch.tensor(1.5))
    monkeypatch.setattr("hw3.training.time_estimate.time_on_gpu", lambda work: work() and 0.25)
    trainer: Any = _TimedTrainer.__new__(_TimedTrainer)
    trainer.tokens, trainer.graph_seconds, trainer.optimizer_seconds = [], [], []
    trainer.optimizer, trainer.cuda_graph_step = SimpleNamespace(step=lambda: True), SimpleNamespace()
    for step in range(PASSES * TIMED_STEPS):
        trainer.state = SimpleNamespace(global_step=step)
        assert trainer.training_step(torch.nn.Identity(), {"input_ids": torch.zeros(2, 7)}) == 1.5
    assert trainer.tokens == [14] * TIMED_STEPS
    assert trainer.graph_seconds == trainer.optimizer_seconds == [0.25] * TIMED_STEPS
