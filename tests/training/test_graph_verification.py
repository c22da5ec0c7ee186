"""Training with the CUDA-graph step, without its graphs on a CPU: it equals TRL's step, or it is not used."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda_graphs import EagerCudaGraphStep
from safetensors.torch import load_file

from hw3.config.recipe import load_recipe
from hw3.cuda_graphs.training_step import NUM_METRICS, compute_bucket_lengths
from hw3.runs.checkpoints import find_complete_checkpoints
from hw3.training import graph_verification
from hw3.training.session import TrainingSession
from hw3.training.step_strategy import StepStrategy, Workload, choose_step_strategy
from hw3.training.train import train
from hw3.training.trainer import CompletionTrainer, NonFiniteLossError

OVERRIDES = ["quantization=null", "lora.lora_dropout=0.0", "training.learning_rate=0.001", "training.logging_steps=1"]


@pytest.fixture(autouse=True)
def use_eager_cuda_graph_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `speed: auto` take the CUDA-graph step on a CPU, until it fails."""

    def choose(workload: Workload, *rest: Any) -> StepStrategy:
        failure = rest[2] if len(rest) > 2 else None
        if workload.recipe.speed == "plain" or failure:
            print(failure or "")
            return choose_step_strategy(workload, *rest)
        buckets = compute_bucket_lengths([tokens for tokens, _ in workload.lengths])
        merged = workload.layout.merge_micro_batches()
        return StepStrategy(merged, True, False, False, "adamw_torch", bucket_lengths=buckets, tokens_per_replay=1152)

    def check_immediately(trainer: CompletionTrainer, value: torch.Tensor, name: str) -> None:
        trainer._check_finite(trainer.state.global_step, name, value)

    monkeypatch.setattr("hw3.training.graph_verification.CudaGraphStep", EagerCudaGraphStep)
    monkeypatch.setattr("hw3.training.graph_verification._describe_memory_shortage", lambda strategy, device: None)
    monkeypatch.setattr("hw3.training.plan.choose_step_strategy", choose)
    monkeypatch.setattr(CompletionTrainer, "_check_finite_later", check_immediately)


def log_lines(run: Path) -> list[dict[str, Any]]:
    state = json.loads((find_complete_checkpoints(run)[-1].path / "trainer_state.json").read_text(encoding="utf-8"))
    return [log for log in state["log_history"] if "loss" in log]


def uses_cuda_graphs(run: Path) -> bool:
    return json.loads((run / "manifest.json").read_text(encoding="utf-8"))["speed"]["cuda_graphs"]


def test_cuda_graph_step_trains_as_trls_step_does(mini_recipe: Path, tmp_path: Path) -> None:
    """Merged micro-batches give the same log lines, token counts and weights, also if TRL's step resumes the run."""
    layout = ["training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=4"]
    plain = load_recipe(mini_recipe, [*OVERRIDES, *layout, "speed=plain"])
    train(plain, tmp_path / "plain")
    train(load_recipe(mini_recipe, [*OVERRIDES, *layout]), tmp_path / "cuda_graphs")
    train(load_recipe(mini_recipe, [*OVERRIDES, *layout, "training.max_steps=8"]), tmp_path / "resumed")
    train(plain, tmp_path / "resumed")
    assert uses_cuda_graphs(tmp_path / "cuda_graphs")
    for name in ("cuda_graphs", "resumed"):
        for one, other in zip(log_lines(tmp_path / name), log_lines(tmp_path / "plain"), strict=True):
            assert one["num_tokens"] == other["num_tokens"]
            assert one["num_input_tokens_seen"] == other["num_input_tokens_seen"]
            for key in ("loss", "grad_norm", "learning_rate"):
                assert one[key] == pytest.approx(other[key], rel=1e-4), key
        last, other = (find_complete_checkpoints(tmp_path / run)[-1].path for run in (name, "plain"))
        weights, others = (load_file(folder / "adapter_model.safetensors") for folder in (last, other))
        assert all(torch.allclose(weights[key], others[key], rtol=0, atol=1e-5) for key in others)
    last_line = log_lines(tmp_path / "cuda_graphs")[-1]
    assert 0 < last_line["entropy"] < 5 and 0 <= last_line["mean_token_accuracy"] <= 1


