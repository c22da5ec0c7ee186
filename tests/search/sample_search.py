"""A space for the recipe of `write_recipe`, whose trials take about a second."""

from pathlib import Path
from typing import Any

from hw3.runs.checkpoints import find_complete_checkpoints
from hw3.runs.search_record import SearchRecord

SPACE = """
trials: 4
sampler: tpe
pruner: successive_halving
reduction_factor: 2
seed: 1
fixed:
  training.max_steps: 4
  training.save_steps: 1
space:
  training.learning_rate:
    float: {low: 1e-3, high: 1e-1, log: true}
  lora.r:
    categorical: [2, 4]
  lora.alpha_over_r:
    categorical: [1, 2]
"""


def write_space(folder: Path) -> Path:
    """Write the space; return its path."""
    path = folder / "space.yaml"
    path.write_text(SPACE, encoding="utf-8")
    return path


def read_record(folder: Path) -> SearchRecord:
    return SearchRecord.read(folder / "search.json")


def comparable(folder: Path) -> dict[str, Any]:
    """Return what must be equal in a search that was killed and in one that was not: all but the random id."""
    record = read_record(folder).model_dump(exclude={"id"})
    adapters = [
        (find_complete_checkpoints(folder / trial["run"])[-1].path / "adapter_model.safetensors").read_bytes()
        for trial in record["trials"]
    ]
    return record | {"adapters": adapters, "best.yaml": (folder / "best.yaml").read_text()}
