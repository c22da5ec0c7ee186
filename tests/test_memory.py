"""What `hw3 check` says of memory, against what GPUs took: the figures of docs/benchmarks, by the same rows."""

import json
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from transformers import AutoConfig

from hw3.model import parameter_counts
from hw3.recipe import load_recipe, step_layout
from hw3.speed import GIB, choose_speed, memory_of, weight_counts


def row_of(report: str, setting: str) -> dict[str, Any]:
    rows = json.loads((REPOSITORY / f"docs/benchmarks/{report}.json").read_text())["rows"]
    return next(row for row in rows if row["setting"].endswith(setting))


def shape_of(name: str) -> Any:
    return AutoConfig.for_model(**json.loads((REPOSITORY / "benchmarks/shapes.json").read_text())[name])


def told(shape: str, rows: int, width: int, outputs: int, **options: Any) -> float:
    """GiB of TRL's step on a 4-bit base whose widest batch has these rows, tokens and output tokens."""
    config = shape_of(shape)
    recipe = load_recipe(REPOSITORY / f"recipes/{'llama' if shape == 'llama' else 'gemma'}/qlora.yaml")
    given = {"checkpointing": True, "optim": "paged_adamw_32bit", "processes": 1, "sharded": None} | options
    memory = memory_of(
        recipe, config, weight_counts(config), parameter_counts(recipe, config)[0], rows=rows, width=width,
        outputs=outputs, captured=False, dequantized=False, **given,
    )  # fmt: skip
    return memory.total / GIB


KEPT = {"checkpointing": False, "optim": "adamw_torch_fused"}
# The widest batches that those runs had, from their rows and seed. Those under FSDP computed otherwise than now.
MEASURED = [
    ("memory", "2b-one-lean", "peak_steps_gib", ("gemma", 4, 341, 528), {}),
    ("memory", "8b-one-plain", "peak_steps_gib", ("llama", 4, 341, 528), {}),
    ("memory", "8b-one-lean", "peak_steps_gib", ("llama", 4, 509, 832), {}),
    ("memory", "27b-one-lean", "peak_steps_gib", ("gemma-27b", 4, 341, 528), {}),
    ("memory", "8b-zero3-2", "peak_steps_gib", ("llama", 4, 509, 832), KEPT | {"processes": 2, "sharded": "DeepSpeed"}),
    ("train_step", "TRL tuned by hand: 8 x 1, activations kept, fused AdamW", "peak_gib", ("gemma", 8, 426, 894), KEPT),
    (
        "train_step_llama", "TRL tuned by hand: 8 x 1, activations kept, fused AdamW", "peak_gib",
        ("llama", 8, 521, 1079), KEPT,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("report", "setting", "figure", "batch", "options"), MEASURED)
def test_memory_is_told_within_a_tenth(
    report: str, setting: str, figure: str, batch: tuple[str, int, int, int], options: dict[str, Any]
) -> None:
    assert told(*batch, **options) == pytest.approx(row_of(report, setting)[figure], rel=0.1)


def chosen(
    recipe_name: str, shape: str, trained: int, lengths: list[tuple[int, int]], *overrides: str, processes: int = 1
) -> float:
    """GiB of what `choose_speed` takes on a GPU that is large enough."""
    recipe = load_recipe(REPOSITORY / f"recipes/{recipe_name}/qlora.yaml", list(overrides))
    speed = choose_speed(
        recipe, step_layout(recipe, processes), shape_of(shape), trained, lengths, torch.device("cuda"), None
    )  # fmt: skip
    return speed.memory.total / GIB


def test_memory_of_what_is_chosen() -> None:
    """The longest row and output of the course's file decide, and of the sample's."""
    auto = chosen("gemma", "gemma", 83_066_880, [(100, 20), (459, 120)])
    assert auto == pytest.approx(row_of("train_step", "speed: auto")["peak_gib"], rel=0.1)
    llama = chosen("llama", "llama", 41_943_040, [(147, 30), (547, 160)])
    assert llama == pytest.approx(row_of("train_step_llama", "speed: auto")["peak_gib"], rel=0.1)
    plain = chosen("gemma", "gemma", 83_066_880, [(201, 71)], "speed=plain")
    assert plain == pytest.approx(row_of("gpu_recipe", "as the recipe stands")["peak_gib"], rel=0.1)


@pytest.mark.parametrize(("setting", "processes"), [("8b-one-auto", 1), ("8b-ddp-2", 2)])
def test_memory_of_the_captured_step(setting: str, processes: int) -> None:
    """What its graphs hold is measured too; the longest row has 509 tokens, the longest output 253."""
    row = row_of("memory", setting)
    overrides = ["training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=2"]
    lengths = [(300, 100), (509, 253)]
    told = chosen("llama", "llama", 41_943_040, lengths, *overrides, processes=processes)
    assert row["speed"]["captured"] and told == pytest.approx(row["peak_steps_gib"] + row["graphs_gib"], rel=0.1)
