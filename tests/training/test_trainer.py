"""The real trainer on a small Gemma-2: equalities between layouts, and between a straight and a resumed run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.utils
from datasets import Dataset
from safetensors.torch import load_file
from transformers import Gemma2ForCausalLM
from trl import SFTConfig, SFTTrainer

from hw3.config.recipe import load_recipe
from hw3.data.rows import read_rows
from hw3.data.tokenization import Encoder
from hw3.modeling.loading import load_base, load_config, load_tokenizer
from hw3.runs.checkpoints import complete_checkpoints, mark_complete
from hw3.training.batch_layout import step_layout
from hw3.training.sft_arguments import sft_config
from hw3.training.step_strategy import choose_speed
from hw3.training.train import train
from hw3.training.trainer import CompletionTrainer, NonFiniteLoss


def run(recipe_path: Path, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """Train in this process; returns the log lines of the last checkpoint."""
    assert train(load_recipe(recipe_path, list(overrides)), folder) == 0
    return logs(folder)


def logs(folder: Path) -> list[dict[str, Any]]:
    state = json.loads((complete_checkpoints(folder)[-1].path / "trainer_state.json").read_text())
    return [log for log in state["log_history"] if "loss" in log]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(complete_checkpoints(folder)[-1].path / "adapter_model.safetensors")


def test_layouts_of_a_step_agree(mini_recipe: Path, tmp_path: Path) -> None:
    """1 x 8, 2 x 4 and 8 x 1 rows: losses to 1e-5, weights to 1e-6."""
    results = {}
    for rows in (1, 2, 8):
        layout = [
            f"training.per_device_train_batch_size={rows}",
            f"training.gradient_accumulation_steps={8 // rows}",
            "lora.lora_dropout=0.0",
            "training.logging_steps=1",
            "training.learning_rate=0.001",
        ]
        results[rows] = (run(mini_recipe, tmp_path / f"run-{rows}", *layout), adapter(tmp_path / f"run-{rows}"))
    losses, weights = results[8]
    assert len(losses) == 12
    assert all(tensor.any() for tensor in weights.values())
    for rows in (1, 2):
        other_losses, other_weights = results[rows]
        for log, other in zip(losses, other_losses, strict=True):
            assert other["loss"] == pytest.approx(log["loss"], abs=1e-5)
            assert other["num_tokens"] == log["num_tokens"]
        for name, tensor in weights.items():
            assert torch.allclose(other_weights[name], tensor, rtol=0, atol=1e-6), name


@pytest.mark.parametrize("base", ["nf4", "float32"])
def test_resumed_equals_straight_bit_for_bit(mini_recipe: Path, tmp_path: Path, base: str) -> None:
    """Stopped at a step between two log lines: adapter, optimizer, generators, losses and token counts."""
    options = [] if base == "nf4" else ["quantization=null"]
    straight = run(mini_recipe, tmp_path / "straight", *options)
    run(mini_recipe, tmp_path / "resumed", *options, "training.max_steps=8")
    resumed = run(mini_recipe, tmp_path / "resumed", *options)
    timeless = without_times(straight)
    assert [log["step"] for log in timeless] == [3, 6, 9, 12]
    assert without_times(resumed) == timeless
    last, other = (complete_checkpoints(tmp_path / name)[-1].path for name in ("straight", "resumed"))
    for name in ("adapter_model.safetensors",):
        assert (last / name).read_bytes() == (other / name).read_bytes()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert_equal(*(torch.load(folder / name, weights_only=False) for folder in (last, other)))


def without_times(logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: log[key] for key in log if "second" not in key and "runtime" not in key} for log in logs]


def assert_equal(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_equal(left, right)
    else:
        assert (one == other) is True or (one == other).all()


def make_trainer(recipe_path: Path, folder: Path, *overrides: str) -> CompletionTrainer:
    recipe = load_recipe(recipe_path, list(overrides))
    layout = step_layout(recipe, 1)
    tokenizer = load_tokenizer(recipe.model)
    encoder = Encoder(tokenizer, recipe.prompt)
    rows = [encoder.encode(row) for row in read_rows(Path(recipe.data.train))]
    cpu = torch.device("cpu")
    base = load_base(recipe, cpu)
    lengths = [(len(row), len(row.output_ids)) for row in rows]
    speed = choose_speed(recipe, layout, load_config(recipe.model), 0, lengths, cpu, None)
    return CompletionTrainer(recipe, sft_config(recipe, speed, folder), speed, base, tokenizer, rows)


def test_adapters_are_float32_and_4_bit_layers_are_safe_on_cpu(mini_recipe: Path, tmp_path: Path) -> None:
    trainer = make_trainer(mini_recipe, tmp_path / "run")
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2 and all("lora_" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    layers = [
        module
        for module in trainer.model.modules()
        if type(module).__name__ == "Linear4bit" and hasattr(module, "compute_dtype")
    ]
    assert len(layers) == 14 and not any(getattr(layer, "support_avx512bf16_for_cpu", False) for layer in layers)


def test_scoring_between_steps_does_not_change_training(mini_recipe: Path, tmp_path: Path) -> None:
    """bitsandbytes repacks 4-bit weights in evaluation mode on some CPUs, and then trains on wrong gradients."""
    trainer = make_trainer(mini_recipe, tmp_path / "run", "lora.lora_dropout=0.0")
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])

    def gradient() -> list[torch.Tensor]:
        trainer.model.train()
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, dict(batch)).backward()
        return [p.grad.clone() for p in trainer.model.parameters() if p.requires_grad]

    before = gradient()
    trainer.model.eval()
    with torch.no_grad():
        trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert all(torch.equal(one, other) for one, other in zip(before, gradient(), strict=True))


def test_loss_is_trls_own(mini_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head on output positions only gives TRL's loss, and both are the mean cross-entropy of the outputs."""
    trainer = make_trainer(mini_recipe, tmp_path / "run", "quantization=null", "lora.lora_dropout=0.0")
    rows = [trainer.train_dataset[index] for index in range(8)]
    batch = trainer.data_collator(rows)
    ours = trainer.compute_loss(trainer.model, dict(batch)).item()
    monkeypatch.setattr("trl.trainer.utils._use_triton", lambda device: False)
    trls = trainer.compute_loss(trainer.model, dict(batch)).item()
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    plain = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:]).item()
    assert ours == pytest.approx(trls, abs=1e-6) and ours == pytest.approx(plain, abs=1e-5)


