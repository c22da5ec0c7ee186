"""Matrix products in float16: rounding, gradients, and models that plain float16 cannot compute."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from tiny_models import OTHER_ARCHITECTURES, TRAINING_MODELS, build_gemma2
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

from hw3.modeling.float16_products import (
    Float16Linear,
    Float16Linear4bit,
    get_activation_dtype,
    multiply,
    round_to_float16,
    use_float16_products,
)


@pytest.mark.parametrize(
    ("values", "rounded", "exponent"),
    [
        ([1.0, -3.0], [8192.0, -24576.0], -13),
        ([2.0**20, -(2.0**-3)], [16384.0, -(2.0**-9)], 6),  # 2**20 is infinite in float16
        ([3e-8, 1e-8], [16496.0, 5496.0], -39),  # 1e-8 is 0 in float16
        ([0.0, 0.0], [0.0, 0.0], -114),
    ],
)
def test_round_to_float16_fits_the_largest_element(values: list[float], rounded: list[float], exponent: int) -> None:
    result, scale = round_to_float16(torch.tensor(values))
    assert result.dtype == torch.float16 and scale.item() == 2.0**exponent
    assert result.tolist() == rounded


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_an_element_that_is_not_finite_affects_only_its_row(value: str) -> None:
    """A padded row of a batch may be NaN."""
    rounded, scale = round_to_float16(torch.tensor([[float(value), 1.0], [1.0, 1.0]]))
    product = multiply(rounded, torch.ones(2, 1).half()) * scale
    assert not product[0].isfinite() and product[1] == 2


def test_multiply_returns_sums_above_the_range_of_float16() -> None:
    factor = torch.full((2, 2), 2048.0).half()
    assert (factor @ factor).isinf().all()
    assert multiply(factor, factor).tolist() == [[2.0**23, 2.0**23]] * 2


def build_layer(in_4_bits: bool) -> tuple[torch.nn.Module, torch.Tensor]:
    """Return a frozen layer with 64 inputs and 32 outputs, and its weight in float32."""
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).mul(0.02).half()
    if not in_4_bits:
        layer = Float16Linear(64, 32, bias=False)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        return layer, weight.float()
    quantized = bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4")
    quantized.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    quantized.to("cpu")
    quantized.__class__ = Float16Linear4bit
    packed = quantized.weight
    return quantized, bnb.functional.dequantize_4bit(packed.data, packed.quant_state).float()


@pytest.mark.parametrize("in_4_bits", [False, True])
def test_layer_computes_what_overflows_and_underflows_in_float16(in_4_bits: bool) -> None:
    torch.manual_seed(0)
    layer, weight = build_layer(in_4_bits)
    x = 1e6 * torch.randn(2, 5, 64)
    x[:, 0] *= 1e-7  # a token with small activations beside large ones
    dy = 1e-9 * torch.randn(2, 5, 32)
    assert (x.half() @ weight.half().T).isnan().any() and not (dy.half() @ weight.half()).any()
    x.requires_grad_()
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    for computed, expected in ((y, x @ weight.T), (dx, dy @ weight)):
        assert computed.dtype == torch.float32
        assert ((computed - expected).norm(dim=-1) <= 5e-4 * expected.norm(dim=-1)).all()


def test_rows_do_not_depend_on_larger_rows_of_their_batch() -> None:
    """The scale is a power of two, so another scale rounds normal numbers in the same way."""
    torch.manual_seed(0)
    x, large = torch.randn(3, 64), 2.0**12 * torch.randn(2, 64)
    (alone, scale), (together, other_scale) = round_to_float16(x), round_to_float16(torch.cat([x, large]))
    assert scale != other_scale
    assert torch.equal(alone.float() * scale, together[:3].float() * other_scale)


@pytest.mark.parametrize("compiled", [False, True])
def test_layer_with_a_trained_weight_computes_its_gradient(compiled: bool) -> None:
    torch.manual_seed(0)
    layer, x, dy = Float16Linear(64, 32), 1e5 * torch.randn(5, 64), 1e-8 * torch.randn(5, 32)
    if compiled:  # as the CUDA-graph step compiles layers whose adapters have dropout
        layer.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    computed = torch.autograd.grad(layer(x), [*layer.parameters()], dy)
    for gradient, expected in zip(computed, (dy.T @ x, dy.sum(0)), strict=True):
        assert (gradient - expected).norm() <= 5e-4 * expected.norm()


def with_large_activations(model: PreTrainedModel) -> PreTrainedModel:
    """Scale a Gemma-2 so that its hidden states and the inner states of its MLPs exceed 65504.

    The norms behind attention and MLP multiply what they add to the residual, as in the published models.
    """
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight.fill_(3e4)
            layer.post_feedforward_layernorm.weight.fill_(3e4)
            layer.pre_feedforward_layernorm.weight.fill_(300.0)
    return model


def test_gemma2_with_large_activations_scores_as_in_float32() -> None:
    model = with_large_activations(build_gemma2()).half().float()  # the same weights in both dtypes
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        expected = model(ids).logits.log_softmax(-1)
        assert min(tensor.abs().max() for tensor in seen) > 65504
        plain = copy.deepcopy(model).half()
        assert not plain(ids).logits.isfinite().all()
        computed = use_float16_products(plain)(ids).logits.log_softmax(-1)
    assert computed.dtype == torch.float32
    assert (computed - expected).abs().max() < 0.02
    assert torch.equal(computed.argmax(-1), expected.argmax(-1))


def test_scaled_embeddings_are_multiplied_in_float32() -> None:
    model = build_gemma2().half()
    embeddings = model.get_input_embeddings()
    embeddings.weight.data[:, 0] = 20000  # Gemma multiplies by the root of the hidden size, here by 8
    ids, scaled = torch.tensor([[3, 5]]), embeddings.weight.float() * 8
    assert embeddings(ids).isinf().any()
    use_float16_products(model)
    assert torch.equal(embeddings(ids), scaled[ids])


def gradient_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return the concatenated gradient of the trained parameters."""
    loss = cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, trained)])


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("name", TRAINING_MODELS)
def test_gradient_of_adapters_is_closer_to_float32_than_with_bfloat16(name: str) -> None:
    torch.manual_seed(0)
    reference = TRAINING_MODELS[name]().half().float()
    ids, gradients = torch.randint(2, 50, (3, 20)), {}
    safe = use_float16_products(copy.deepcopy(reference).half())
    for dtype, base in {"float32": reference, "bfloat16": copy.deepcopy(reference), "float16": safe}.items():
        torch.manual_seed(1)
        model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
        for parameter in model.parameters():
            if parameter.requires_grad:
                assert parameter.dtype == torch.float32
                parameter.data = 0.2 * torch.randn_like(parameter)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            gradients[dtype] = gradient_of(model, ids)
    errors = {dtype: (gradients[dtype] - gradients["float32"]).norm() for dtype in ("bfloat16", "float16")}
    assert errors["float16"] < 0.02 * gradients["float32"].norm()
    assert errors["float16"] < errors["bfloat16"] / 4


