"""CUDA graphs' way on a CPU: operations recorded once and done again on the same memory, Python left out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

LOOKS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "unique", "linalg")  # at values


class RecordedGraph(TorchDispatchMode):
    """In the place of `torch.cuda.CUDAGraph`; entered, in that of `torch.cuda.graph`.

    What is recorded has no effect, as in a capture, and an operation that looks at values is refused.
    """

    captures = replays = 0

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.made: dict[int, torch.Tensor] = {}
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(word in str(function) for word in LOOKS):
            raise RuntimeError(f"{function}: operation not permitted when stream is capturing")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if function._schema.is_mutable:
            for tensor in given:
                if id(tensor) not in self.made and id(tensor) not in self.before:
                    self.before[id(tensor)] = tensor, tensor.clone()
        out = function(*args, **kwargs)
        self.operations.append((function, args, kwargs, out))
        for tensor in tree_leaves(out):
            if not any(tensor is one for one in given):
                self.made[id(tensor)] = tensor
        return out

    def ended(self) -> None:
        """Undo what was done; the last operation's output is the graph's."""
        for tensor, value in self.before.values():
            tensor.copy_(value)
        self.operations[-1][3].fill_(float("nan"))
        RecordedGraph.captures += 1

    def replay(self) -> None:
        """Every operation again, on the memory that it was recorded with."""
        now: dict[int, Any] = {}
        for function, args, kwargs, out in self.operations:
            args, kwargs = tree_map(lambda leaf: now.get(id(leaf), leaf), (args, kwargs))
            for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                if id(old) in self.made:
                    now[id(old)] = new
        last = self.operations[-1][3]
        last.copy_(now[id(last)])
        RecordedGraph.replays += 1


@contextlib.contextmanager
def recording(graph: RecordedGraph) -> Iterator[None]:
    """In the place of `torch.cuda.graph`."""
    with graph:
        yield
    graph.ended()


def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> type[RecordedGraph]:
    """Have steps captured; returns the counts of captures and replays, which begin at 0."""
    RecordedGraph.captures = RecordedGraph.replays = 0
    monkeypatch.setattr("hw3.generation.decoder.can_capture", lambda model: True)
    monkeypatch.setattr("torch.cuda.CUDAGraph", RecordedGraph)
    monkeypatch.setattr("torch.cuda.graph", recording)
    return RecordedGraph
