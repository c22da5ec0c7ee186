"""Forward and backward as CUDA graphs: the step of a small batch without launching its thousands of kernels.

8 short rows keep a large GPU busy for some 30 ms, but launching their kernels one by one takes its CPU ten times that.
Here the decoder layers are compiled and the backbone is captured once a width of batch, forward and backward apart. The
head runs between the two, on output positions alone, so their number may vary freely.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.config
from torch.nn.functional import pad
from transformers import PreTrainedModel

from hw3.cuda_graphs.fused_lora import LoraLinear, LoraLinears, adapter_weights, replaceable
from hw3.modeling.attention_masks import masks_for

TOKENS = (1152, 768, 384)  # most of one replay: more are hardly faster, and activations grow with them
HEAD_POSITIONS = 512  # whose logits are alive at once: a quarter GiB of bfloat16 for Gemma's vocabulary
HEAD_STEP = 64  # their number is a multiple of this: few shapes to compile, each of which suits the hardware
WIDTH_STEP, WIDE_STEP, WIDE = 16, 64, 256  # widths are multiples of the first up to the third, of the second beyond
SUMS = 3  # loss, entropy and top-1 hits, carried behind the gradients


def widths_for(lengths: Sequence[int]) -> tuple[int, ...]:
    """The widths that batches of rows of these lengths are padded to, ascending."""
    steps = ((length, WIDTH_STEP if length <= WIDE else WIDE_STEP) for length in lengths)
    return tuple(sorted({-(-length // step) * step for length, step in steps}))


def rows_at_once(rows: int, width: int, most: int) -> int:
    """Rows of one replay: a step's rows in as few even parts as keep each within `most` tokens, or of one row."""
    parts = -(-rows // max(1, most // width))
    return -(-rows // parts)


def head_step(
    states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, tokens: torch.Tensor, cap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of hidden states under the output head, and its gradient, written out.

    With z = cap * tanh(x / cap) (Gemma-2, arXiv:2408.00118, section 2; z = x without a cap), the gradient of
    -log softmax(z)[target] by x is (softmax(z) - onehot(target)) * (1 - (z / cap)^2).

    Args:
        states: last hidden states, shape (K, D).
        weight: of the head, shape (V, D).
        targets: ids to predict, shape (K,); -1 for a position that does not count.
        tokens: output tokens of the whole optimizer step, a scalar.
        cap: soft-cap of the logits.

    Returns:
        float32 sums over the K positions, shape (3,): the loss divided by `tokens`, the entropy in nats, and the
        targets that were the likeliest; and the gradient of that loss by `states`, shape (K, D).
    """
    logits = (states @ weight.T).float()
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    counts = (targets >= 0).float()
    log_total = torch.logsumexp(logits, dim=-1)
    picked = logits.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    probabilities = torch.exp(logits - log_total[:, None])
    entropy = log_total - (probabilities * logits).sum(-1)
    hits = (picked >= logits.amax(-1)).float()
    onehot = torch.arange(weight.shape[0], device=states.device) == targets[:, None]
    gradient = (probabilities - onehot.to(probabilities.dtype)) * (counts / tokens)[:, None]
    if cap is not None:
        gradient = gradient * (1 - (logits / cap) ** 2)
    loss = (log_total - picked) / tokens
    sums = (torch.stack([loss, entropy, hits]) * counts).sum(1)
    return sums, gradient.to(states.dtype) @ weight


class CapturedStep:
    """Forward and backward of an optimizer step's rows, their gradients summed into one flat buffer.

    Adapters are float32; the graphs read copies of them in the compute dtype, made once a step, as autocast would make
    them at every use. Plain LoRA layers become `LoraLinear`; those with dropout or a variant of LoRA stay PEFT's.
    Nothing here reads a value back to the CPU.

    Args:
        model: the model with its adapters; weights of the base are in the compute dtype, or 4-bit ones.
        rows: this process's rows of an optimizer step.
        widths: tokens that a batch may be padded to, ascending.
        most: tokens of one replay, where a row has no more.

    Attributes:
        buffer: every trained parameter's gradient, end to end, float32, and behind them the sums of `head_step`, so
            that one all-reduce carries them all.
    """

    def __init__(self, model: PreTrainedModel, rows: int, widths: Sequence[int], most: int) -> None:
        self._peft, self._model = model, model.get_base_model()
        self._config = self._model.config.get_text_config()
        self._rows, self._most, self._dtype = rows, most, self._model.dtype
        groups = replaceable(model)
        # What the graphs take a gradient by: the A of layers of one input, their B, and every other trained parameter.
        leaves = [side for group in groups for side in adapter_weights([layer for *_, layer in group])]
        seen = {id(parameter) for leaf in leaves for parameter in leaf}
        others = [weight for weight in model.parameters() if weight.requires_grad and id(weight) not in seen]
        leaves += [[parameter] for parameter in others]
        self._parameters = [parameter for leaf in leaves for parameter in leaf]
        shapes = [parameter.shape for parameter in self._parameters]
        joined = [(sum(len(part) for part in leaf), *leaf[0].shape[1:]) for leaf in leaves]
        count = sum(map(math.prod, shapes))
        self.buffer = torch.zeros(count + SUMS, device=model.device)
        self._gradients = _views(self.buffer[:-SUMS], shapes)
        copies = torch.zeros(count, dtype=self._dtype, device=model.device)
        self._copies = _views(copies, shapes)
        self._leaves = [torch.nn.Parameter(copy) for copy in _views(copies, joined)]
        self._layers = []
        for number, group in enumerate(groups):
            together = LoraLinears([layer for *_, layer in group], *self._leaves[2 * number : 2 * number + 2])
            self._layers += [(*place, LoraLinear(together, index)) for index, place in enumerate(group)]
        self._copy_of = dict(zip(map(id, others), self._leaves[2 * len(groups) :], strict=True))
        count = max(rows_at_once(rows, width, most) * width for width in widths)
        # Inputs and outputs of every graph; smaller batches use their beginning.
        self._ids = torch.zeros(count, dtype=torch.long, device=model.device)
        self._mask = torch.zeros(count, dtype=torch.long, device=model.device)
        self._hidden = torch.zeros(count, self._config.hidden_size, dtype=self._dtype, device=model.device)
        self._outer = torch.zeros_like(self._hidden)
        # With most tokens first: the others then fit into its memory.
        self._replays = self._capture(sorted(widths, key=lambda width: -rows_at_once(rows, width, most) * width))

    def _capture(self, widths: Sequence[int]) -> dict[int, tuple[Any, Any]]:
        """Graphs of the forward and the backward by width, each with `replay()`."""
        # No code for the CPU is made here; to find out what it can do takes the compiler half a minute.
        torch._inductor.config.cpp.vec_isa_ok = False
        for layer in self._model.base_model.layers:
            layer.compile(dynamic=True)
        self._head = torch.compile(head_step, dynamic=True)
        pool, stream, default = torch.cuda.graph_pool_handle(), torch.cuda.Stream(), torch.cuda.default_stream()
        graphs = {}
        torch._C._cuda_clearCublasWorkspaces()  # 32 MiB for each stream and thread that has multiplied before
        with self.rebuilt(), torch.cuda.stream(stream):
            stream.wait_stream(default)
            # Norms and products of one element each are computed again in the backward, for a third of the memory.
            with torch._functorch.config.patch(ban_recompute_materialized_backward=False):
                for width in widths:
                    self.backward(self.forward(width))  # compiles, and loads every kernel
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # what that held, the graphs' own memory pool will need
            for width in widths:
                graphs[width] = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
                with torch.cuda.graph(graphs[width][0], pool=pool, stream=stream):
                    hidden = self.forward(width)
                with torch.cuda.graph(graphs[width][1], pool=pool, stream=stream):
                    self.backward(hidden)
                del hidden
        default.wait_stream(stream)
        return graphs

    @contextmanager
    def rebuilt(self) -> Iterator[None]:
        """The model as it is captured: adapters' copies, one operation a linear layer, embeddings with a gradient."""
        parameters = [
            (module, name, parameter)
            for module in self._peft.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if id(parameter) in self._copy_of
        ]
        for module, name, parameter in parameters:
            module._parameters[name] = self._copy_of[id(parameter)]
        for parent, name, _, ours in self._layers:
            parent._modules[name] = ours
        # With it the first layer is compiled like all others.
        hook = self._model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_())
        try:
            yield
        finally:
            hook.remove()
            for parent, name, layer, _ in self._layers:
                parent._modules[name] = layer
            for module, name, parameter in parameters:
                module._parameters[name] = parameter

    def forward(self, width: int) -> torch.Tensor:
        """The backbone's last hidden states of the static inputs, shape (B, L, D); the static output is written too."""
        rows = rows_at_once(self._rows, width, self._most)
        ids, mask = (buffer[: rows * width].view(rows, width) for buffer in (self._ids, self._mask))
        with torch.autocast(ids.device.type, self._dtype, enabled=self._dtype != torch.float32, cache_enabled=False):
            hidden = self._model.base_model(
                input_ids=ids,
                attention_mask=masks_for(self._model, mask),
                position_ids=torch.arange(width, device=ids.device)[None],
                use_cache=False,
            ).last_hidden_state
        self._hidden[: rows * width].copy_(hidden.detach().flatten(0, 1))
        return hidden

    def backward(self, hidden: torch.Tensor) -> None:
        """Add the gradients that the static outer gradient gives, to the buffer."""
        rows, width, _ = hidden.shape
        gradients = torch.autograd.grad(hidden, self._leaves, self._outer[: rows * width].view_as(hidden))
        # They come in the compute dtype, one GEMM each; end to end, one kernel adds them all.
        self.buffer[:-SUMS] += torch.cat([gradient.flatten() for gradient in gradients])

    def begin(self) -> None:
        """Begin an optimizer step: gradients to zero, adapters as they are now, each `.grad` a view of the buffer."""
        self.buffer.zero_()
        with torch.no_grad():
            torch._foreach_copy_(self._copies, self._parameters)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    @torch.no_grad()
    def add(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        output_positions: torch.Tensor,
        output_ids: torch.Tensor,
        outputs_per_row: Sequence[int],
        tokens: torch.Tensor,
    ) -> None:
        """Add the gradients and sums of a step's rows to the buffer.

        Args:
            input_ids: shape (B, L), B the step's rows, L one of the widths.
            attention_mask: shape (B, L), 1 on tokens, 0 on padding.
            output_positions: the positions that predict an output token, as indices into B * L, row by row; shape (K,).
            output_ids: the tokens they predict, shape (K,).
            outputs_per_row: how many of the K belong to each row.
            tokens: output tokens of the whole optimizer step, over all processes; a scalar on the device.
        """
        rows, width = input_ids.shape
        forward, backward = self._replays[width]
        part = rows_at_once(self._rows, width, self._most)
        count, done = part * width, 0
        weight, cap = self._model.get_output_embeddings().weight, getattr(self._config, "final_logit_softcapping", None)
        for first in range(0, rows, part):
            real = min(part, rows - first) * width
            self._ids[:real].copy_(input_ids[first : first + part].reshape(-1))
            self._mask[:real].copy_(attention_mask[first : first + part].reshape(-1))
            forward.replay()
            outer = self._outer[:count]
            outer.zero_()
            outputs = sum(outputs_per_row[first : first + part])
            more = -outputs % HEAD_STEP
            places = pad(output_positions[done : done + outputs] - first * width, (0, more))
            targets = pad(output_ids[done : done + outputs], (0, more), value=-1)
            states = self._hidden[places]
            for at in range(0, len(targets), HEAD_POSITIONS):
                piece = slice(at, at + HEAD_POSITIONS)
                sums, gradient = self._head(states[piece], weight, targets[piece], tokens, cap)
                outer.index_add_(0, places[piece], gradient)
                self.buffer[-SUMS:] += sums
            backward.replay()
            done += outputs


def unallocated_bytes(device: torch.device, *, of_graphs: bool) -> int:
    """Bytes that PyTorch has reserved on a GPU and not allocated: in the graphs' own pools, or for all to use."""
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if segment["device"] == device.index and (tuple(segment["segment_pool_id"]) != (0, 0)) == of_graphs
    )


def _views(flat: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """A flat tensor's parts, end to end, in these shapes."""
    return [part.view(*shape) for part, shape in zip(flat.split([*map(math.prod, shapes)]), shapes, strict=True)]
