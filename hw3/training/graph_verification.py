"""Capture the CUDA-graph step, and compare its loss and gradient with TRL's on the rows of the first step."""

from __future__ import annotations

import gc
import logging
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from trl import SFTConfig

from hw3.common.distributed import gather_objects
from hw3.common.errors import first_line
from hw3.data.collator import CompletionOnlyCollator
from hw3.data.tokenization import IGNORE_INDEX
from hw3.modeling.float16_products import get_activation_dtype
from hw3.training.cuda_graph_support import NUM_METRICS, CudaGraphStep, count_unused_reserved_bytes
from hw3.training.memory_estimate import GIB
from hw3.training.step_strategy import HEADROOM_FRACTION, StepStrategy

# Largest relative differences from TRL's loss and gradient. Rounding in bfloat16 makes 1e-4 and 0.03 in a 2B model; in
# the tiny model it makes 5e-3 of loss.
MAX_LOSS_DIFFERENCE, MAX_GRADIENT_DIFFERENCE = 0.02, 0.15
# With dropout the two steps draw different numbers: only the loss and the gradient's norm can be compared, roughly.
MAX_LOSS_DIFFERENCE_WITH_DROPOUT, MAX_NORM_DIFFERENCE_WITH_DROPOUT = 0.05, 0.5
# Standard deviation of the random adapters that are used for the comparison.
ADAPTER_STD = 0.02


@dataclass(frozen=True)
class CaptureResult:
    """The CUDA-graph step, or why it cannot be used.

    Attributes:
        step: the step; None if it cannot be used.
        failure: the reason, as the end of a sentence about the step; None if it can be used.
        seconds: time to compile, capture and run the step once.
    """

    step: CudaGraphStep | None = None
    failure: str | None = None
    seconds: float = 0.0


def capture_verified_step(
    model: PeftModel,
    collator: CompletionOnlyCollator,
    rows: list[dict[str, Any]],
    strategy: StepStrategy,
    args: SFTConfig,
    captured: CudaGraphStep | None = None,
) -> CaptureResult:
    """Capture the CUDA-graph step, and compare it with TRL's step. All processes get the same decision.

    Args:
        model: the model with its adapters, which are unchanged afterwards.
        collator: the run's collator.
        rows: the rows of the first optimizer step, over all processes, each with `input_ids` and `labels`.
        strategy: how steps are computed.
        args: the Trainer's arguments.
        captured: a step that was captured for another run with the same base model, shapes and constants.
    """
    try:
        result = _capture_and_compare(model, collator, rows, strategy, args, captured)
    except Exception as error:  # a failure of compiler, driver or memory must not end the run: TRL's step works
        logging.getLogger(__name__).debug("capturing the step failed", exc_info=True)
        result = CaptureResult(failure=f"failed here: {type(error).__name__}: {first_line(error)[:200]}")
    failure = next((failure for failure in gather_objects(result.failure) if failure is not None), None)
    return result if failure is None else CaptureResult(failure=failure)


def _capture_and_compare(
    model: PeftModel,
    collator: CompletionOnlyCollator,
    rows: list[dict[str, Any]],
    strategy: StepStrategy,
    args: SFTConfig,
    captured: CudaGraphStep | None,
) -> CaptureResult:
    device, rows_per_device = args.device, strategy.layout.rows_per_device
    first_row = args.process_index * rows_per_device
    own_rows = rows[first_row : first_row + rows_per_device]
    output_tokens = sum(label != IGNORE_INDEX for row in rows for label in row["labels"])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    saved = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # The B of a new adapter is zero, so its A would get no gradient.
        for parameter in parameters:
            parameter.data.normal_(std=ADAPTER_STD)
        try:
            expected = _reference_loss_and_grad(model, collator, own_rows, output_tokens, device)
            start = time.monotonic()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", category=UserWarning, module="torch._inductor")
                step = captured or CudaGraphStep(
                    model, rows_per_device, strategy.bucket_lengths, strategy.tokens_per_replay
                )
                if captured is not None:
                    step.train_adapters(model)
                step.start_step()
                batch = send_to_device(collator(own_rows), device)
                step.accumulate(**cuda_graph_inputs(batch), tokens=torch.tensor(output_tokens, device=device))
            found = step.buffer[-NUM_METRICS].item(), _flatten_gradients(parameters)
            seconds = time.monotonic() - start
        finally:
            for parameter, values in zip(parameters, saved, strict=True):
                parameter.data.copy_(values)
                parameter.grad = None
    failure = _describe_difference(found, expected, _has_dropout(model)) or _describe_memory_shortage(strategy, device)
    return CaptureResult(step if failure is None else None, failure, seconds)


