"""The trainer on a small Gemma-2: its adapters, its loss compared with TRL's, and non-finite losses."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl.trainer.utils
from datasets import Dataset
from transformers import Gemma2ForCausalLM, PreTrainedModel
from trl import SFTConfig, SFTTrainer

from hw3.config.recipe import load_recipe
from hw3.data.rows import read_rows
from hw3.data.tokenization import Encoder, count_tokens
from hw3.modeling.loading import load_base_model, load_model_config, load_tokenizer
from hw3.runs.checkpoints import find_complete_checkpoints
from hw3.training.batch_layout import divide_batch
from hw3.training.cuda_graph_support import NUM_METRICS
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


def test_trainer_trains_tokens_of_tied_embeddings(mini_recipe: Path, tmp_path: Path) -> None:
    """Gradients reach the tokens' embeddings from the input and from TRL's fused output head."""
    overrides = ["lora.trainable_token_indices=[5, 9]", "lora.lora_dropout=0.0", "quantization=null"]
    trainer = make_trainer(mini_recipe, tmp_path / "run", *overrides)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    (delta,) = (p for name, p in trainer.model.named_parameters() if "trainable_tokens_delta" in name)
    trainer.compute_loss(trainer.model, dict(batch)).backward()
    fused = delta.grad
    delta.grad = None
    trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])[
        "loss"
    ].backward()
    assert fused.any(dim=1).all() and torch.allclose(delta.grad, fused, rtol=1e-4, atol=1e-6)


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


@pytest.fixture
def graph_trainer(mini_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CompletionTrainer:
    """A trainer with the gradients of a CUDA-graph step, 3 and 4, in front of the step's metrics."""
    trainer = make_trainer(mini_recipe, tmp_path / "run", "quantization=null")
    buffer = torch.tensor([3.0, 4.0, *[100.0] * NUM_METRICS])
    monkeypatch.setattr(trainer, "cuda_graph_step", SimpleNamespace(buffer=buffer))
    monkeypatch.setattr(
        trainer,
        "_check_finite_later",
        lambda value, name: trainer._check_finite(trainer.state.global_step, name, value),
    )
    return trainer


def test_clip_grad_norm_clips_the_buffer_of_the_cuda_graph_step(graph_trainer: CompletionTrainer) -> None:
    """The gradients are scaled to the recipe's `max_grad_norm`, 0.3; the metrics behind them are not changed."""
    assert graph_trainer._clip_grad_norm(graph_trainer.model).item() == 5
    gradients, metrics = graph_trainer.cuda_graph_step.buffer.split([2, NUM_METRICS])
    assert gradients.tolist() == pytest.approx([0.18, 0.24], rel=1e-4) and metrics.tolist() == [100.0] * NUM_METRICS
    graph_trainer._clip_grad_norm(graph_trainer.model)
    assert gradients.tolist() == pytest.approx([0.18, 0.24], rel=1e-4)
    gradients[0] = float("nan")
    with pytest.raises(NonFiniteLossError, match="the gradient norm of step 1 is nan"):
        graph_trainer._clip_grad_norm(graph_trainer.model)


def test_token_count_of_the_cuda_graph_step_equals_the_trainers(graph_trainer: CompletionTrainer) -> None:
    """It is computed without the batch's tensors, which would have to be copied from the GPU."""
    rows = [graph_trainer.train_dataset[row] for row in graph_trainer.sampler.rows_at_step(0)]
    graph_trainer._track_num_input_tokens({})
    counted = graph_trainer.state.num_input_tokens_seen
    assert counted == sum(len(row["input_ids"]) for row in rows)
    graph_trainer.cuda_graph_step = None
    graph_trainer._track_num_input_tokens(graph_trainer.data_collator(rows))
    assert graph_trainer.state.num_input_tokens_seen == 2 * counted


def test_optimizer_state_of_the_cuda_graph_step_is_written_when_the_checkpoint_is_completed(
    graph_trainer: CompletionTrainer, tmp_path: Path
) -> None:
    graph_trainer.create_optimizer_and_scheduler(1)
    checkpoint = tmp_path / "run/checkpoint-0"
    checkpoint.mkdir(parents=True)
    graph_trainer._save_optimizer_and_scheduler(str(checkpoint))
    assert [file.name for file in checkpoint.iterdir()] == ["scheduler.pt"]
    graph_trainer.checkpoints.on_save(graph_trainer.args, graph_trainer.state, graph_trainer.control)
    graph_trainer.checkpoints.wait()
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert saved == graph_trainer.optimizer.state_dict()


def test_optimizer_state_of_another_adamw_is_converted_when_it_is_loaded(mini_recipe: Path, tmp_path: Path) -> None:
    """PyTorch's state is loaded under the names of bitsandbytes' optimizer."""
    from bitsandbytes.optim import AdamW

    trainer = make_trainer(mini_recipe, tmp_path / "run", "quantization=null")
    trainer.create_optimizer_and_scheduler(1)
    parameters = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    trainer.optimizer.step()
    trainer._save_optimizer_and_scheduler(str(tmp_path))
    first_moment = trainer.optimizer.state[parameters[0]]["exp_avg"]
    trainer.optimizer = AdamW(
        [{"params": group["params"]} for group in trainer.optimizer.param_groups], lr=0.1, optim_bits=32
    )
    trainer._load_optimizer_and_scheduler(str(tmp_path))
    loaded = trainer.optimizer.state[parameters[0]]
    assert torch.equal(loaded["state1"], first_moment) and loaded["step"] == 1


def test_autocast_is_on_under_fsdp(mini_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(mini_recipe, tmp_path / "run", "training.bf16=true")
    monkeypatch.setattr("hw3.training.trainer.sharding_from_env", lambda: "FSDP")
    with trainer.autocast_smart_context_manager():
        assert torch.is_autocast_enabled("cpu") and not torch.is_autocast_cache_enabled()


def test_floating_point_ops_counts_parameters_once(
    mini_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(mini_recipe, tmp_path / "run", "quantization=null")
    batch = trainer.data_collator([trainer.train_dataset[0]])
    expected, counts, num_parameters = SFTTrainer.floating_point_ops(trainer, batch), [], PreTrainedModel.num_parameters
    monkeypatch.setattr(
        PreTrainedModel, "num_parameters", lambda self, **options: counts.append(1) or num_parameters(self, **options)
    )
    assert [trainer.floating_point_ops(batch) for _ in range(2)] == [expected] * 2 and len(counts) == 1


def test_train_waits_for_the_last_checkpoint(
    mini_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the last checkpoint is raised, although no step follows."""

    def fail(checkpoint: Path, step: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hw3.training.callbacks.mark_complete", fail)
    trainer = make_trainer(mini_recipe, tmp_path / "run", "training.max_steps=1")
    with pytest.raises(OSError, match="No space left"):
        trainer.train()


def test_checkpoint_has_no_tokenizer_pickled_arguments_and_model_card(mini_recipe: Path, tmp_path: Path) -> None:
    """Neither has the run folder a model card."""
    make_trainer(mini_recipe, tmp_path / "run", "training.max_steps=1").train()
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["checkpoint-1"]
    assert {file.name for file in (tmp_path / "run/checkpoint-1").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "COMPLETE.json",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "trainer_accumulators.json",
        "trainer_state.json",
    }
