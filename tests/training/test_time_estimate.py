"""What a run will take, told from a few steps of a small base."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import Gemma2Config

from hw3.config.recipe import load_recipe
from hw3.data.tokenization import EncodedRow
from hw3.modeling.loading import load_config, load_tokenizer
from hw3.training.plan import plan_run
from hw3.training.preflight import check
from hw3.training.time_estimate import FUSED, STEPS, Timing, duration, in_all, in_words, like_steps, probe, random_base

CPU = torch.device("cpu")


def test_time_grows_by_a_straight_line() -> None:
    assert in_all({1: 0.05, 3: 0.13}, 26) == pytest.approx(1.05)
    assert in_all({1: 0.05, 3: 0.05}, 26) == 0.05
    assert in_all({1: 0.05, 3: 0.04}, 26) == 0.05  # noise: more layers never take less
    assert Timing({1: 0.05, 3: 0.13}, {}, {}).seconds_per_step(26) == pytest.approx(1.05)


def test_the_captured_step_is_products_optimizer_and_what_compiling_leaves() -> None:
    graphs, optimizer = {1: 0.004, 3: 0.010}, {1: 0.0001, 3: 0.0003}
    timing = Timing({1: 0.006, 3: 0.007}, graphs, optimizer, products=(0.001, 0.0005))
    # 26 layers: graphs 0.079, products 0.0265, optimizer 0.0026.
    assert timing.seconds_per_step(26) == pytest.approx(0.0265 + FUSED * (0.079 - 0.0265) + 0.0026)
    # A CPU that needs 60 ms to launch a step sets the pace.
    slow = Timing({1: 0.060, 3: 0.061}, graphs, optimizer, products=(0.001, 0.0005))
    assert slow.seconds_per_step(26) == 0.060


def test_words() -> None:
    assert [duration(seconds) for seconds in (50, 89.4, 90, 719, 4800, 7170)] == [
        "50 s", "89 s", "2 min", "12 min", "1 h 20 min", "2 h 0 min",
    ]  # fmt: skip
    assert in_words(3500, 1.36, "NVIDIA L4", False) == (
        "about 1 h 20 min on NVIDIA L4: 3500 steps of 1.4 s each, from a probe of 1 and 6 layers; the first comes "
        "after about 10 s"
    )


def test_like_steps_are_as_long_as_the_run_s() -> None:
    """Evenly from short to long, so that their mean is that of all."""
    rows = [EncodedRow(str(number), [1] * (20 + number % 150), [2] * (1 + number % 30), 5) for number in range(1600)]
    steps = like_steps(rows, 8, seed=7)
    tokens = [sum(len(rows[row]) for row in step) for step in steps]
    assert len(steps) == STEPS and {len(step) for step in steps} == {8} and tokens == sorted(tokens)
    assert sum(tokens) / STEPS == pytest.approx(8 * sum(map(len, rows)) / len(rows), rel=0.05)


@pytest.mark.parametrize("packed", [True, False])
def test_the_base_has_the_recipe_s_shape(mini_recipe: Path, packed: bool) -> None:
    recipe = load_recipe(mini_recipe)
    config = load_config(recipe.model)
    model = random_base(recipe, config, 1, CPU, packed=packed)
    assert config.num_hidden_layers == 2  # the recipe's own is as it was
    (layer,) = model.base_model.layers
    assert isinstance(layer.mlp.up_proj, Linear4bit) == packed
    assert (layer.mlp.up_proj.in_features, layer.mlp.up_proj.out_features) == (64, 128)
    assert model.get_output_embeddings().weight.shape == (64, 64)
    assert model.dtype == torch.float32 and model.config._attn_implementation == "eager"
    assert not model.config.use_cache


def test_kinds_of_layers_are_cut_with_them(mini_recipe: Path) -> None:
    recipe = load_recipe(mini_recipe)
    config = Gemma2Config(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32,
    )  # fmt: skip
    model = random_base(recipe, config, 3, CPU, packed=False)
    assert model.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]


@pytest.mark.parametrize("overrides", [[], ["quantization=null", "training.gradient_accumulation_steps=2"]])
def test_a_probe_on_the_cpu(
    mini_recipe: Path, tmp_path: Path, overrides: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(mini_recipe, overrides)
    plan = plan_run(recipe, tmp_path / "run", 1)
    capfd.readouterr()
    timing = probe(recipe, plan.speed, load_tokenizer(recipe.model), plan.rows, CPU)
    assert set(timing.wall) == {1, 6} and min(timing.wall.values()) > 0 and not timing.graphs
    assert timing.seconds_per_step(26) >= timing.seconds_per_step(1) > 0
    out, err = capfd.readouterr()
    assert out == ""  # neither losses nor progress
    assert "loss" not in err
    assert not (tmp_path / "run").exists()


def test_no_time_is_told_on_a_cpu(mini_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(load_recipe(mini_recipe), tmp_path / "run") == 0
    assert "from a probe" not in capsys.readouterr().out
