"""What of the captured step runs on a CPU: head, masks, linear layers, shapes, and the optimizer's words."""

import itertools
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from helpers import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import hw3.cuda_graphs.training_step
from hw3.config.recipe import load_recipe
from hw3.cuda_graphs.fused_lora import LoraLinear, LoraLinears, adapter_weights, can_replace, replaceable
from hw3.cuda_graphs.training_step import SUMS, TOKENS, CapturedStep, head_step, rows_at_once, widths_for
from hw3.data.collator import CompletionOnlyCollator
from hw3.data.tokenization import IGNORE_INDEX
from hw3.modeling.attention_masks import masks_for
from hw3.runs.checkpoints import complete_checkpoints
from hw3.training.batch_layout import StepLayout, step_layout
from hw3.training.memory_estimate import GIB
from hw3.training.optimizer_state import as_states_of
from hw3.training.step_strategy import Speed, choose_speed
from hw3.training.train import train
from hw3.training.trainer import CompletionTrainer, NonFiniteLoss

SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
MODELS: dict[str, Any] = {
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SHAPE, sliding_window=4, final_logit_softcapping=3.0, attn_implementation="eager")
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "qwen3 with sliding windows": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SHAPE, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    ),
}


@pytest.mark.parametrize("cap", [None, 3.0])
def test_head_step_is_cross_entropy_and_its_gradient(cap: float | None) -> None:
    torch.manual_seed(0)
    states, weight = torch.randn(5, 8, dtype=torch.float64, requires_grad=True), torch.randn(11, 8).double()
    targets, tokens = torch.tensor([3, 10, -1, 0, 7]), torch.tensor(9)
    logits = (states @ weight.T).float()
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction="sum") / tokens
    (expected,) = torch.autograd.grad(loss, states)
    with torch.no_grad():
        sums, gradient = head_step(states, weight, targets, tokens, cap)
    counted = logits.detach()[targets >= 0]
    assert sums[0] == pytest.approx(loss.item(), rel=1e-6)
    assert sums[1] == pytest.approx(torch.distributions.Categorical(logits=counted).entropy().sum().item(), rel=1e-5)
    assert sums[2] == (counted.argmax(-1) == targets[targets >= 0]).sum()
    assert torch.allclose(gradient, expected, rtol=1e-5, atol=1e-7)
    assert not gradient[2].any()