def test_cuda_graph_step_with_a_wrong_gradient_is_not_used(
    mini_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class WrongStep(EagerCudaGraphStep):
        def backward(self, hidden: torch.Tensor) -> None:
            super().backward(hidden)
            self.buffer[:-NUM_METRICS] *= 1.2

    monkeypatch.setattr("hw3.training.graph_verification.CudaGraphStep", WrongStep)
    train(load_recipe(mini_recipe, OVERRIDES), tmp_path / "run")
    shown = capsys.readouterr().out
    assert "the CUDA-graph step has a gradient in the first step that differs by 20.0% from TRL's" in shown
    assert not uses_cuda_graphs(tmp_path / "run")
    assert find_complete_checkpoints(tmp_path / "run")[-1].step == 12


NAN = float("nan")


@pytest.mark.parametrize(
    ("factors", "failure"),
    [
        ({"0.q": 1.8, "0.v": 1.8}, None),  # one layer of five
        ({"0.q": 2.2, "0.v": 2.2}, "53.7%"),
        ({f"{layer}.q": 1.3 for layer in range(5)}, "21.2%"),
        ({f"{layer}.v": 0.0 for layer in range(3)}, "54.8%"),
        ({"4.v": NAN}, "nan%"),
    ],
    ids=["one layer", "one layer by more", "a projection of all layers", "missing in most layers", "nan"],
)
def test_few_layers_may_differ_by_more_than_the_others(factors: dict[str, float], failure: str | None) -> None:
    """Rounding in bfloat16 changes the gradient of few layers; a wrong step has the same error in all layers."""
    expected = {f"layers.{layer}.{kind}": torch.ones(3) for layer in range(5) for kind in "qv"}
    found = {name: gradient * factors.get(name.removeprefix("layers."), 1.01) for name, gradient in expected.items()}
    problem = graph_verification._describe_difference((2.0, found), (2.0, expected), False, [])
    message = None if failure is None else f"has a gradient in the first step that differs by {failure} from TRL's"
    assert problem == message


def test_layers_of_one_type_are_not_few_layers() -> None:
    """Gemma's layers with a sliding window, and those without one, are compiled separately."""
    expected = {f"layers.{layer}.q": torch.ones(3) for layer in range(6)}
    found = {name: gradient * (1.8 if name == "layers.5.q" else 1.01) for name, gradient in expected.items()}
    one_type, two_types = ["sliding_attention"] * 6, [*["sliding_attention"] * 5, "full_attention"]
    assert graph_verification._describe_difference((2.0, found), (2.0, expected), False, one_type) is None
    assert graph_verification._describe_difference((2.0, found), (2.0, expected), False, two_types) == (
        "has a gradient in the first step that differs by 32.7% from TRL's"
    )


def test_step_with_a_non_finite_gradient_is_never_saved(mini_recipe: Path, tmp_path: Path) -> None:
    overrides = [*OVERRIDES, "training.learning_rate=1e30", "training.save_steps=1"]
    with pytest.raises(NonFiniteLossError, match="of step 2 is"):
        train(load_recipe(mini_recipe, overrides), tmp_path / "run")
    assert [checkpoint.step for checkpoint in find_complete_checkpoints(tmp_path / "run")] == [1]


SESSION_SETTINGS = (["training.learning_rate=0.003"], ["training.seed=7"], ["training.weight_decay=0.1"])


def test_step_is_compared_with_trls_once_in_a_session(
    mini_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs that reuse the step train as in a process of their own; TRL's step is computed for the first one only."""
    references = []
    reference = graph_verification._reference_loss_and_grad
    monkeypatch.setattr(
        graph_verification, "_reference_loss_and_grad", lambda *values: references.append(1) or reference(*values)
    )
    session = TrainingSession()
    recipes = [load_recipe(mini_recipe, [*OVERRIDES, "training.max_steps=2", *own]) for own in SESSION_SETTINGS]
    for number, recipe in enumerate(recipes):
        assert train(recipe, tmp_path / f"session-{number}", session=session) == 0
    assert len(references) == 1
    for number, recipe in enumerate(recipes):
        assert train(recipe, tmp_path / f"alone-{number}") == 0
        pair = [find_complete_checkpoints(tmp_path / f"{kind}-{number}")[-1] for kind in ("session", "alone")]
        assert uses_cuda_graphs(tmp_path / f"session-{number}")
        assert len({(one.path / "adapter_model.safetensors").read_bytes() for one in pair}) == 1


def test_step_that_still_trains_the_adapters_of_another_run_is_captured_again(
    mini_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "hw3")
    monkeypatch.setattr(EagerCudaGraphStep, "train_adapters", lambda step, model: None)
    session = TrainingSession()
    recipe = load_recipe(mini_recipe, [*OVERRIDES, "training.max_steps=2"])
    for number in range(2):
        assert train(recipe, tmp_path / f"run-{number}", session=session) == 0
    failure = (
        r"the CUDA-graph step has a (loss|gradient norm) of \S+ when it is reused, and \S+ before, so it is captured"
    )
    assert len(re.findall(failure, caplog.text)) == 1
    first, second = (find_complete_checkpoints(tmp_path / f"run-{number}")[-1] for number in range(2))
    assert uses_cuda_graphs(tmp_path / "run-1")
    assert (first.path / "adapter_model.safetensors").read_bytes() == (
        second.path / "adapter_model.safetensors"
    ).read_bytes()
