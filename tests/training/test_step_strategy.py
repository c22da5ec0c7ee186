"""What `speed: auto` chooses for Gemma-2-2B on GPUs of several sizes, and the reasons it reports for TRL's step."""

import json
from dataclasses import asdict

import pytest
import torch
from helpers import REPOSITORY
from transformers import AutoConfig

from hw3.config.recipe import load_recipe
from hw3.runs.manifest import BatchLayoutRecord, Manifest, StepStrategyRecord
from hw3.training.batch_layout import BatchLayout, divide_batch
from hw3.training.memory_estimate import GIB
from hw3.training.sharding import Sharding
from hw3.training.step_strategy import StepStrategy, Workload, choose_step_strategy

GEMMA = AutoConfig.for_model(**json.loads((REPOSITORY / "benchmarks/shapes.json").read_text(encoding="utf-8"))["gemma"])
LENGTHS = [(100, 20), (459, 120)]  # the course's rows: most are short, the longest has 459 tokens


def choose(
    *overrides: str,
    gpu_memory: tuple[int, int] | None = None,
    sharding: Sharding | None = None,
    previous: Manifest | None = None,
) -> StepStrategy:
    recipe = load_recipe(REPOSITORY / "recipes/gemma/qlora.yaml", list(overrides))
    workload = Workload(recipe, divide_batch(recipe, 1), GEMMA, 83_066_880, LENGTHS, sharding)
    return choose_step_strategy(workload, torch.device("cuda"), gpu_memory, previous=previous)


def choose_on_gpu(free_gib: float, total_gib: float, *overrides: str, previous: Manifest | None = None) -> StepStrategy:
    return choose(*overrides, gpu_memory=(int(free_gib * GIB), int(total_gib * GIB)), previous=previous)


def record(strategy: StepStrategy) -> Manifest:
    """Return the part of a manifest that a later session reads."""
    settings = {name: getattr(strategy, name) for name in StepStrategyRecord.model_fields if name != "requested"}
    return Manifest.model_construct(
        speed=StepStrategyRecord(requested="auto", **settings), layout=BatchLayoutRecord(**asdict(strategy.layout))
    )


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("lora=null", "every weight is trained"),
        ("lora.use_dora=true", "lora.use_dora is set"),
        ("lora.bias=all", "lora.bias is set"),
        ("model.dtype=float32", "model.dtype is float32, not bfloat16"),
        ("model.attn_implementation=flash_attention_2", "model.attn_implementation is flash_attention_2"),
        ("training.bf16=false", "training.bf16 is false"),
        ("training.loss_type=dft", "training.loss_type is not nll"),
        ("training.neftune_noise_alpha=5", "training.neftune_noise_alpha changes TRL's forward"),
        ("training.activation_offloading=true", "training.activation_offloading wraps TRL's step"),
        ("training.optim=lomo", "training.optim=lomo works inside TRL's step"),
        ("training.optim=schedule_free_adamw", "training.optim=schedule_free_adamw works inside TRL's step"),
    ],
)
def test_choose_step_strategy_reports_why_it_takes_trls_step(override: str, reason: str) -> None:
    chosen = choose("quantization=null", override)
    assert not chosen.cuda_graphs and reason in chosen.notes[0]


def test_choose_step_strategy_captures_float16_on_a_t4() -> None:
    float16 = ["model.dtype=float16", "training.bf16=false", "quantization.bnb_4bit_compute_dtype=float16"]
    chosen = choose_on_gpu(14.6, 14.7, *float16)
    assert chosen.cuda_graphs and not chosen.dequantized
    assert choose(*float16).dequantized
    mixed = choose(*float16, "quantization.bnb_4bit_compute_dtype=bfloat16")
    assert "because quantization.bnb_4bit_compute_dtype is not float16" in mixed.notes[0]


