"""Fixtures of the GPU tests: random base models of the recipes' shapes with two layers, recipes, and a scored run."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gpu_runs import write_gpu_recipe, write_shape_base
from helpers import hw3


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest test, so that other processes do not wait for it in the end."""
    items.sort(key=lambda item: item.path.name != "test_resumed_run.py")


@pytest.fixture(scope="session", autouse=True)
def device() -> torch.device:
    """The GPU; without one, every test of this folder is skipped."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: HW3_TEST_GPU=0")
    return torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def free_memory() -> Iterator[None]:
    """Free a test's GPU memory and compiled layers at its end."""
    yield
    torch._dynamo.reset()  # compiled layers refer to the model
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="module", params=["gemma", "llama", "qwen"])
def shape_recipe(
    request: pytest.FixtureRequest, device: torch.device, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A recipe file: QLoRA in bfloat16 on a base of a recipe's shape. Tests run with three architectures."""
    folder = tmp_path_factory.mktemp(request.param)
    return write_gpu_recipe(folder, write_shape_base(folder / "base", request.param, device))


@pytest.fixture(scope="session")
def gemma_recipe(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file: QLoRA in bfloat16 on a base of Gemma-2-2B's shape."""
    folder = tmp_path_factory.mktemp("gemma")
    return write_gpu_recipe(folder, write_shape_base(folder / "base", "gemma", device))


@pytest.fixture(scope="session")
def mini_gpu_recipe(mini_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file: QLoRA in bfloat16 on the mini base model."""
    return write_gpu_recipe(tmp_path_factory.mktemp("mini-gpu"), mini_base)


@pytest.fixture(scope="session")
def finished_gpu_run(gemma_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scored run of `gemma_recipe` with three checkpoints. All tests share it: change only copies."""
    run = tmp_path_factory.mktemp("finished") / "run"
    hw3("train", gemma_recipe, "--run", run)
    hw3("eval", run)
    return run
