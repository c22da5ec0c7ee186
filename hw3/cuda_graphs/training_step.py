"""The CUDA-graph step: forward and backward of a training step, captured as CUDA graphs and replayed.

A small batch of 8 short rows keeps a large GPU busy for about 30 ms, but launching its thousands of kernels one by one
takes the CPU ten times as long. Here the decoder layers are compiled. The backbone's forward and backward are captured
separately, once per padded length. The output head runs between the two graphs, only on the positions that predict an
output token, so that their number may vary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.config
from peft import PeftModel
from torch.nn.functional import pad
from torch.utils import deterministic
from transformers import PreTrainedModel

from hw3.cuda_graphs.fused_lora import (
    FusableLayer,
    FusedLoraLinear,
    FusedLoraOutput,
    find_fusable_layers,
    get_adapter_weights,
)
from hw3.cuda_graphs.output_head import (
    HEAD_CHUNK_POSITIONS,
    HEAD_PADDING_MULTIPLE,
    INDUCTOR_OPTIONS,
    compile_output_head,
)
from hw3.modeling.attention_masks import build_attention_masks
from hw3.modeling.float16_products import get_activation_dtype

# Choices of the largest number of tokens per replay. More than the first is hardly faster; activations grow with it.
TOKENS_PER_REPLAY = (1152, 768, 384)
# Rows are padded to multiples of 16 tokens up to a length of 256, and to multiples of 64 beyond.
SHORT_PADDING_MULTIPLE, LONG_PADDING_MULTIPLE, MAX_SHORT_TOKENS = 16, 64, 256
NUM_METRICS = 3  # loss, entropy and correct top-1 predictions, stored behind the gradients


def compute_bucket_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    """Return the lengths that batches of rows with these lengths are padded to, ascending."""
    multiples = (
        (length, SHORT_PADDING_MULTIPLE if length <= MAX_SHORT_TOKENS else LONG_PADDING_MULTIPLE) for length in lengths
    )
    return tuple(sorted({-(-length // multiple) * multiple for length, multiple in multiples}))


def compute_rows_per_replay(rows: int, length: int, max_tokens: int) -> int:
    """Return how many of a step's rows one replay computes.

    The rows are divided into as few equal parts as keep each part within `max_tokens`, or into single rows.

    Args:
        rows: rows of the step.
        length: tokens that each row is padded to.
        max_tokens: largest number of tokens per replay, unless one row has more.
    """
    parts = -(-rows // max(1, max_tokens // length))
    return -(-rows // parts)


@contextmanager
def deterministic_kernels() -> Iterator[None]:
    """Let PyTorch choose only kernels whose result does not depend on timing, while graphs are captured in the block.

    Some kernels add with atomic operations, in any order: the backward of scaled-dot-product attention is one. cuBLAS
    needs `CUBLAS_WORKSPACE_CONFIG` for this, which `hw3/__init__.py` sets.
    """
    before = torch.get_deterministic_debug_mode(), deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    # Filling helps to find errors, but each replay would fill its buffers.
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        deterministic.fill_uninitialized_memory = before[1]  # type: ignore[attr-defined]


class CudaGraphStep:
    """Compute an optimizer step's forward and backward with CUDA graphs, and sum the gradients into one flat buffer.

    Adapters are float32. The graphs read copies of them in the dtype of the activations, which are made once per step;
    autocast would make the same copies at every use. LoRA layers for which `is_fusable` holds become `FusedLoraLinear`;
    the others, with dropout or a variant of LoRA, stay PEFT's. No value is read back to the CPU.

    Args:
        model: the model with its adapters; the base's weights are in the compute dtype or in 4 bits. If it is float16,
            activations are float32 (`use_float16_products`).
        rows_per_step: this process's rows of an optimizer step.
        bucket_lengths: tokens that a batch may be padded to, ascending.
        tokens_per_replay: largest number of tokens per replay, unless one row has more.

    Attributes:
        buffer: float32 gradients of all trained parameters, concatenated, followed by the `NUM_METRICS` sums of
            `output_head_loss_and_grad`. One all-reduce exchanges both.
    """

    def __init__(
        self, model: PeftModel, rows_per_step: int, bucket_lengths: Sequence[int], tokens_per_replay: int
    ) -> None:
        base = model.get_base_model()
        assert isinstance(base, PreTrainedModel), "the adapters were added to a model of transformers"
        self._peft_model, self._model = model, base
        self._config = self._model.config.get_text_config()
        self._logit_cap = getattr(self._config, "final_logit_softcapping", None)
        self._rows_per_step, self._tokens_per_replay = rows_per_step, tokens_per_replay
        self._dtype = get_activation_dtype(self._model.dtype)
        groups = find_fusable_layers(model)
        fused, others = _list_leaves(model, groups)
        self._allocate_parameter_memory([*fused, *([parameter] for parameter in others)], model.device)
        self._replacements = _build_replacements(groups, self._leaves[: len(fused)])
        self._copy_by_id = dict(zip(map(id, others), self._leaves[len(fused) :], strict=True))
        tokens_by_length = {length: self._rows_per_replay(length) * length for length in bucket_lengths}
        max_tokens = max(tokens_by_length.values())
        # Inputs and outputs of every graph; smaller batches use their beginning.
        self._ids = torch.zeros(max_tokens, dtype=torch.long, device=model.device)
        self._mask = torch.zeros(max_tokens, dtype=torch.long, device=model.device)
        self._hidden = torch.zeros(max_tokens, self._config.hidden_size, dtype=self._dtype, device=model.device)
        self._hidden_grad = torch.zeros_like(self._hidden)
        # The graph with most tokens is captured first: the memory pool that it fills then suffices for the others.
        self._graphs = self._capture_graphs(sorted(bucket_lengths, key=lambda length: -tokens_by_length[length]))
        self._head = self._compile_head()

    def _allocate_parameter_memory(
        self, parameters_by_leaf: Sequence[Sequence[torch.nn.Parameter]], device: torch.device
    ) -> None:
        """Allocate the gradients and the adapters' copies, each in one flat tensor."""
        self._parameters: list[torch.Tensor] = [parameter for leaf in parameters_by_leaf for parameter in leaf]
        shapes = [parameter.shape for parameter in self._parameters]
        leaf_shapes = [(sum(len(part) for part in leaf), *leaf[0].shape[1:]) for leaf in parameters_by_leaf]
        count = sum(map(math.prod, shapes))
        self.buffer = torch.zeros(count + NUM_METRICS, device=device)
        self._gradients = _split_into_views(self.buffer[:-NUM_METRICS], shapes)
        copies = torch.zeros(count, dtype=self._dtype, device=device)
        # Both are views of the same memory: `_copies`, one per parameter, are written at each step. `_leaves`, one per
        # A or B of a fused group, are read by the graphs.
        self._copies = _split_into_views(copies, shapes)
        self._leaves = [torch.nn.Parameter(copy) for copy in _split_into_views(copies, leaf_shapes)]

    def train_adapters(self, model: PeftModel) -> None:
        """Compute the steps of another model from now on, with the graphs as they were captured.

        Args:
            model: the same base model with other adapters, of the same layers, shapes, scaling and dropout.
        """
        groups = find_fusable_layers(model)
        fused, others = _list_leaves(model, groups)
        parameters: list[torch.Tensor] = [*(parameter for leaf in fused for parameter in leaf), *others]
        assert [parameter.shape for parameter in parameters] == [copy.shape for copy in self._copies], "same adapters"
        self._peft_model, self._parameters = model, parameters
        # The layers that the fused ones replaced belong to the other model; no longer referring to them frees them.
        layers = [member for group in groups for member in group]
        self._replacements = [(layer, output) for layer, (_, output) in zip(layers, self._replacements, strict=True)]
        self._copy_by_id = dict(zip(map(id, others), self._leaves[len(fused) :], strict=True))

    def _rows_per_replay(self, length: int) -> int:
        return compute_rows_per_replay(self._rows_per_step, length, self._tokens_per_replay)

    def _capture_graphs(self, bucket_lengths: Sequence[int]) -> dict[int, tuple[Any, Any]]:
        """Return the graphs of the forward and the backward for each length; both have a method `replay()`."""
        # The compiler makes no code for the CPU here. Finding out what the CPU supports would take half a minute.
        torch._inductor.config.cpp.vec_isa_ok = False
        for layer in self._model.base_model.get_submodule("layers").children():
            layer.compile(dynamic=True, options=INDUCTOR_OPTIONS)
        pool, stream, default = torch.cuda.graph_pool_handle(), torch.cuda.Stream(), torch.cuda.default_stream()
        graphs = {}
        torch._C._cuda_clearCublasWorkspaces()  # 32 MiB for each stream and thread that has multiplied before
        with deterministic_kernels(), self.modules_replaced(), torch.cuda.stream(stream):
            stream.wait_stream(default)
            # Norms and elementwise products are computed again in the backward, which saves a third of the memory.
            with torch._functorch.config.patch(ban_recompute_materialized_backward=False):
                for length in bucket_lengths:
                    self.backward(self.forward(length))  # compiles, and loads every kernel
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # the graphs' own memory pool needs what these runs have reserved
            for length in bucket_lengths:
                graphs[length] = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
                with torch.cuda.graph(graphs[length][0], pool=pool, stream=stream):
                    hidden = self.forward(length)
                with torch.cuda.graph(graphs[length][1], pool=pool, stream=stream):
                    self.backward(hidden)
                del hidden
        default.wait_stream(stream)
        return graphs

    def _compile_head(self) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        return compile_output_head(self._model.get_output_embeddings().weight, self._dtype, self._logit_cap)

    @contextmanager
    def modules_replaced(self) -> Iterator[None]:
        """Install the adapters' copies and the fused layers inside the block, and let embeddings require a gradient."""
        parameters = [
            (module, name, parameter)
            for module in self._peft_model.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if id(parameter) in self._copy_by_id
        ]
        for module, name, parameter in parameters:
            module._parameters[name] = self._copy_by_id[id(parameter)]
        for original, replacement in self._replacements:
            original.parent._modules[original.name] = replacement
        # If the embeddings require a gradient, the first layer is compiled like all others.
        hook = self._model.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output: output.requires_grad_()
        )
        try:
            yield
        finally:
            hook.remove()
            for original, _ in self._replacements:
                original.parent._modules[original.name] = original.layer
            for module, name, parameter in parameters:
                module._parameters[name] = parameter

    def forward(self, length: int) -> torch.Tensor:
        """Compute the last hidden states of the static inputs, and copy them to the static output.

        Args:
            length: tokens per row, L.

        Returns:
            The hidden states with their autograd graph, shape (B, L, D).
        """
        rows = self._rows_per_replay(length)
        ids, mask = (buffer[: rows * length].view(rows, length) for buffer in (self._ids, self._mask))
        with torch.autocast(ids.device.type, self._dtype, enabled=self._dtype != torch.float32, cache_enabled=False):
            hidden = self._model.base_model(
                input_ids=ids,
                attention_mask=build_attention_masks(self._model, mask),
                position_ids=torch.arange(length, device=ids.device)[None],
                use_cache=False,
            ).last_hidden_state
        self._hidden[: rows * length].copy_(hidden.detach().flatten(0, 1))
        return hidden

    def backward(self, hidden: torch.Tensor) -> None:
        """Add the parameters' gradients to the buffer, given the static gradient with respect to the hidden states.

        Args:
            hidden: from `forward`, shape (B, L, D).
        """
        rows, length, _ = hidden.shape
        gradients = torch.autograd.grad(hidden, self._leaves, self._hidden_grad[: rows * length].view_as(hidden))
        # They come in the compute dtype, one per matrix product. Concatenated, they are added by one kernel.
        self.buffer[:-NUM_METRICS] += torch.cat([gradient.flatten() for gradient in gradients])

    def start_step(self) -> None:
        """Start an optimizer step: zero the buffer, copy the adapters, make each `.grad` a view of the buffer."""
        self.buffer.zero_()
        with torch.no_grad():
            torch._foreach_copy_(self._copies, self._parameters)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    @torch.no_grad()
    def accumulate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        output_positions: torch.Tensor,
        output_ids: torch.Tensor,
        outputs_per_row: Sequence[int],
        tokens: torch.Tensor,
    ) -> None:
        """Add the gradients and metrics of a step's rows to the buffer.

        Args:
            input_ids: shape (B, L), B the step's rows, L one of the bucket lengths.
            attention_mask: shape (B, L), 1 on tokens, 0 on padding.
            output_positions: the positions that predict an output token, as indices into B * L, row by row; shape (K,).
            output_ids: the tokens they predict, shape (K,).
            outputs_per_row: how many of the K belong to each row.
            tokens: output tokens of the complete optimizer step, over all processes; a scalar on the device.
        """
        tokens = tokens.float()  # a tensor of another dtype would compile the head again
        rows, length = input_ids.shape
        forward_graph, backward_graph = self._graphs[length]
        rows_per_replay = self._rows_per_replay(length)
        weight = self._model.get_output_embeddings().weight
        hidden_grad = self._hidden_grad[: rows_per_replay * length]
        first_output = 0
        for first_row in range(0, rows, rows_per_replay):
            part = slice(first_row, first_row + rows_per_replay)
            # If fewer rows are left, old rows may remain in the buffers; their gradient is zero.
            filled = min(rows_per_replay, rows - first_row) * length
            self._ids[:filled].copy_(input_ids[part].reshape(-1))
            self._mask[:filled].copy_(attention_mask[part].reshape(-1))
            forward_graph.replay()
            hidden_grad.zero_()
            outputs = slice(first_output, first_output + sum(outputs_per_row[part]))
            # Pad K to a multiple of 64. A padded position reads state 0, and its target -1 removes it from the sums.
            padding = (first_output - outputs.stop) % HEAD_PADDING_MULTIPLE
            positions = pad(output_positions[outputs] - first_row * length, (0, padding))
            targets = pad(output_ids[outputs], (0, padding), value=-1)
            states = self._hidden[positions]
            for start in range(0, len(targets), HEAD_CHUNK_POSITIONS):
                chunk = slice(start, start + HEAD_CHUNK_POSITIONS)
                sums, gradient = self._head(states[chunk], weight, targets[chunk], tokens, self._logit_cap)
                hidden_grad.index_add_(0, positions[chunk], gradient)
                self.buffer[-NUM_METRICS:] += sums
            backward_graph.replay()
            first_output = outputs.stop