@pytest.mark.parametrize("name", MODELS)
def test_masks_are_those_of_the_model(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    ids, real = torch.randint(1, 50, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    real[1, 6:] = real[2, 3:] = 0
    with torch.no_grad():
        own = model.base_model(input_ids=ids, attention_mask=real, use_cache=False).last_hidden_state
        ours = model.base_model(
            input_ids=ids, attention_mask=masks_for(model, real), position_ids=torch.arange(9)[None], use_cache=False
        ).last_hidden_state
    assert torch.allclose(own[real.bool()], ours[real.bool()], atol=1e-6)


class Uncaptured(CapturedStep):
    """The captured step with its graphs' work done anew at each replay."""

    def _capture(self, widths: Sequence[int]) -> dict[int, tuple[Any, Any]]:
        self._head = head_step
        kept: dict[int, torch.Tensor] = {}

        @torch.enable_grad()
        def forward(width: int) -> None:
            with self.rebuilt():
                kept[width] = self.forward(width)

        @torch.enable_grad()
        def backward(width: int) -> None:
            self.backward(kept.pop(width))

        return {
            width: (SimpleNamespace(replay=partial(forward, width)), SimpleNamespace(replay=partial(backward, width)))
            for width in widths
        }


def made_rows(count: int, most: int, seed: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(2, most, (), generator=generator))
        ids = [*torch.randint(2, 50, (length - 1,), generator=generator).tolist(), 1]
        prompt = int(torch.randint(1, length, (), generator=generator))
        rows.append({"input_ids": ids, "labels": [IGNORE_INDEX] * prompt + ids[prompt:]})
    return rows


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("name", MODELS)
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
def test_sums_and_gradients_are_those_of_autograd(
    name: str, lora: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several replays a step, an uneven last one, several pieces of the head, and what an earlier batch left behind."""
    for constant, value in (("HEAD_POSITIONS", 64), ("HEAD_STEP", 16)):
        monkeypatch.setattr(hw3.cuda_graphs.training_step, constant, value)
    torch.manual_seed(0)
    model = get_peft_model(MODELS[name](), LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **lora)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data += 0.2 * torch.randn_like(parameter)
    batches = [made_rows(11, most, seed) for seed, most in enumerate((40, 9, 16))]
    widths = widths_for([len(row["input_ids"]) for rows in batches for row in rows])
    step = Uncaptured(model, 11, widths, 96)
    for rows in batches:
        padded = CompletionOnlyCollator(0, 1, widths, outputs=True)(rows)
        labels = padded.pop("labels")
        tokens = (labels != IGNORE_INDEX).sum()
        logits = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        expected = torch.autograd.grad(loss / tokens, trained)
        step.begin()
        step.add(**padded, tokens=tokens)
        assert step.buffer[-SUMS].item() == pytest.approx((loss / tokens).item(), rel=1e-5)
        for parameter, gradient in zip(trained, expected, strict=True):
            assert (parameter.grad - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training takes the captured step, on the CPU and without graphs."""

    def choose(recipe: Any, layout: Any, config: Any, trained: int, lengths: Any, *rest: Any, **named: Any) -> Speed:
        if recipe.speed == "plain" or rest[2:]:
            print(*rest[2:])
            return choose_speed(recipe, layout, config, trained, lengths, *rest, **named)
        merged = StepLayout(1, layout.rows_per_device * layout.accumulation, 1)
        return Speed(merged, True, False, False, "adamw_torch", widths=widths_for([tokens for tokens, _ in lengths]))

    def check_at_once(trainer: CompletionTrainer, value: torch.Tensor, name: str) -> None:
        trainer._check_finite(trainer.state.global_step, value, name)

    monkeypatch.setattr("hw3.training.trainer.CapturedStep", Uncaptured)
    for module in ("plan", "train"):
        monkeypatch.setattr(f"hw3.training.{module}.choose_speed", choose)
        monkeypatch.setattr(f"hw3.training.{module}.least_memory", lambda recipe, device: None)
    monkeypatch.setattr(CompletionTrainer, "_short_of_memory", lambda trainer: None)
    monkeypatch.setattr(CompletionTrainer, "_check_finite_later", check_at_once)


def log_lines(run: Path) -> list[dict[str, Any]]:
    state = json.loads((complete_checkpoints(run)[-1].path / "trainer_state.json").read_text())
    return [log for log in state["log_history"] if "loss" in log]


PLAIN = ["quantization=null", "lora.lora_dropout=0.0", "training.learning_rate=0.001", "training.logging_steps=1"]


def test_the_captured_run_is_trls(captured: None, mini_recipe: Path, tmp_path: Path) -> None:
    """Micro-batches merged, log lines, counts of tokens, weights; and gone on with by TRL's step half-way."""
    layout = ["training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=4"]
    plain = load_recipe(mini_recipe, [*PLAIN, *layout, "speed=plain"])
    train(plain, tmp_path / "plain")
    train(load_recipe(mini_recipe, [*PLAIN, *layout]), tmp_path / "captured")
    train(load_recipe(mini_recipe, [*PLAIN, *layout, "training.max_steps=8"]), tmp_path / "changed")
    train(plain, tmp_path / "changed")
    assert json.loads((tmp_path / "captured/manifest.json").read_text())["speed"]["captured"]
    for name in ("captured", "changed"):
        for one, other in zip(log_lines(tmp_path / name), log_lines(tmp_path / "plain"), strict=True):
            assert one["num_tokens"] == other["num_tokens"]
            assert one["num_input_tokens_seen"] == other["num_input_tokens_seen"]
            for key in ("loss", "grad_norm", "learning_rate"):
                assert one[key] == pytest.approx(other[key], rel=1e-4), key
        last, other = (complete_checkpoints(tmp_path / run)[-1].path for run in (name, "plain"))
        weights, others = (load_file(folder / "adapter_model.safetensors") for folder in (last, other))
        assert all(torch.allclose(weights[key], others[key], rtol=0, atol=1e-5) for key in others)
    last = log_lines(tmp_path / "captured")[-1]
    assert 0 < last["entropy"] < 5 and 0 <= last["mean_token_accuracy"] <= 1


def test_a_step_that_is_wrong_is_not_taken(
    captured: None,
    mini_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Wrong(Uncaptured):
        def backward(self, hidden: torch.Tensor) -> None:
            super().backward(hidden)
            self.buffer[:-SUMS] *= 1.2

    monkeypatch.setattr("hw3.training.trainer.CapturedStep", Wrong)
    train(load_recipe(mini_recipe, PLAIN), tmp_path / "run")
    shown = capsys.readouterr().out
    assert "the captured one has a gradient in the first step that is 20.0% from TRL's" in shown
    assert not json.loads((tmp_path / "run/manifest.json").read_text())["speed"]["captured"]
    assert complete_checkpoints(tmp_path / "run")[-1].step == 12


def test_a_gradient_that_is_not_finite_is_never_saved(captured: None, mini_recipe: Path, tmp_path: Path) -> None:
    broken = [*PLAIN, "training.learning_rate=1e30", "training.save_steps=1"]
    with pytest.raises(NonFiniteLoss, match="of step 2 is"):
        train(load_recipe(mini_recipe, broken), tmp_path / "run")
    assert [checkpoint.step for checkpoint in complete_checkpoints(tmp_path / "run")] == [1]


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
        ("training.optim=lomo", "training.optim=lomo works inside TRL's step"),
        ("training.optim=schedule_free_adamw", "training.optim=schedule_free_adamw works inside TRL's step"),
    ],
)
def test_why_trls_step_is_taken(override: str, reason: str, repository: Path) -> None:
    recipe = load_recipe(repository / "recipes/gemma/qlora.yaml", ["quantization=null", override])
    chosen = choose_speed(recipe, step_layout(recipe, 1), GEMMA, 83_066_880, LENGTHS, torch.device("cuda"), None)
    assert not chosen.captured and reason in chosen.notes[0]


@pytest.mark.parametrize("sharded", ["FSDP", "DeepSpeed"])
def test_sharded_models_are_not_captured(sharded: str, repository: Path) -> None:
    recipe = load_recipe(repository / "recipes/gemma/qlora.yaml")
    cuda = torch.device("cuda")
    chosen = choose_speed(recipe, step_layout(recipe, 1), GEMMA, 83_066_880, LENGTHS, cuda, None, sharded=sharded)
    assert f"{sharded} shards the model" in chosen.notes[0] and chosen.optim == "adamw_torch_fused"
    assert not (chosen.captured or chosen.dequantized) and chosen.layout == StepLayout(1, 4, 2)


GEMMA = AutoConfig.for_model(**json.loads((REPOSITORY / "benchmarks/shapes.json").read_text())["gemma"])
LENGTHS = [(100, 20), (459, 120)]  # the course's rows: most of them short, the longest of 459 tokens


def gemma_speed(repository: Path, free: float, total: float, *overrides: str) -> Speed:
    recipe = load_recipe(repository / "recipes/gemma/qlora.yaml", list(overrides))
    memory = (int(free * GIB), int(total * GIB))
    return choose_speed(recipe, step_layout(recipe, 1), GEMMA, 83_066_880, LENGTHS, torch.device("cuda"), memory)


def test_auto_goes_by_memory(repository: Path) -> None:
    large, middle, packed, small = (gemma_speed(repository, size - 0.5, size) for size in (141, 16, 12, 8))
    assert large.captured and large.dequantized and large.layout == StepLayout(1, 8, 1)
    assert large.optim == "adamw_torch_fused" and not large.activation_checkpointing
    assert middle.captured and middle.dequantized
    assert "stays packed" in " ".join(small.notes) and "at most 768 tokens at once" in " ".join(small.notes)
    assert packed.captured and small.captured and not (packed.dequantized or small.dequantized)
    assert [speed.replayed for speed in (large, middle, packed, small)] == [1152, 1152, 1152, 768]
    kept = gemma_speed(repository, 7.5, 8, "lora.target_modules=[q_proj]")
    assert not kept.captured and "of the card to spare, 7.5 are free" in kept.notes[0]
    tiny = gemma_speed(repository, 5, 6)
    assert tiny.layout == StepLayout(1, 4, 2) and tiny.activation_checkpointing and not tiny.dequantized
    assert tiny.optim == "paged_adamw_32bit"
    assert "more than is free" in gemma_speed(repository, 2, 4).notes[-1]


class Projections(torch.nn.Module):
    """Layers as a decoder has them: three of one input, one of another, called in turn."""

    def __init__(self, bias: bool, linear: Any = torch.nn.Linear) -> None:
        super().__init__()
        self.q_proj, self.k_proj = linear(64, 96, bias=bias), linear(64, 32, bias=bias)
        self.v_proj, self.o_proj = linear(64, 32, bias=bias), linear(160, 64, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x).sigmoid()], dim=-1))


