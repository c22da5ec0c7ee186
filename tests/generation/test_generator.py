"""Select a checkpoint by name, and name its predictions."""

import json
import shutil
from pathlib import Path

import pytest

from hw3.common.errors import UserError
from hw3.evaluation.selection import select_checkpoint
from hw3.generation.generator import RunGenerator
from hw3.runs.run import Run

pytestmark = pytest.mark.usefixtures("in_repository")


def test_select_checkpoint_accepts_names_and_paths(run: Path, best: str) -> None:
    def select(name: str) -> tuple[str | None, str]:
        checkpoint, line = select_checkpoint(Run(run), Run(run).load_recipe(), name)
        return checkpoint and checkpoint.name, line

    assert select("base") == (None, "base, without an adapter")
    assert select("last") == ("checkpoint-10", "checkpoint-10, the last of 2")
    assert select("checkpoint-5")[0] == select(str(run / "checkpoint-5"))[0] == "checkpoint-5"
    assert select("best")[0] == best
    # A checkpoint that was trained again after it was scored is not the best.
    results_file = run / "eval/twelve/results.json"
    results = json.loads(results_file.read_text(encoding="utf-8"))
    for entry in results["entries"]:
        entry["adapter_sha256"] = "0" * 64
    results_file.write_text(json.dumps(results), encoding="utf-8")
    assert select("best")[0] == "checkpoint-10"


def test_run_generator_names_predictions_of_an_external_adapter_by_hash(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "checkpoint-5", tmp_path / "elsewhere")
    generator = RunGenerator.open(Run(run), str(tmp_path / "elsewhere"), shots=1)
    assert generator.checkpoint is not None and generator.checkpoint.name == "elsewhere"
    assert generator.name == f"elsewhere-{generator.checkpoint.sha256[:8]}+1"


def test_run_generator_refuses_a_prompt_that_leaves_no_position_for_the_output(run: Path) -> None:
    generator = RunGenerator.open(Run(run), "base")
    with pytest.raises(
        UserError, match=r"row text: its prompt has \d+ tokens, and the model takes \d+ with the output"
    ):
        generator.generate_text("山" * generator.input_limits.max_positions)
