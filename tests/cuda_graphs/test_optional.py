"""`hw3/cuda_graphs/` can be deleted: who imports it, and what works without it."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ENVIRONMENT, REPOSITORY

from hw3.runs.checkpoints import find_complete_checkpoints

IMPORTERS = {"hw3/generation/decoder.py", "hw3/training/cuda_graph_support.py"}
LOWER_PACKAGES = {"common", "data", "config", "modeling", "cuda_graphs"}

# Trains, scores and predicts; prints why the package is unavailable, and the exit statuses.
SCRIPT = """
import sys
# An editable installation would find the package in the checkout.
sys.meta_path = [finder for finder in sys.meta_path if getattr(finder, "__name__", "") != "_EditableFinder"]
from hw3.cli import main
from hw3.training.cuda_graph_support import why_cuda_graphs_unavailable

recipe, run, data = sys.argv[1:]
statuses = [main(["train", recipe, "--run", run, "speed=plain"]), main(["eval", run]), main(["predict", run, data])]
print(why_cuda_graphs_unavailable())
print(statuses)
"""


def find_imported_modules(path: Path) -> set[str]:
    """Return the absolute names of all modules that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_only_two_modules_import_the_package() -> None:
    importers = {
        path.relative_to(REPOSITORY).as_posix()
        for path in (REPOSITORY / "hw3").rglob("*.py")
        if path.parent.name != "cuda_graphs"
        and any(name.startswith("hw3.cuda_graphs") for name in find_imported_modules(path))
    }
    assert importers == IMPORTERS


def test_package_imports_only_lower_packages() -> None:
    for path in (REPOSITORY / "hw3/cuda_graphs").glob("*.py"):
        packages = {name.split(".")[1] for name in find_imported_modules(path) if name.startswith("hw3.")}
        assert packages <= LOWER_PACKAGES, path


@pytest.fixture
def copy_without_package(tmp_path: Path) -> Path:
    """A folder with a copy of `hw3` that lacks `cuda_graphs`."""
    ignored = shutil.ignore_patterns("cuda_graphs", "__pycache__")
    shutil.copytree(REPOSITORY / "hw3", tmp_path / "copy/hw3", ignore=ignored)
    return tmp_path / "copy"


def test_without_the_package_a_plain_run_trains_scores_and_predicts_the_same(
    mini_recipe: Path, tmp_path: Path, copy_without_package: Path
) -> None:
    outputs = {}
    for name, checkout in (("with", REPOSITORY), ("without", copy_without_package)):
        run = tmp_path / name / "run"
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, mini_recipe, run, tmp_path / "eval.json"],
            capture_output=True,
            text=True,
            env=ENVIRONMENT | {"PYTHONPATH": str(checkout)},
            cwd=checkout,
        )
        assert done.returncode == 0, done.stderr
        outputs[name] = done.stdout.splitlines()[-2:]
    assert outputs["with"] == ["None", "[0, 0, 0]"]
    assert outputs["without"] == [
        "hw3.cuda_graphs cannot be imported (No module named 'hw3.cuda_graphs')",
        "[0, 0, 0]",
    ]
    runs = [tmp_path / name / "run" for name in ("with", "without")]
    adapters, scores, predictions = [], [], []
    for run in runs:
        checkpoints = find_complete_checkpoints(run)
        adapters.append([(checkpoint.path / "adapter_model.safetensors").read_bytes() for checkpoint in checkpoints])
        entries = json.loads((run / "eval/eval/results.json").read_text(encoding="utf-8"))["entries"]
        scores.append([(entry["checkpoint"], entry["mean_perplexity"]) for entry in entries])
        predictions.append(
            {path.name: path.read_bytes() for path in run.glob("predictions/eval/checkpoint-*[0-9].json")}
        )
    assert adapters[0] == adapters[1] and len(adapters[0]) == 3
    assert scores[0] == scores[1] and len(scores[0]) == 4
    assert predictions[0] == predictions[1] and predictions[0]