def cuda_graph_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a batch that `CudaGraphStep.accumulate` takes."""
    names = ("input_ids", "attention_mask", "output_positions", "output_ids", "outputs_per_row")
    return {name: batch[name] for name in names}


def _reference_loss_and_grad(
    model: PeftModel,
    collator: CompletionOnlyCollator,
    rows: list[dict[str, Any]],
    output_tokens: int,
    device: torch.device,
) -> tuple[float, torch.Tensor]:
    """Return the loss of rows by TRL's forward, and its gradient; one row at a time to save memory.

    There is no collective here: a process that fails must not leave the others waiting.
    """
    collator = CompletionOnlyCollator(collator.pad_token_id, collator.eos_token_id)
    total_loss, dtype = 0.0, get_activation_dtype(model.dtype)
    model.train()
    for row in rows:
        batch = send_to_device(collator([row]), device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            outputs = model(**batch, use_cache=False, fused_lm_head=True)
        loss = -outputs.log_probs.sum() / output_tokens
        loss.backward()
        total_loss += loss.item()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradient = _flatten_gradients(parameters)
    for parameter in parameters:
        parameter.grad = None
    del batch, outputs, loss
    gc.collect()  # reference cycles of the forward would keep its memory while the graphs are captured
    torch.cuda.empty_cache()
    return total_loss, gradient


def _flatten_gradients(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """Return the concatenated gradients, on the CPU to save GPU memory."""
    gradients = []
    for parameter in parameters:
        assert parameter.grad is not None, "the step computes the gradient of every trained parameter"
        gradients.append(parameter.grad.flatten().cpu())
    return torch.cat(gradients)


def _has_dropout(model: PeftModel) -> bool:
    dropout = any(isinstance(module, torch.nn.Dropout) and module.p for module in model.modules())
    return dropout or bool(getattr(model.config, "attention_dropout", 0))


def _describe_difference(
    found: tuple[float, torch.Tensor], expected: tuple[float, torch.Tensor], has_dropout: bool
) -> str | None:
    """Return how (loss, gradient) differ from TRL's if they differ by more than rounding, or are NaN."""
    (loss, gradient), (expected_loss, expected_gradient) = found, expected
    max_difference = MAX_LOSS_DIFFERENCE_WITH_DROPOUT if has_dropout else MAX_LOSS_DIFFERENCE
    if not abs(loss - expected_loss) <= max_difference * expected_loss:
        return f"has a loss of {loss:.5f} in the first step, and TRL's has {expected_loss:.5f}"
    if has_dropout:
        difference = abs(gradient.norm() / expected_gradient.norm() - 1).item()
        max_difference = MAX_NORM_DIFFERENCE_WITH_DROPOUT
    else:
        difference = ((gradient - expected_gradient).norm() / expected_gradient.norm()).item()
        max_difference = MAX_GRADIENT_DIFFERENCE
    if not difference <= max_difference:
        return f"has a gradient in the first step that differs by {difference:.1%} from TRL's"
    return None


def _describe_memory_shortage(strategy: StepStrategy, device: torch.device) -> str | None:
    """Return how much memory would be left, if that is less than the headroom. The optimizer's state is yet to come."""
    free, total = torch.cuda.mem_get_info(device)
    # Only the graphs can use the memory that their own pool reserves.
    unused = count_unused_reserved_bytes(device, in_graph_pools=False)
    left = free + unused - strategy.memory.optimizer
    if left >= HEADROOM_FRACTION * total:
        return None
    return f"would leave {left / GIB:.1f} of {total / GIB:.1f} GiB free, less than {HEADROOM_FRACTION:.0%}"