@pytest.mark.parametrize("name", OTHER_ARCHITECTURES)
def test_other_architectures_score_as_in_float32(name: str) -> None:
    """Layers that are not `nn.Linear`, such as GPT-2's, compute in float32."""
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(OTHER_ARCHITECTURES[name][0]).eval().half().float()
    model = use_float16_products(copy.deepcopy(reference).half())
    ids = torch.randint(2, 64, (2, 12))
    with torch.no_grad():
        expected, computed = reference(ids).logits.log_softmax(-1), model(ids).logits.log_softmax(-1)
    assert computed.dtype == torch.float32 and (computed - expected).abs().max() < 0.02


def test_use_float16_products_replaces_the_forward_that_accelerate_has_wrapped() -> None:
    """With `device_map: auto` on several GPUs, accelerate wraps the forward of each layer."""
    expected, model = (build_gemma2().half() for _ in range(2))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    ids = torch.randint(0, 64, (2, 24))
    assert torch.equal(use_float16_products(model)(ids).logits, use_float16_products(expected)(ids).logits)


def test_use_float16_products_leaves_other_dtypes_as_they_are() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = use_float16_products(build_gemma2().to(dtype))
        assert {type(module) for module in model.modules() if isinstance(module, torch.nn.Linear)} == {torch.nn.Linear}
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert get_activation_dtype(dtype) == dtype
    assert get_activation_dtype(torch.float16) == torch.float32


def test_use_float16_products_keeps_only_weights_of_products_and_embeddings_in_float16() -> None:
    model = use_float16_products(use_float16_products(build_gemma2().half()))
    kept = {name.split(".")[-2] for name, weight in model.named_parameters() if weight.dtype == torch.float16}
    projections = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert kept == {*projections, "embed_tokens", "lm_head"}
    assert len(model.get_input_embeddings()._forward_hooks) == 1