def count_unused_reserved_bytes(device: torch.device, *, in_graph_pools: bool) -> int:
    """Return the bytes that PyTorch has reserved on a GPU but not allocated.

    Args:
        device: the GPU.
        in_graph_pools: count the memory pools of CUDA graphs, which nothing else can use; otherwise all other memory.
    """
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if segment["device"] == device.index and (tuple(segment["segment_pool_id"]) != (0, 0)) == in_graph_pools
    )


def _list_leaves(
    model: PeftModel, groups: Sequence[Sequence[FusableLayer]]
) -> tuple[list[list[torch.nn.Parameter]], list[torch.nn.Parameter]]:
    """Return the parameters of each leaf of the graphs' autograd.

    Args:
        model: the model with its adapters.
        groups: its layers that are fused.

    Returns:
        One leaf for A and one for B of each fused group, then every other trained parameter, each a leaf of its own.
    """
    fused = [side for group in groups for side in get_adapter_weights([member.layer for member in group])]
    fused_ids = {id(parameter) for leaf in fused for parameter in leaf}
    others = [weight for weight in model.parameters() if weight.requires_grad and id(weight) not in fused_ids]
    return fused, others


def _build_replacements(
    groups: Sequence[Sequence[FusableLayer]], leaves: Sequence[torch.nn.Parameter]
) -> list[tuple[FusableLayer, FusedLoraOutput]]:
    """Fuse each group on its two leaves, A and B; return each layer with the module that replaces it."""
    replacements = []
    for group, a, b in zip(groups, leaves[::2], leaves[1::2], strict=True):
        fused = FusedLoraLinear([member.layer for member in group], a, b)
        replacements += [(member, FusedLoraOutput(fused, index)) for index, member in enumerate(group)]
    return replacements


def _split_into_views(flat: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Return consecutive parts of a flat tensor as views with these shapes."""
    return [part.view(*shape) for part, shape in zip(flat.split([*map(math.prod, shapes)]), shapes, strict=True)]
