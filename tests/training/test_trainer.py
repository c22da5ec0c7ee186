"""The trainer on a small Gemma-2: its adapters, its loss compared with TRL's, and non-finite losses."""

from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.utils
from datasets import Dataset
from transformers import Gemma2ForCausalLM
from trl import SFTConfig, SFTTrainer

from hw3.config.recipe import load_recipe
from hw3.data.rows import read_rows
from hw3.data.tokenization import Encoder, count_tokens
from hw3.modeling.loading import load_base_model, load_model_config, load_tokenizer
from hw3.runs.checkpoints import find_complete_checkpoints
from hw3.training.batch_layout import divide_batch
from hw3.training.sft_arguments import build_sft_config
from hw3.training.step_strategy import Workload, choose_step_strategy
from hw3.training.train import build_trainer, train
from hw3.training.trainer import CompletionTrainer, NonFiniteLossError


def make_trainer(recipe_path: Path, folder: Path, *overrides: str) -> CompletionTrainer:
    recipe = load_recipe(recipe_path, list(overrides))
    tokenizer = load_tokenizer(recipe.model)
    encoder = Encoder(tokenizer, recipe.prompt)
    rows = [encoder.encode(row) for row in read_rows(Path(recipe.data.train))]
    cpu = torch.device("cpu")
    workload = Workload(recipe, divide_batch(recipe, 1), load_model_config(recipe.model), 0, count_tokens(rows))
    strategy = choose_step_strategy(workload, cpu, None)
    config = build_sft_config(recipe, strategy, folder)
    return build_trainer(recipe, config, strategy, load_base_model(recipe, cpu), tokenizer, rows)


def test_trainer_makes_adapters_float32_and_4bit_layers_safe_on_a_cpu(mini_recipe: Path, tmp_path: Path) -> None:
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


def test_evaluation_mode_between_steps_does_not_change_gradients(mini_recipe: Path, tmp_path: Path) -> None:
    """On some CPUs bitsandbytes repacks 4-bit weights in evaluation mode, and computes wrong gradients afterwards."""
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


def test_compute_loss_equals_trls_loss_and_mean_cross_entropy(
    mini_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head on output positions gives the loss of TRL's head on all positions."""
    trainer = make_trainer(mini_recipe, tmp_path / "run", "quantization=null", "lora.lora_dropout=0.0")
    rows = [trainer.train_dataset[index] for index in range(8)]
    batch = trainer.data_collator(rows)
    ours = trainer.compute_loss(trainer.model, dict(batch)).item()
    monkeypatch.setattr("trl.trainer.utils._use_triton", lambda device: False)
    trls = trainer.compute_loss(trainer.model, dict(batch)).item()
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    plain = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:]).item()
    assert ours == pytest.approx(trls, abs=1e-6) and ours == pytest.approx(plain, abs=1e-5)


def test_compute_loss_runs_the_head_on_output_positions_only(
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


def test_first_loss_equals_that_of_an_unmodified_sft_trainer(
    mini_recipe: Path, mini_base: Path, tmp_path: Path
) -> None:
    """TRL's own `SFTTrainer` logs the same loss for the rows of the first step."""
    overrides = ["quantization=null", "training.logging_steps=1", "training.max_steps=4"]
    train(load_recipe(mini_recipe, overrides), tmp_path / "ours")
    (checkpoint,) = find_complete_checkpoints(tmp_path / "ours")
    ours = checkpoint.trainer_state()["log_history"]
    trainer = make_trainer(mini_recipe, tmp_path / "rows", "quantization=null")
    first = trainer.sampler.steps_in_epoch(0)[0]
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


def test_non_finite_loss_stops_training_and_names_step_and_rows(mini_recipe: Path, tmp_path: Path) -> None:
    trainer = make_trainer(mini_recipe, tmp_path / "run", "quantization=null")
    rows = [trainer.row_ids[row] for row in trainer.sampler.rows_at_step(0)]
    with torch.no_grad():
        next(p for p in trainer.model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match="the loss of step 1 is nan; its rows: " + ", ".join(rows)):
        trainer.train()
