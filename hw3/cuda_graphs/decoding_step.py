"""Capture a decoding step as a CUDA graph and replay it.

A step that appends one token to every row launches about a thousand small kernels. Launched one by one they take as
long for a hundred rows as for one. A CUDA graph launches all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from hw3.modeling.attention_masks import MASK_PER_LAYER_TYPE


class ReplayedStep:
    """Run a step eagerly once, capture its second run as a CUDA graph, and replay the graph from then on.

    The eager run loads every kernel that the capture needs. The step must read and write the same tensors in every run,
    and must not read values on the CPU. Call `reset` before tensors are replaced or change their shape.
    """

    def __init__(self) -> None:
        self._output: torch.Tensor | None = None  # of the last run, if nothing has changed since
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, run_step: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run, capture or replay the step.

        Args:
            run_step: the step, the same in every call. It is not stored: a reference cycle with the caller would keep
                GPU memory allocated until the garbage collector runs.

        Returns:
            The step's output. The next call overwrites it.
        """
        if self._graph is None and self._output is not None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._output = run_step()
            self._graph = graph
        if self._graph is not None:
            self._graph.replay()
        else:
            self._output = run_step()
        assert self._output is not None, "a replay overwrites the output of the captured run"
        return self._output

    def reset(self) -> None:
        """Delete the graph and free its memory. The next call runs the step eagerly."""
        self._graph = self._output = None


def can_capture(model: PreTrainedModel) -> bool:
    """Return whether a decoding step of this model can be a CUDA graph.

    The architecture and its attention must be known to work, all weights must be on one GPU, and no operation may read
    values on the CPU. A dynamic RoPE does, and so do some adapters other than LoRA.
    """
    config = model.config.get_text_config()
    is_known = config.model_type in MASK_PER_LAYER_TYPE and config._attn_implementation in ("eager", "sdpa")
    rope = getattr(config, "rope_parameters", None) or {}
    adapters = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    is_static = rope.get("rope_type") != "dynamic" and all(isinstance(module, LoraLayer) for module in adapters)
    devices = {parameter.device for parameter in model.parameters()}
    return is_known and is_static and len(devices) == 1 and devices.pop().type == "cuda"