def test_the_head_runs_on_output_positions_only(
    mini_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(mini_recipe, tmp_path / "run")
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(8)])
    chunked, seen = trl.trainer.utils._ChunkedLogProbFunction, []

    class Watch:
        @staticmethod
        def apply(hidden: torch.Tensor, *rest: Any) -> Any:
            seen.append(len(hidden))
            return chunked.apply(hidden, *rest)

    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", Watch)
    trainer.compute_loss(trainer.model, dict(batch))
    assert seen == [int((batch["labels"] != -100).sum())]


def test_first_loss_equals_plain_trl(mini_recipe: Path, mini_base: Path, tmp_path: Path) -> None:
    """An SFTTrainer without any of ours, on the same rows of the first step, logs the same loss."""
    ours = run(mini_recipe, tmp_path / "ours", "quantization=null", "training.logging_steps=1", "training.max_steps=4")
    trainer = make_trainer(mini_recipe, tmp_path / "rows", "quantization=null")
    first = trainer.sampler.steps(0)[0]
    plain = SFTTrainer(
        model=Gemma2ForCausalLM.from_pretrained(mini_base, dtype=torch.float32, attn_implementation="eager"),
        args=SFTConfig(
            output_dir=str(tmp_path / "plain"),
            max_steps=1,
            per_device_train_batch_size=8,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            max_length=None,
            report_to="none",
            save_strategy="no",
            activation_checkpointing=False,
        ),
        train_dataset=Dataset.from_list([trainer.train_dataset[row] for row in first]),
        processing_class=load_tokenizer(load_recipe(mini_recipe).model),
    )
    plain.train()
    (loss,) = [log["loss"] for log in plain.state.log_history if "loss" in log]
    assert ours[0]["loss"] == pytest.approx(loss, abs=1e-5)


def test_non_finite_loss_stops_naming_step_and_rows(mini_recipe: Path, tmp_path: Path) -> None:
    trainer = make_trainer(mini_recipe, tmp_path / "run", "quantization=null")
    rows = [trainer.row_ids[row] for row in trainer.sampler.rows_of(0)]
    with torch.no_grad():
        next(p for p in trainer.model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(NonFiniteLoss, match="the loss of step 1 is nan; its rows: " + ", ".join(rows)):
        trainer.train()


@pytest.mark.parametrize("overrides", [["lora=null", "quantization=null"], ["training.bf16=false", "speed=lean"]])
def test_other_ways_of_training(mini_recipe: Path, tmp_path: Path, overrides: list[str]) -> None:
    losses = run(mini_recipe, tmp_path / "run", *overrides)
    assert losses[-1]["loss"] < losses[0]["loss"]


def test_a_checkpoint_that_cannot_be_completed_ends_the_run(
    mini_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is completed in a thread; what fails there is known at one of the next steps, and the one before stays."""

    def full(checkpoint: Path, step: int) -> None:
        if step == 2:
            raise OSError(28, "No space left on device")
        mark_complete(checkpoint, step)

    monkeypatch.setattr("hw3.training.callbacks.mark_complete", full)
    with pytest.raises(OSError, match="No space left"):
        train(load_recipe(mini_recipe, ["training.save_steps=1", "training.max_steps=40"]), tmp_path / "run")
    assert [checkpoint.step for checkpoint in complete_checkpoints(tmp_path / "run")] == [1]
    assert not (tmp_path / "run/checkpoint-4").exists()
