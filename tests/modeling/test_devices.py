"""The dtype that `auto` chooses on a machine, and GPUs that are refused."""

from pathlib import Path

import pytest
from helpers import REPOSITORY

from hw3.common.errors import UserError
from hw3.config.recipe import Recipe, load_recipe
from hw3.modeling.devices import find_device_problems, find_missing_gpu, resolve_dtype, visible_gpus
from hw3.runs.open_run import open_run
from hw3.runs.run import Run
from hw3.training.plan import resolve_run_dtype
from hw3.training.train import train

GEMMA = REPOSITORY / "recipes/gemma/qlora.yaml"


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int]) -> None:
    """Let PyTorch report a GPU."""
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: name)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: capability >= (8, 0))


def dtypes_of(recipe: Recipe) -> tuple[str, str, bool]:
    """Return the dtypes of the weights and of 4-bit products, and whether autocast uses bfloat16."""
    return recipe.model.dtype, recipe.quantization.bnb_4bit_compute_dtype, recipe.training["bf16"]


@pytest.mark.parametrize(
    ("name", "capability", "expected"),
    [
        ("Tesla T4", (7, 5), ("float16", "float16", False)),
        ("NVIDIA GeForce RTX 3070", (8, 6), ("bfloat16", "bfloat16", True)),
        ("NVIDIA GeForce RTX 4090", (8, 9), ("bfloat16", "bfloat16", True)),
    ],
)
def test_auto_takes_bfloat16_where_the_gpu_has_it_and_float16_elsewhere(
    monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], expected: tuple[str, str, bool]
) -> None:
    pretend_gpu(monkeypatch, name, capability)
    recipe = load_recipe(GEMMA, ["model.dtype=auto"])
    assert find_device_problems(recipe, 1) == []
    resolved = resolve_dtype(recipe)
    assert dtypes_of(resolved) == expected
    assert find_device_problems(resolved, 1) == [] and resolve_dtype(resolved) is resolved


def test_auto_takes_float32_on_the_cpu() -> None:
    recipe = resolve_dtype(load_recipe(GEMMA, ["model.dtype=auto", "training.use_cpu=true", "training.fp16=false"]))
    assert dtypes_of(recipe) == ("float32", "float32", False) and recipe.training["fp16"] is False
    assert find_device_problems(recipe, 1) == []


def test_auto_takes_the_dtype_of_a_run_that_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, "NVIDIA L4", (8, 9))
    recipe = load_recipe(GEMMA, ["model.dtype=auto"])
    saved = resolve_dtype(load_recipe(GEMMA, ["model.dtype=auto", "training.use_cpu=true"]))
    assert dtypes_of(resolve_dtype(recipe, saved)) == ("float32", "float32", False)


def test_message_for_a_t4_names_the_one_setting_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, "Tesla T4", (7, 5))
    (problem,) = find_device_problems(load_recipe(GEMMA), 1)
    assert problem.startswith("Tesla T4 does not support bfloat16; ") and problem.endswith(': SET="model.dtype=auto"')


@pytest.mark.parametrize(("name", "capability"), [("Tesla P100-PCIE-16GB", (6, 0)), ("Tesla V100-SXM2-16GB", (7, 0))])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_pascal_and_volta_are_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], dtype: str
) -> None:
    pretend_gpu(monkeypatch, name, capability)
    (problem,) = find_device_problems(load_recipe(GEMMA, [f"model.dtype={dtype}"]), 1)
    assert problem.startswith(f"{name} has compute capability {capability[0]}.0; PyTorch 2.11 and newer have no")
    assert find_device_problems(load_recipe(GEMMA, ["model.dtype=auto", "training.use_cpu=true"]), 1) == []


@pytest.mark.parametrize(
    "overrides", [[], ["training.bf16=false"], ["training.bf16=false", "training.fp16=true"]], ids=str
)
def test_float16_refuses_autocast_and_another_compute_dtype(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    pretend_gpu(monkeypatch, "NVIDIA L4", (8, 9))
    recipe = load_recipe(GEMMA, ["model.dtype=float16", *overrides])
    (problem,) = find_device_problems(recipe, 1)
    assert problem.startswith("model.dtype: found float16, which needs float16 as quantization.bnb_4bit_compute_dtype")
    fitting = ["model.dtype=float16", "training.bf16=false", "quantization.bnb_4bit_compute_dtype=float16"]
    assert find_device_problems(load_recipe(GEMMA, fitting), 1) == []


def test_a_run_records_the_dtype_and_keeps_it(
    mini_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = load_recipe(mini_recipe, ["model.dtype=auto"]), tmp_path / "run"
    assert train(recipe, run) == 0
    assert load_recipe(run / "recipe.yaml").model.dtype == "float32"
    pretend_gpu(monkeypatch, "NVIDIA L4", (8, 9))
    on_gpu = load_recipe(mini_recipe, ["model.dtype=auto", "training.use_cpu=false"])
    assert (resolve_run_dtype(on_gpu, run).model.dtype, resolve_dtype(on_gpu).model.dtype) == ("float32", "bfloat16")


def test_apples_gpu_is_refused_with_the_settings_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    message = find_missing_gpu(load_recipe(GEMMA))
    assert (
        message is not None and " GPU that PyTorch can use (Apple's are not supported); to train on the CPU" in message
    )
    assert find_missing_gpu(load_recipe(REPOSITORY / "recipes/tiny/qlora.yaml")) is None


def test_scoring_on_a_gpu_that_is_too_old_is_refused(scored_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, "Tesla P100-PCIE-16GB", (6, 0))
    run = Run(scored_run)
    recipe = load_recipe(run.recipe_path, ["training.use_cpu=false"])
    with pytest.raises(UserError, match="Tesla P100-PCIE-16GB has compute capability"):
        open_run(run, recipe)


@pytest.mark.parametrize(
    ("variable", "count", "gpus"),
    [
        (None, 2, ["0", "1"]),
        ("", 0, []),
        ("3, 1", 2, ["3", "1"]),
        ("GPU-5ebe9f43,GPU-a2f1c9b0", 2, ["GPU-5ebe9f43", "GPU-a2f1c9b0"]),
        ("2,-1,3", 1, ["2"]),
        ("7", 0, []),
    ],
)
def test_visible_gpus_are_named_as_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, count: int, gpus: list[str]
) -> None:
    """CUDA ignores what follows the first name that is not a GPU's."""
    if variable is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    assert visible_gpus() == gpus
