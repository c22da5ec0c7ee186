"""The CUDA-graph step without its graphs, on a CPU: output head, gradients, metrics, bucket lengths."""

from typing import Any

import pytest
import torch
import torch._inductor
from fake_cuda_graphs import EagerCudaGraphStep
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny_models import TRAINING_MODELS

import hw3.cuda_graphs.training_step
from hw3.cuda_graphs.output_head import INDUCTOR_OPTIONS, output_head_loss_and_grad
from hw3.cuda_graphs.training_step import (
    NUM_METRICS,
    TOKENS_PER_REPLAY,
    compute_bucket_lengths,
    compute_rows_per_replay,
    deterministic_kernels,
)
from hw3.data.collator import CompletionOnlyCollator
from hw3.data.tokenization import IGNORE_INDEX
from hw3.training.session import ModuleSnapshot


@pytest.mark.parametrize("cap", [None, 3.0])
def test_output_head_loss_and_grad_equals_autograd(cap: float | None) -> None:
    torch.manual_seed(0)
    states, weight = torch.randn(5, 8, dtype=torch.float64, requires_grad=True), torch.randn(11, 8).double()
    targets, tokens = torch.tensor([3, 10, -1, 0, 7]), torch.tensor(9)
    logits = (states @ weight.T).float()
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction="sum") / tokens
    (expected,) = torch.autograd.grad(loss, states)
    with torch.no_grad():
        sums, gradient = output_head_loss_and_grad(states, weight, targets, tokens, cap)
    counted = logits.detach()[targets >= 0]
    assert sums[0] == pytest.approx(loss.item(), rel=1e-6)
    assert sums[1] == pytest.approx(torch.distributions.Categorical(logits=counted).entropy().sum().item(), rel=1e-5)
    assert sums[2] == (counted.argmax(-1) == targets[targets >= 0]).sum()
    assert torch.allclose(gradient, expected, rtol=1e-5, atol=1e-7)
    assert not gradient[2].any()


def make_rows(count: int, max_length: int, seed: int) -> list[dict[str, list[int]]]:
    """Return random rows that end with EOS, id 1."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(2, max_length, (), generator=generator))
        ids = [*torch.randint(2, 50, (length - 1,), generator=generator).tolist(), 1]
        prompt_length = int(torch.randint(1, length, (), generator=generator))
        rows.append({"input_ids": ids, "labels": [IGNORE_INDEX] * prompt_length + ids[prompt_length:]})
    return rows


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("name", TRAINING_MODELS)
@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"q_proj": 7}},
        {"target_modules": ["q_proj", "embed_tokens"], "layers_to_transform": [1], "alpha_pattern": {"q_proj": 9}},
        {"target_modules": "all-linear", "use_dora": True},
    ],
    ids=["all linear layers", "ranks", "some layers and embeddings", "dora"],
)
def test_accumulate_equals_autograd(name: str, lora: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps with several replays, an incomplete last replay and several chunks of the head, one after the other."""
    for constant, value in (("HEAD_CHUNK_POSITIONS", 64), ("HEAD_PADDING_MULTIPLE", 16)):
        monkeypatch.setattr(hw3.cuda_graphs.training_step, constant, value)
    torch.manual_seed(0)
    model = get_peft_model(TRAINING_MODELS[name](), LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **lora))
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data += 0.2 * torch.randn_like(parameter)
    batches = [make_rows(11, max_length, seed) for seed, max_length in enumerate((40, 9, 16))]
    bucket_lengths = compute_bucket_lengths([len(row["input_ids"]) for rows in batches for row in rows])
    step = EagerCudaGraphStep(model, 11, bucket_lengths, 96)
    for rows in batches:
        batch = CompletionOnlyCollator(0, 1, bucket_lengths, return_output_positions=True)(rows)
        labels = batch.pop("labels")
        tokens = (labels != IGNORE_INDEX).sum()
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        expected = torch.autograd.grad(loss / tokens, trained)
        step.start_step()
        step.accumulate(**batch, tokens=tokens)
        assert step.buffer[-NUM_METRICS].item() == pytest.approx((loss / tokens).item(), rel=1e-5)
        for parameter, gradient in zip(trained, expected, strict=True):
            assert (parameter.grad - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7


@pytest.mark.parametrize(
    "lora",
    [{"target_modules": "all-linear"}, {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}],
    ids=["fused layers", "embeddings and dora"],
)
def test_captured_step_trains_the_adapters_of_another_run(lora: dict[str, Any]) -> None:
    """The base model is restored between both runs, as in a session."""
    base = TRAINING_MODELS["gemma2"]()
    snapshot = ModuleSnapshot(base)
    rows = make_rows(6, 16, seed=0)
    bucket_lengths = compute_bucket_lengths([len(row["input_ids"]) for row in rows])
    batch = CompletionOnlyCollator(0, 1, bucket_lengths, return_output_positions=True)(rows)
    tokens = (batch.pop("labels") != IGNORE_INDEX).sum()
    step, buffers = None, []
    for seed in (1, 2, 2):
        torch.manual_seed(seed)
        model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **lora)).train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.data += 0.2 * torch.randn_like(parameter)
        if len(buffers) == 2:  # the second run again, with a step of its own
            step = None
        if step is None:
            step = EagerCudaGraphStep(model, 6, bucket_lengths, 96)
        else:
            step.train_adapters(model)
        step.start_step()
        step.accumulate(**batch, tokens=tokens)
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained)
        buffers.append(step.buffer.clone())
        snapshot.restore()
    first, second, alone = buffers
    assert not torch.equal(first, second)
    assert torch.equal(second, alone)


@pytest.mark.parametrize("mode", ["default", "warn", "error"])
def test_deterministic_kernels_restores_the_settings(mode: str) -> None:
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(mode)
    try:
        with pytest.raises(KeyError), deterministic_kernels():
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            assert not torch.utils.deterministic.fill_uninitialized_memory
            raise KeyError
        assert torch.get_deterministic_debug_mode() == {"default": 0, "warn": 1, "error": 2}[mode]
        assert torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.set_deterministic_debug_mode(before)


def test_inductor_knows_the_options() -> None:
    assert set(INDUCTOR_OPTIONS) <= set(torch._inductor.list_options())


def test_compute_bucket_lengths_pads_long_rows_to_larger_multiples() -> None:
    assert compute_bucket_lengths([3, 16, 17, 100, 256, 257, 400]) == (16, 32, 112, 256, 320, 448)


def test_compute_rows_per_replay_divides_a_step_evenly() -> None:
    assert [compute_rows_per_replay(8, length, 1152) for length in (96, 144, 160, 512, 2000)] == [8, 8, 4, 2, 1]
    assert compute_rows_per_replay(64, 128, 1152) == 8
    assert compute_rows_per_replay(64, 112, 1152) == 10  # 7 replays, the last of 4 rows
    assert [compute_rows_per_replay(8, length, 768) for length in (96, 192, 400)] == [8, 4, 1]


@given(rows=st.integers(1, 64), length=st.integers(1, 3000), max_tokens=st.sampled_from(TOKENS_PER_REPLAY))
def test_compute_rows_per_replay_keeps_within_max_tokens(rows: int, length: int, max_tokens: int) -> None:
    part = compute_rows_per_replay(rows, length, max_tokens)
    assert 1 <= part <= rows
    assert part == 1 or part * length <= max_tokens