def check_replaced(module: torch.nn.Module, groups: list[int], compiled: bool, dtype: torch.dtype) -> None:
    """Outputs and gradients of PEFT's layers, and of ours in their place."""
    for name, parameter in module.named_parameters():
        if "lora" in name:
            parameter.data = torch.randn_like(parameter, dtype=dtype)
    x, outer = torch.randn(2, 7, 64, dtype=dtype, requires_grad=True), torch.randn(2, 7, 64, dtype=dtype)
    found = replaceable(module)
    assert [len(group) for group in found] == groups
    theirs = [side for group in found for side in adapter_weights([layer for *_, layer in group])]
    output = module(x)
    x_grad, *grads = torch.autograd.grad(output, [x, *itertools.chain(*theirs)], outer)
    wanted = [output, x_grad, *(torch.cat([grads.pop(0) for _ in weights]) for weights in theirs)]
    leaves = [torch.nn.Parameter(torch.cat([weight.detach() for weight in weights])) for weights in theirs]
    for number, group in enumerate(found):
        together = LoraLinears([layer for *_, layer in group], *leaves[2 * number : 2 * number + 2])
        for index, (parent, name, _) in enumerate(group):
            setattr(parent, name, LoraLinear(together, index))
    if compiled:
        module.compile(dynamic=True, backend="aot_eager", fullgraph=True)
    output = module(x)
    got = [output, *torch.autograd.grad(output, [x, *leaves], outer)]
    for one, other in zip(got, wanted, strict=True):
        assert (one - other).norm() <= (1e-5 if dtype == torch.float32 else 1e-12) * other.norm()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("ranks", [{}, {"v_proj": 5}])
