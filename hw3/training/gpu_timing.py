"""Time work on a GPU with CUDA events, such as the matrix products of a step."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer
from transformers import PreTrainedModel

from hw3.modeling.float16_products import get_activation_dtype
from hw3.training.cuda_graph_support import (
    HEAD_CHUNK_POSITIONS,
    FusedLoraLinear,
    find_fusable_layers,
    get_adapter_weights,
)

REPEATS = 5


def time_on_gpu(work: Callable[[], Any]) -> float:
    """Return the mean seconds that the GPU needs for some work, after one run that is not timed.

    The CPU does not wait for the GPU between the repeats.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    work()
    start.record()
    for _ in range(REPEATS):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / REPEATS


def time_matrix_products(model: PeftModel, tokens: int, output_tokens: int) -> tuple[float, float]:
    """Time the matrix products of a step's forward and backward on the GPU.

    Args:
        model: a model with adapters.
        tokens: tokens of the step.
        output_tokens: output tokens of the step, which the head computes.

    Returns:
        Seconds of (the first decoder layer, the head).
    """
    device, dtype = model.device, get_activation_dtype(model.dtype)
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel), "the adapters were added to a model of transformers"
    linears = _matrix_products(base.base_model.get_submodule("layers.0"), dtype)
    inputs = [torch.randn(tokens, in_features, device=device, dtype=dtype) for _, in_features in linears]

    def run_layer() -> None:
        for (linear, _), x in zip(linears, inputs, strict=True):
            x.requires_grad_()
            y = linear(x)
            y = list(y) if isinstance(linear, FusedLoraLinear) else [y]
            trained = [parameter for parameter in linear.parameters() if parameter.requires_grad]
            torch.autograd.grad(y, [x, *trained], [torch.ones_like(part) for part in y])

    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run_layer()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        run_layer()
    weight = base.get_output_embeddings().get_parameter("weight").detach()
    states = torch.randn(min(output_tokens, HEAD_CHUNK_POSITIONS), weight.shape[1], device=device, dtype=weight.dtype)
    head = time_on_gpu(lambda: (states @ weight.T) @ weight) * output_tokens / len(states)
    return time_on_gpu(graph.replay), head


def _matrix_products(decoder_layer: torch.nn.Module, dtype: torch.dtype) -> list[tuple[torch.nn.Module, int]]:
    """Return the modules that compute a decoder layer's matrix products, each with its number of input features."""
    groups = [[member.layer for member in group] for group in find_fusable_layers(decoder_layer)]
    fused_ids = {id(layer) for group in groups for layer in group}
    others = [linear.to(dtype) for linear in _linear_layers(decoder_layer) if id(linear) not in fused_ids]
    fused = [FusedLoraLinear(group, *_concatenate_adapters(group, dtype)) for group in groups]
    return [
        *((module, _in_features(group[0])) for module, group in zip(fused, groups, strict=True)),
        *((linear, _in_features(linear)) for linear in others),
    ]


def _in_features(linear: LoraLayer | torch.nn.Linear) -> int:
    assert linear.in_features is not None, "PEFT finds the sizes of every linear layer"
    return linear.in_features


def _concatenate_adapters(layers: list[Any], dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Return the concatenated A and the concatenated B of layers that share one input, for `FusedLoraLinear`."""
    sides = (torch.cat([part.detach() for part in side]) for side in get_adapter_weights(layers))
    return [torch.nn.Parameter(weight.to(dtype)) for weight in sides]


def _linear_layers(module: torch.nn.Module) -> Iterator[PeftLinear | torch.nn.Linear]:
    """Yield the linear layers of a module, each with its adapters if it has any."""
    if isinstance(module, PeftLinear | torch.nn.Linear):
        yield module
        return
    for child in module.children():
        yield from _linear_layers(child)


def release_memory(device: torch.device) -> None:
    """Release unused memory, on a GPU also the memory that PyTorch has reserved."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
