"""Stand-ins for CUDA graphs that run on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from hw3.cuda_graphs.output_head import output_head_loss_and_grad
from hw3.cuda_graphs.training_step import CudaGraphStep

# Parts of the names of operations that read values, which a capture does not allow.
READING_OPERATIONS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "unique", "linalg")


class RecordedGraph(TorchDispatchMode):
    """Record operations and run them again on the same memory, without Python: a stand-in for `torch.cuda.CUDAGraph`.

    As in a capture, recorded operations have no effect, and an operation that reads values is refused.
    """

    captures = replays = 0

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.created: dict[int, torch.Tensor] = {}
        self.values_before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(name in str(function) for name in READING_OPERATIONS):
            raise RuntimeError(f"{function}: operation not permitted when stream is capturing")
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if function._schema.is_mutable:
            for tensor in inputs:
                if id(tensor) not in self.created and id(tensor) not in self.values_before:
                    self.values_before[id(tensor)] = tensor, tensor.clone()
        output = function(*args, **kwargs)
        self.operations.append((function, args, kwargs, output))
        for tensor in tree_leaves(output):
            if not any(tensor is other for other in inputs):
                self.created[id(tensor)] = tensor
        return output

    def end_capture(self) -> None:
        """Undo the operations' effects. The last operation's output is the graph's, and is NaN until a replay."""
        for tensor, value in self.values_before.values():
            tensor.copy_(value)
        self.operations[-1][3].fill_(float("nan"))
        RecordedGraph.captures += 1

    def replay(self) -> None:
        """Run every operation again, on the memory that it was recorded with."""
        replayed: dict[int, Any] = {}
        for function, args, kwargs, output in self.operations:
            args, kwargs = tree_map(lambda leaf: replayed.get(id(leaf), leaf), (args, kwargs))
            for old, new in zip(tree_leaves(output), tree_leaves(function(*args, **kwargs)), strict=True):
                if id(old) in self.created:
                    replayed[id(old)] = new
        last = self.operations[-1][3]
        last.copy_(replayed[id(last)])
        RecordedGraph.replays += 1


@contextlib.contextmanager
def record_graph(graph: RecordedGraph) -> Iterator[None]:
    """Record the operations of the block: a stand-in for `torch.cuda.graph`."""
    with graph:
        yield
    graph.end_capture()


def patch_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> type[RecordedGraph]:
    """Replace `torch.cuda.CUDAGraph` by `RecordedGraph`; return the class, which counts captures and replays from 0."""
    RecordedGraph.captures = RecordedGraph.replays = 0
    monkeypatch.setattr("torch.cuda.CUDAGraph", RecordedGraph)
    monkeypatch.setattr("torch.cuda.graph", record_graph)
    return RecordedGraph


class EagerCudaGraphStep(CudaGraphStep):
    """The CUDA-graph step, whose replays compute forward and backward eagerly instead of replaying a graph."""

    def _compile_head(self) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        return output_head_loss_and_grad

    def _capture_graphs(self, bucket_lengths: Sequence[int]) -> dict[int, tuple[Any, Any]]:
        hidden_by_length: dict[int, torch.Tensor] = {}

        @torch.enable_grad()
        def forward(length: int) -> None:
            with self.modules_replaced():
                hidden_by_length[length] = self.forward(length)

        @torch.enable_grad()
        def backward(length: int) -> None:
            self.backward(hidden_by_length.pop(length))

        return {
            length: (
                SimpleNamespace(replay=partial(forward, length)),
                SimpleNamespace(replay=partial(backward, length)),
            )
            for length in bucket_lengths
        }
