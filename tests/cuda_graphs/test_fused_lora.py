"""Fused LoRA layers against PEFT's: outputs, gradients, and which layers stay PEFT's."""

import itertools
from functools import partial
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model

from hw3.cuda_graphs.fused_lora import (
    FusedLoraLinear,
    FusedLoraOutput,
    find_fusable_layers,
    get_adapter_weights,
    is_fusable,
)

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]


class Projections(torch.nn.Module):
    """The projections of an attention: three layers with the same input, and one with another."""

    def __init__(self, bias: bool, linear: Any = torch.nn.Linear) -> None:
        super().__init__()
        self.q_proj, self.k_proj = linear(64, 96, bias=bias), linear(64, 32, bias=bias)
        self.v_proj, self.o_proj = linear(64, 32, bias=bias), linear(160, 64, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x).sigmoid()], dim=-1))


def assert_fused_equals_peft(
    module: torch.nn.Module, group_sizes: list[int], compiled: bool, dtype: torch.dtype
) -> None:
    """Compare outputs and gradients before and after PEFT's layers are replaced by fused ones."""
    for name, parameter in module.named_parameters():
        if "lora" in name:
            parameter.data = torch.randn_like(parameter, dtype=dtype)
    x, outer_grad = torch.randn(2, 7, 64, dtype=dtype, requires_grad=True), torch.randn(2, 7, 64, dtype=dtype)
    groups = find_fusable_layers(module)
    assert [len(group) for group in groups] == group_sizes
    weights = [side for group in groups for side in get_adapter_weights([member.layer for member in group])]
    output = module(x)
    x_grad, *grads = torch.autograd.grad(output, [x, *itertools.chain(*weights)], outer_grad)
    expected = [output, x_grad, *(torch.cat([grads.pop(0) for _ in side]) for side in weights)]
    leaves = [torch.nn.Parameter(torch.cat([weight.detach() for weight in side])) for side in weights]
    for number, group in enumerate(groups):
        fused = FusedLoraLinear([member.layer for member in group], *leaves[2 * number : 2 * number + 2])
        for index, member in enumerate(group):
            setattr(member.parent, member.name, FusedLoraOutput(fused, index))
    if compiled:
        module.compile(dynamic=True, backend="aot_eager", fullgraph=True)
    output = module(x)
    computed = [output, *torch.autograd.grad(output, [x, *leaves], outer_grad)]
    for one, other in zip(computed, expected, strict=True):
        assert (one - other).norm() <= (1e-5 if dtype == torch.float32 else 1e-12) * other.norm()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rank_pattern", [{}, {"v_proj": 5}], ids=["equal ranks", "different ranks"])
def test_fused_lora_linear_equals_peft(bias: bool, compiled: bool, rank_pattern: dict[str, int]) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=PROJECTIONS, rank_pattern=rank_pattern)
    module = get_peft_model(Projections(bias).double(), config).base_model.model
    assert_fused_equals_peft(module, [1, 1, 1, 1] if rank_pattern else [3, 1], compiled, torch.float64)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
def test_fused_lora_linear_dequantizes_4bit_weights_as_peft_does(compiled: bool, double_quant: bool) -> None:
    torch.manual_seed(0)
    linear = partial(
        bnb.nn.Linear4bit,
        compute_dtype=torch.float32,
        compress_statistics=double_quant,
        quant_type="nf4",
        device="cpu",
    )
    quantized = Projections(False, linear).to("cpu")
    for name in PROJECTIONS:
        getattr(quantized, name).support_avx512bf16_for_cpu = False
    module = get_peft_model(quantized, LoraConfig(r=4, target_modules=PROJECTIONS)).base_model.model
    assert_fused_equals_peft(module, [3, 1], compiled, torch.float32)


@pytest.mark.parametrize(
    "options", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True, "bias": "none"}], ids=str
)
def test_is_fusable_refuses_other_kinds_of_adapter(options: dict[str, Any]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(12, 20))
    adapted = get_peft_model(model, LoraConfig(r=3, target_modules=["0"], **options))
    assert not is_fusable(adapted.base_model.model[0])
