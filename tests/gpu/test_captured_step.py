"""The CUDA-graph step on a GPU: it computes what its definition says, trains as TRL's step, or is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gpu_runs import assert_trained
from helpers import hw3, read_losses
from peft import PeftModel
from torch.nn import functional as F

from hw3.config.recipe import load_recipe
from hw3.cuda_graphs.training_step import NUM_METRICS, compute_bucket_lengths
from hw3.modeling.loading import load_base_model
from hw3.runs.checkpoints import find_complete_checkpoints
from hw3.training.graph_verification import cuda_graph_inputs
from hw3.training.plan import plan_run
from hw3.training.session import TrainingSession
from hw3.training.train import build_trainer, train
from hw3.training.trainer import CompletionTrainer

pytestmark = pytest.mark.gpu

FLOAT32 = ["model.dtype=float32", "training.bf16=false", "quantization=null"]


def build_trainer_with_random_adapters(
    recipe_file: Path, run: Path, device: torch.device, overrides: list[str]
) -> CompletionTrainer:
    """Build the trainer of a run whose step can be captured. Two or three replays compute a step's eight rows."""
    recipe = load_recipe(recipe_file, overrides)
    plan = plan_run(recipe, run, 1)
    buckets = compute_bucket_lengths([len(row) for row in plan.rows])
    strategy = replace(
        plan.strategy, cuda_graphs=True, dequantized=False, bucket_lengths=buckets, tokens_per_replay=4 * buckets[-1]
    )
    model = load_base_model(recipe, device)
    trainer = build_trainer(recipe, plan.config, strategy, model, plan.tokenizer, plan.rows)
    torch.manual_seed(1)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.02)
    return trainer


def compute_loss_and_grad_by_definition(
    model: PeftModel, rows: list[dict[str, list[int]]], device: torch.device
) -> tuple[float, torch.Tensor]:
    """Return the mean cross-entropy of all output tokens, from complete logits row by row, and its gradient."""
    total = torch.zeros((), device=device)
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]], device=device), use_cache=False).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:], device=device)
        total = total + F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")
    loss = total / sum(label != -100 for row in rows for label in row["labels"])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, parameters)
    return loss.item(), torch.cat([gradient.flatten() for gradient in gradients])


def compute_loss_and_grad_by_replay(
    trainer: CompletionTrainer, rows: list[dict[str, list[int]]], device: torch.device
) -> tuple[float, torch.Tensor]:
    """Return the loss of an optimizer step by the captured graphs, and its gradient."""
    step = trainer.cuda_graph_step
    assert step is not None
    batch = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in trainer.data_collator(rows).items()
    }
    output_tokens = sum(label != -100 for row in rows for label in row["labels"])
    step.start_step()
    step.accumulate(**cuda_graph_inputs(batch), tokens=torch.tensor(output_tokens, device=device))
    gradients = [parameter.grad for parameter in trainer.model.parameters() if parameter.requires_grad]
    return step.buffer[-NUM_METRICS].item(), torch.cat([gradient.flatten() for gradient in gradients])


def test_captured_step_computes_loss_and_gradient_of_the_definition(
    shape_recipe: Path, device: torch.device, tmp_path: Path
) -> None:
    """In float32, so that rounding is far below any mistake; every step of the first epoch is replayed."""
    trainer = build_trainer_with_random_adapters(shape_recipe, tmp_path / "run", device, FLOAT32)
    assert isinstance(trainer.model, PeftModel)
    steps = [[trainer.train_dataset[row] for row in step] for step in trainer.sampler.steps_in_epoch(0)]
    expected = [compute_loss_and_grad_by_definition(trainer.model, rows, device) for rows in steps]
    assert trainer.capture() is None
    assert len(steps) == 5
    for rows, (expected_loss, expected_gradient) in zip(steps, expected, strict=True):
        loss, gradient = compute_loss_and_grad_by_replay(trainer, rows, device)
        assert loss == pytest.approx(expected_loss, rel=1e-4)
        assert (gradient - expected_gradient).norm() < 1e-3 * expected_gradient.norm()


def test_captured_run_has_the_losses_of_trls_own_step(shape_recipe: Path, tmp_path: Path) -> None:
    """QLoRA in bfloat16: both see the same rows in the same steps, and the losses differ by rounding."""
    for speed in ("auto", "plain"):
        hw3("train", shape_recipe, "--run", tmp_path / speed, f"speed={speed}")
    assert_trained(tmp_path / "auto", cuda_graphs=True, dequantized=True)
    assert_trained(tmp_path / "plain", cuda_graphs=False, dequantized=False)
    auto, plain = read_losses(tmp_path / "auto"), read_losses(tmp_path / "plain")
    assert list(auto) == list(plain) == list(range(1, 13))
    for step, (loss, tokens) in auto.items():
        assert (loss, tokens) == (pytest.approx(plain[step][0], rel=0.02), plain[step][1]), step


def test_verification_refuses_a_step_that_leaves_out_a_part_of_the_model(
    mini_gpu_recipe: Path, device: torch.device, tmp_path: Path
) -> None:
    """The fused layers replace PEFT's, so a hook on one of those takes part in TRL's step only."""
    trainer = build_trainer_with_random_adapters(mini_gpu_recipe, tmp_path / "run", device, [])
    layer = trainer.model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    hook = layer.register_forward_hook(lambda module, inputs, output: -3 * output)
    failure = trainer.capture()
    hook.remove()
    assert failure is not None and failure.startswith(("has a loss of", "has a gradient in the first step"))
    assert trainer.cuda_graph_step is None


def test_verification_accepts_the_same_step_with_the_complete_model(
    mini_gpu_recipe: Path, device: torch.device, tmp_path: Path
) -> None:
    trainer = build_trainer_with_random_adapters(mini_gpu_recipe, tmp_path / "run", device, [])
    assert trainer.capture() is None
    assert trainer.cuda_graph_step is not None


def test_runs_of_one_session_reuse_the_captured_step_and_are_bitwise_runs_of_their_own(
    mini_gpu_recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "hw3")
    session = TrainingSession()
    for number, seed in enumerate((1, 2)):
        recipe = load_recipe(mini_gpu_recipe, [f"training.seed={seed}"])
        assert train(recipe, tmp_path / f"session-{number}", session=session) == 0
    assert caplog.text.count("captured in") == caplog.text.count("reused the captured step") == 1
    hw3("train", mini_gpu_recipe, "--run", tmp_path / "alone", "training.seed=2")
    one, other = (find_complete_checkpoints(tmp_path / name)[-1].path for name in ("session-1", "alone"))
    assert (one / "adapter_model.safetensors").read_bytes() == (other / "adapter_model.safetensors").read_bytes()
