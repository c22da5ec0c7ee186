"""What `hw3 check` says of memory, against what GPUs took: the figures of docs/benchmarks, by the same rows."""

import json
from typing import Any

import pytest
import torch
from helpers import REPOSITORY
from memory import STRATEGIES
from transformers import AutoConfig

from hw3.config.recipe import load_recipe
from hw3.modeling.loading import parameter_counts
from hw3.training.batch_layout import step_layout
from hw3.training.memory_estimate import GIB, memory_of, weight_counts
from hw3.training.step_strategy import choose_speed


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


def measured(captured: bool) -> list[dict[str, Any]]:
    """Cases of benchmarks/memory.py."""
    rows = json.loads((REPOSITORY / "docs/benchmarks/memory.json").read_text())["rows"]
    return [row for row in rows if "failed" not in row and row["speed"]["captured"] == captured]


def test_every_strategy_was_measured() -> None:
    assert [len(measured(captured)) for captured in (True, False)] == [4, 16]
    found = {(row["shape"], row["strategy"]) for captured in (True, False) for row in measured(captured)}
    assert {shape: {strategy for other, strategy in found if other == shape} for shape in ("2b", "8b")} == {
        shape: set(STRATEGIES) for shape in ("2b", "8b")
    }
    # Where only these have room.
    assert {strategy for shape, strategy in found if shape == "27b"} == {
        "one-lean", "fsdp2-checkpointing", "zero3-checkpointing",
    }  # fmt: skip


@pytest.mark.parametrize("row", measured(captured=False), ids=lambda row: row["setting"])
def test_memory_of_trls_step(row: dict[str, Any]) -> None:
    """The widest batch of those runs had 509 tokens a row, and four with 984 output tokens, or two with 492."""
    shape = {"2b": "gemma", "8b": "llama", "27b": "gemma-27b"}[row["shape"]]
    rows, outputs = (2, 492) if row["gpus"] == 4 else (4, 984)
    how, _, again = row["strategy"].partition("-")
    options = {}
    if how != "one":
        options = KEPT | {"processes": row["gpus"], "sharded": {"fsdp2": "FSDP", "zero3": "DeepSpeed"}[how]}
        options["checkpointing"] = again == "checkpointing"
    assert told(shape, rows, 509, outputs, **options) == pytest.approx(row["held_gib"], rel=0.1)


@pytest.mark.parametrize(
    ("report", "batch"), [("train_step", ("gemma", 8, 426, 894)), ("train_step_llama", ("llama", 8, 521, 1079))]
)
def test_memory_of_trls_step_with_all_rows_at_once(report: str, batch: tuple[str, int, int, int]) -> None:
    row = row_of(report, "TRL tuned by hand: 8 x 1, activations kept, fused AdamW")
    assert told(*batch, **KEPT) == pytest.approx(row["peak_gib"], rel=0.1)


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


@pytest.mark.parametrize("row", measured(captured=True), ids=lambda row: row["setting"])
def test_memory_of_the_captured_step(row: dict[str, Any]) -> None:
    """What its graphs hold is measured too; the longest row has 509 tokens, the longest output 253."""
    name, trained = {"2b": ("gemma", 83_066_880), "8b": ("llama", 41_943_040)}[row["shape"]]
    overrides = ["training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=2"]
    told = chosen(name, name, trained, [(300, 100), (509, 253)], *overrides, processes=row["gpus"])
    assert told == pytest.approx(row["held_gib"], rel=0.1)
