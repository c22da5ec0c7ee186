"""What of the captured step runs on a CPU: head, masks, linear layers, shapes, and the optimizer's words."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from hw3.captured_step import TOKENS, head_step, masks_for, rows_at_once, widths_for
from hw3.lora_linear import LoraLinear
from hw3.trainer import as_states_of

SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
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


@pytest.mark.parametrize(
    "make",
    [
        lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, sliding_window=4, attn_implementation="eager")),
        lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
        lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
        lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, use_sliding_window=True, sliding_window=4, max_window_layers=1)),
    ],
    ids=["gemma2", "llama", "qwen3", "qwen3 with sliding windows"],
)
def test_masks_are_those_of_the_model(make: Any) -> None:
    torch.manual_seed(0)
    model = make().eval()
    ids, real = torch.randint(1, 50, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    real[1, 6:] = real[2, 3:] = 0
    with torch.no_grad():
        own = model.base_model(input_ids=ids, attention_mask=real, use_cache=False).last_hidden_state
        ours = model.base_model(
            input_ids=ids, attention_mask=masks_for(model, real), position_ids=torch.arange(9)[None], use_cache=False
        ).last_hidden_state
    assert torch.allclose(own[real.bool()], ours[real.bool()], atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_lora_linear_is_pefts_layer(bias: bool, compiled: bool) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 20, bias=bias)).double()
    adapted = get_peft_model(model, LoraConfig(r=3, lora_alpha=5, target_modules=["0"]))
    for name, parameter in adapted.named_parameters():
        if "lora" in name:
            parameter.data = torch.randn_like(parameter, dtype=torch.float64)
    layer = adapted.base_model.model[0]
    assert LoraLinear.can_replace(layer)
    ours = torch.compile(LoraLinear(layer), dynamic=True, backend="aot_eager") if compiled else LoraLinear(layer)
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    leaves = [layer.lora_A.default.weight, layer.lora_B.default.weight, x]
    outer = torch.randn(2, 7, 20, dtype=torch.float64)
    for wanted, got in zip(
        [layer(x), *torch.autograd.grad(layer(x), leaves, outer)],
        [ours(x), *torch.autograd.grad(ours(x), leaves, outer)],
        strict=True,
    ):
        assert torch.allclose(wanted, got, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True, "bias": "none"}], ids=str
)
def test_other_kinds_of_adapter_stay_pefts(options: dict[str, Any]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(12, 20))
    adapted = get_peft_model(model, LoraConfig(r=3, target_modules=["0"], **options))
    assert not LoraLinear.can_replace(adapted.base_model.model[0])


def test_shapes() -> None:
    assert widths_for([3, 16, 17, 100, 256, 257, 400]) == (16, 32, 112, 256, 320, 448)
    assert [rows_at_once(8, width) for width in (96, 192, 208, 512, 2000)] == [8, 8, 4, 3, 1]
    assert rows_at_once(64, 144) == 11  # 6 replays, the last of 9 rows


@given(rows=st.integers(1, 64), width=st.integers(1, 3000))
def test_replays_hold_all_rows_and_few_tokens(rows: int, width: int) -> None:
    part = rows_at_once(rows, width)
    assert 1 <= part <= rows
    assert part == 1 or part * width <= TOKENS + width  # even parts may round up by a row


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
