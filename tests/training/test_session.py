"""Several runs in one process: each is bitwise the run of a process of its own, and leaves the base model as it was."""

import gc
from pathlib import Path

import pytest
import torch

from hw3.config.recipe import load_recipe
from hw3.modeling.loading import load_base_model
from hw3.runs.checkpoints import find_complete_checkpoints
from hw3.training.plan import PlanCache, plan_run
from hw3.training.session import ModuleSnapshot, TrainingSession, _step_key
from hw3.training.train import train

# Each changes something else in the base model: layers, hooks, gradients, or nothing in its structure.
SETTINGS = (
    ["training.learning_rate=0.003", "lora.r=2", "training.max_steps=2"],
    ["lora.use_dora=true", "lora.lora_dropout=0.0", "training.max_steps=2"],
    ["training.activation_checkpointing=true", "training.seed=3", "training.max_steps=2"],
    ["training.max_steps=2"],
)


def read_adapter(run_dir: Path) -> bytes:
    return (find_complete_checkpoints(run_dir)[-1].path / "adapter_model.safetensors").read_bytes()


def read_tokenizer(run_dir: Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in (run_dir / "tokenizer").iterdir()}
    assert "tokenizer.json" in files
    return files


@pytest.mark.parametrize(
    "quantization",
    [pytest.param([], id="nf4"), pytest.param(["quantization=null"], id="float32", marks=pytest.mark.slow)],
)
def test_runs_of_one_session_are_bitwise_runs_of_their_own(
    mini_recipe: Path, tmp_path: Path, quantization: list[str]
) -> None:
    session = TrainingSession()
    bases = set()
    for number, overrides in enumerate(SETTINGS):
        recipe = load_recipe(mini_recipe, [*quantization, *overrides])
        assert train(recipe, tmp_path / f"session-{number}", session=session) == 0
        assert (gc.get_freeze_count() > 0) == (number > 0)
        assert train(recipe, tmp_path / f"alone-{number}") == 0
        assert read_adapter(tmp_path / f"session-{number}") == read_adapter(tmp_path / f"alone-{number}")
        assert read_tokenizer(tmp_path / f"session-{number}") == read_tokenizer(tmp_path / f"alone-{number}")
        bases.add(id(session._base))
    assert len(bases) == 1 and session._base is not None
    session.discard()
    assert not gc.get_freeze_count()


def test_base_is_loaded_again_after_a_run_that_changes_it(mini_recipe: Path, tmp_path: Path) -> None:
    session = TrainingSession()
    settings = (["lora.modules_to_save=[embed_tokens]"], ["lora=null", "quantization=null"], [])
    for number, overrides in enumerate(settings):
        recipe = load_recipe(mini_recipe, [*overrides, "training.max_steps=2", "training.save_steps=2"])
        assert train(recipe, tmp_path / f"run-{number}", session=session) == 0
        assert (session._base is None) == (number < 2)
    assert train(recipe, tmp_path / "alone") == 0
    assert read_adapter(tmp_path / "run-2") == read_adapter(tmp_path / "alone")


@pytest.mark.parametrize(
    ("override", "is_reused"),
    [
        ("training.learning_rate=0.5", True),
        ("training.seed=7", True),
        ("lora.lora_alpha=16", False),
        ("lora.lora_dropout=0.2", False),
        ("training.per_device_train_batch_size=4", False),
        ("training.tf32=false", False),
        ("quantization=null", False),
    ],
)
def test_captured_step_is_kept_for_runs_with_the_same_constants(
    mini_recipe: Path, tmp_path: Path, override: str, is_reused: bool
) -> None:
    plans = [plan_run(load_recipe(mini_recipe, overrides), tmp_path / "run", 1) for overrides in ([], [override])]
    assert (_step_key(plans[0]) == _step_key(plans[1])) == is_reused


def test_session_continues_after_a_run_that_failed(mini_recipe: Path, tmp_path: Path) -> None:
    session = TrainingSession()
    with pytest.raises(Exception, match="loss"):
        train(load_recipe(mini_recipe, ["training.learning_rate=1e30"]), tmp_path / "failed", session=session)
    recipe = load_recipe(mini_recipe, ["training.max_steps=2"])
    assert train(recipe, tmp_path / "next", session=session) == 0
    assert train(recipe, tmp_path / "alone") == 0
    assert read_adapter(tmp_path / "next") == read_adapter(tmp_path / "alone")


def test_snapshot_restores_modules_hooks_configuration_and_gradients(mini_recipe: Path) -> None:
    recipe = load_recipe(mini_recipe, ["quantization=null"])
    model = load_base_model(recipe, torch.device("cpu"))
    layer = model.base_model.get_submodule("layers.0")
    before = layer.mlp, type(layer), model.config.eos_token_id
    snapshot = ModuleSnapshot(model)
    layer.mlp = torch.nn.Identity()
    layer.__class__ = type("Other", (type(layer),), {})
    layer.register_forward_hook(lambda *arguments: None)
    layer.forward = lambda x: x
    model.config.eos_token_id = 77
    model.requires_grad_(False)
    model.eval()
    snapshot.restore()
    assert (layer.mlp, type(layer), model.config.eos_token_id) == before
    assert not layer._forward_hooks and "forward" not in layer.__dict__
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_plan_cache_computes_again_only_for_another_key() -> None:
    cache, calls = PlanCache(), []
    for key in ("a", "a", "b"):
        assert cache.get(lambda key=key: calls.append(key) or key, ("name", key)) == key
    assert calls == ["a", "b"]