@pytest.mark.parametrize("sharding", ["FSDP", "DeepSpeed"])
def test_choose_step_strategy_takes_trls_step_for_sharded_models(sharding: Sharding) -> None:
    chosen = choose(sharding=sharding)
    assert f"{sharding} shards the model" in chosen.notes[0] and chosen.optim == "adamw_torch_fused"
    assert not (chosen.cuda_graphs or chosen.dequantized) and chosen.layout == BatchLayout(1, 4, 2)


def test_choose_step_strategy_takes_trls_step_without_the_cuda_graphs_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hw3.training.step_strategy.why_cuda_graphs_unavailable", lambda: "it is not there")
    monkeypatch.setattr("hw3.training.step_strategy.TOKENS_PER_REPLAY", ())
    for name in ("compute_bucket_lengths", "compute_rows_per_replay"):
        monkeypatch.setattr(f"hw3.training.step_strategy.{name}", None)
    chosen = choose_on_gpu(140.5, 141)
    assert not chosen.cuda_graphs and chosen.dequantized and chosen.layout == BatchLayout(1, 8, 1)
    assert chosen.notes[0] == "speed auto: TRL's own step, because it is not there"


def test_choose_step_strategy_depends_on_gpu_memory() -> None:
    large, middle, four_bit, small = (choose_on_gpu(size - 0.5, size) for size in (141, 16, 12, 8))
    assert large.cuda_graphs and large.dequantized and large.layout == BatchLayout(1, 8, 1)
    assert large.optim == "adamw_torch_fused" and not large.activation_checkpointing
    assert middle.cuda_graphs and middle.dequantized
    assert "stays in 4 bits" in " ".join(small.notes) and "at most 768 tokens at once" in " ".join(small.notes)
    assert four_bit.cuda_graphs and small.cuda_graphs and not (four_bit.dequantized or small.dequantized)
    assert [chosen.tokens_per_replay for chosen in (large, middle, four_bit, small)] == [1152, 1152, 1152, 768]
    dequantized_only = choose_on_gpu(7.5, 8, "lora.target_modules=[q_proj]")
    assert not dequantized_only.cuda_graphs and "of the GPU to spare; 7.5 are free" in dequantized_only.notes[0]
    tiny = choose_on_gpu(5, 6)
    assert tiny.layout == BatchLayout(1, 4, 2) and tiny.activation_checkpointing and not tiny.dequantized
    assert tiny.optim == "paged_adamw_32bit"


def test_choose_step_strategy_reports_what_fits_without_headroom_and_what_does_not_fit() -> None:
    assert "It fits, but leaves only" in choose_on_gpu(4.2, 6).notes[-1]
    assert "This is more than the free memory. Set speed=lean" in choose_on_gpu(3.6, 6).notes[-1]
    assert "also with speed=lean and one row at once. Use a smaller base model" in choose_on_gpu(2, 4).notes[-1]


@pytest.mark.parametrize("begun_on_gib", [141, 12, 8, 6])
def test_choose_step_strategy_resumes_as_the_run_was_begun(begun_on_gib: int) -> None:
    begun = choose_on_gpu(begun_on_gib - 0.5, begun_on_gib)
    resumed = choose_on_gpu(140.5, 141, previous=record(begun))
    choice = (begun.cuda_graphs, begun.dequantized, begun.tokens_per_replay, begun.layout)
    assert (resumed.cuda_graphs, resumed.dequantized, resumed.tokens_per_replay, resumed.layout) == choice
    assert not any("begun with another choice" in note for note in resumed.notes)


def test_choose_step_strategy_reports_that_a_resumed_run_cannot_continue_as_it_was_begun() -> None:
    resumed = choose_on_gpu(11.5, 12, previous=record(choose_on_gpu(140.5, 141)))
    assert resumed.cuda_graphs and not resumed.dequantized
    assert resumed.notes[-1] == "  The run was begun with another choice, so its weights will differ by rounding"


def test_choose_step_strategy_ignores_a_session_with_another_speed() -> None:
    plain = record(choose("speed=plain"))
    plain.speed.requested = "plain"
    assert choose_on_gpu(140.5, 141, previous=plain) == choose_on_gpu(140.5, 141)