def test_lora_linears_are_pefts_layers(bias: bool, compiled: bool, ranks: dict[str, int]) -> None:
    torch.manual_seed(0)
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(r=3, lora_alpha=5, target_modules=names, rank_pattern=ranks)
    module = get_peft_model(Projections(bias).double(), config).base_model.model
    check_replaced(module, [1, 1, 1, 1] if ranks else [3, 1], compiled, torch.float64)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("double", [False, True])
def test_packed_weights_are_those_of_each_forward(compiled: bool, double: bool) -> None:
    torch.manual_seed(0)
    linear = partial(
        bnb.nn.Linear4bit, compute_dtype=torch.float32, compress_statistics=double, quant_type="nf4", device="cpu"
    )
    packed = Projections(False, linear).to("cpu")
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    for name in names:
        getattr(packed, name).support_avx512bf16_for_cpu = False
    module = get_peft_model(packed, LoraConfig(r=4, target_modules=names)).base_model.model
    check_replaced(module, [3, 1], compiled, torch.float32)


@pytest.mark.parametrize(
    "options", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True, "bias": "none"}], ids=str
)
def test_other_kinds_of_adapter_stay_pefts(options: dict[str, Any]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(12, 20))
    adapted = get_peft_model(model, LoraConfig(r=3, target_modules=["0"], **options))
    assert not can_replace(adapted.base_model.model[0])


def test_shapes() -> None:
    assert widths_for([3, 16, 17, 100, 256, 257, 400]) == (16, 32, 112, 256, 320, 448)
    assert [rows_at_once(8, width, 1152) for width in (96, 144, 160, 512, 2000)] == [8, 8, 4, 2, 1]
    assert rows_at_once(64, 128, 1152) == 8
    assert rows_at_once(64, 112, 1152) == 10  # 7 replays, the last of 4 rows
    assert [rows_at_once(8, width, 768) for width in (96, 192, 400)] == [8, 4, 1]


@given(rows=st.integers(1, 64), width=st.integers(1, 3000), most=st.sampled_from(TOKENS))
def test_replays_hold_all_rows_and_few_tokens(rows: int, width: int, most: int) -> None:
    part = rows_at_once(rows, width, most)
    assert 1 <= part <= rows
    assert part == 1 or part * width <= most


@pytest.mark.parametrize("paged_first", [True, False])
def test_adamw_goes_on_in_another_adamws_words(paged_first: bool) -> None:
    """Four steps by one, four by the other: as eight by either."""
    from bitsandbytes.optim import AdamW

    torch.manual_seed(0)
    gradients = [torch.randn(64, 80) for _ in range(8)]
    makers = [
        lambda p: AdamW([p], lr=1e-2, weight_decay=0.1, optim_bits=32),
        lambda p: torch.optim.AdamW([p], lr=1e-2, weight_decay=0.1),
    ]

    def steps(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer, some: list[torch.Tensor]) -> None:
        for gradient in some:
            parameter.grad = gradient.clone()
            optimizer.step()

    straight = torch.nn.Parameter(torch.ones(64, 80))
    steps(straight, makers[1](straight), gradients)
    first, second = makers if paged_first else reversed(makers)
    changed = torch.nn.Parameter(torch.ones(64, 80))
    optimizer = first(changed)
    steps(changed, optimizer, gradients[:4])
    other = second(changed)
    state = optimizer.state_dict()
    assert as_states_of(optimizer, state) is state
    other.load_state_dict(as_states_of(other, state))
    steps(changed, other, gradients[4:])
    assert torch.allclose(changed, straight, rtol=1e-5, atol=1e-6)
