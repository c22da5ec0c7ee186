"""Capture the CUDA-graph step, and compare its loss and gradient with TRL's on the rows of the first step."""

from __future__ import annotations

import gc
import logging
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from torch.nn.utils import get_total_norm
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
# If only few layers of each type differ by more, the gradient as a whole may differ by this. The same code computes all
# layers of a type (such as with a sliding window), and rounding in bfloat16 can change the gradient of the first three
# layers of SmolLM2 by half, in TRL's step too.
MAX_DIFFERENCE_IN_FEW_LAYERS = 0.5
# With dropout the two steps draw different numbers: only the loss and the gradient's norm can be compared, roughly.
MAX_LOSS_DIFFERENCE_WITH_DROPOUT, MAX_NORM_DIFFERENCE_WITH_DROPOUT = 0.05, 0.5
# Largest relative differences of loss and gradient norm when the same graphs compute the same step again: sums that are
# added in another order.
MAX_REUSE_DIFFERENCE = 1e-3
# Standard deviation of the random adapters that are used for the comparison.
ADAPTER_STD = 0.02


@dataclass(frozen=True)
class VerifiedStep:
    """A CUDA-graph step that agrees with TRL's step, and what it computed in the comparison.

    Attributes:
        step: the step.
        batch: the rows of the comparison, as `CudaGraphStep.accumulate` takes them.
        loss: their loss with the random adapters.
        gradient_norm: the norm of their gradient.
    """

    step: CudaGraphStep
    batch: dict[str, Any]
    loss: float
    gradient_norm: float


@dataclass(frozen=True)
class CaptureResult:
    """The CUDA-graph step, or why it cannot be used.

    Attributes:
        verified: the step; None if it cannot be used.
        failure: the reason, as the end of a sentence about the step; None if it can be used.
        seconds: time to compile, capture and run the step once.
    """

    verified: VerifiedStep | None = None
    failure: str | None = None
    seconds: float = 0.0


def capture_verified_step(
    model: PeftModel,
    collator: CompletionOnlyCollator,
    rows: list[dict[str, Any]],
    strategy: StepStrategy,
    args: SFTConfig,
    captured: VerifiedStep | None = None,
) -> CaptureResult:
    """Capture the CUDA-graph step, and compare it with TRL's step. All processes get the same decision.

    A step that was captured and compared for another run is only checked: with the adapters of the comparison, it must
    compute the same loss and gradient again.

    Args:
        model: the model with its adapters, which are unchanged afterwards.
        collator: the run's collator.
        rows: the rows of the first optimizer step, over all processes, each with `input_ids` and `labels`.
        strategy: how steps are computed.
        args: the Trainer's arguments.
        captured: a step of another run with the same base model, shapes and constants.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        with _random_adapters(parameters, keep_on_device=captured is not None):
            if captured is None:
                result = _capture_and_compare(model, collator, rows, strategy, args)
            else:
                result = _reuse(captured, model)
        failure = result.failure or _describe_memory_shortage(strategy, args.device)
    except Exception as error:  # a failure of compiler, driver or memory must not end the run: TRL's step works
        logging.getLogger(__name__).debug("capturing the step failed", exc_info=True)
        failure = f"failed here: {type(error).__name__}: {first_line(error)[:200]}"
    failure = next((failure for failure in gather_objects(failure) if failure is not None), None)
    return result if failure is None else CaptureResult(failure=failure)


@contextmanager
def _random_adapters(parameters: list[torch.nn.Parameter], *, keep_on_device: bool) -> Iterator[None]:
    """Give the adapters random values inside the block, which are the same for every run, and no gradient afterwards.

    The B of a new adapter is zero, so its A would get no gradient.

    Args:
        parameters: the adapters.
        keep_on_device: copy the adapters on their device; on the CPU, they need no GPU memory that a capture may need.
    """
    device = parameters[0].device
    generator = torch.Generator(device).manual_seed(0)
    saved = [parameter.detach().to(device if keep_on_device else "cpu", copy=True) for parameter in parameters]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # dropout draws from it
        try:
            for parameter in parameters:
                parameter.data.normal_(std=ADAPTER_STD, generator=generator)
            yield
        finally:
            for parameter, values in zip(parameters, saved, strict=True):
                parameter.data.copy_(values)
                parameter.grad = None


def _capture_and_compare(
    model: PeftModel,
    collator: CompletionOnlyCollator,
    rows: list[dict[str, Any]],
    strategy: StepStrategy,
    args: SFTConfig,
) -> CaptureResult:
    """Capture the step, and compare it with TRL's step for the present values of the adapters."""
    device, rows_per_device = args.device, strategy.layout.rows_per_device
    first_row = args.process_index * rows_per_device
    own_rows = rows[first_row : first_row + rows_per_device]
    output_tokens = sum(label != IGNORE_INDEX for row in rows for label in row["labels"])
    expected = _reference_loss_and_grad(model, collator, own_rows, output_tokens, device)
    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torch._inductor")
        step = CudaGraphStep(model, rows_per_device, strategy.bucket_lengths, strategy.tokens_per_replay)
        batch = cuda_graph_inputs(send_to_device(collator(own_rows), device))
        batch["tokens"] = torch.tensor(output_tokens, device=device)
        step.start_step()
        step.accumulate(**batch)
    found = step.buffer[-NUM_METRICS].item(), _copy_gradients(model)
    seconds = time.monotonic() - start
    layer_types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    failure = _describe_difference(found, expected, _has_dropout(model), layer_types)
    verified = VerifiedStep(step, batch, found[0], get_total_norm(found[1].values()).item())
    return CaptureResult(verified, failure, seconds)


def _reuse(captured: VerifiedStep, model: PeftModel) -> CaptureResult:
    """Let a step train other adapters, and check that it computes with them what it has computed before."""
    start, step = time.monotonic(), captured.step
    step.train_adapters(model)
    step.start_step()
    step.accumulate(**captured.batch)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    loss, norm = step.buffer[-NUM_METRICS].item(), get_total_norm(gradients).item()
    has_dropout = _has_dropout(model)
    max_loss = MAX_LOSS_DIFFERENCE_WITH_DROPOUT if has_dropout else MAX_REUSE_DIFFERENCE
    max_norm = MAX_NORM_DIFFERENCE_WITH_DROPOUT if has_dropout else MAX_REUSE_DIFFERENCE
    failure = None
    if not abs(loss - captured.loss) <= max_loss * captured.loss:
        failure = f"has a loss of {loss:.5f} when it is reused, and {captured.loss:.5f} before"
    elif not abs(norm - captured.gradient_norm) <= max_norm * captured.gradient_norm:
        failure = f"has a gradient norm of {norm:.5f} when it is reused, and {captured.gradient_norm:.5f} before"
    return CaptureResult(captured, failure, time.monotonic() - start)


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
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss of rows by TRL's forward, and its gradients; one row at a time to save memory.

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
    gradients = _copy_gradients(model)
    for parameter in model.parameters():
        parameter.grad = None
    del batch, outputs, loss
    gc.collect()  # reference cycles of the forward would keep its memory while the graphs are captured
    torch.cuda.empty_cache()
    return total_loss, gradients


def _copy_gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return the gradient of each trained parameter by name, on the CPU to save GPU memory."""
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, "the step computes the gradient of every trained parameter"
            gradients[name] = parameter.grad.to("cpu", copy=True)
    return gradients


def _has_dropout(model: PeftModel) -> bool:
    dropout = any(isinstance(module, torch.nn.Dropout) and module.p for module in model.modules())
    return dropout or bool(getattr(model.config, "attention_dropout", 0))


def _describe_difference(
    found: tuple[float, dict[str, torch.Tensor]],
    expected: tuple[float, dict[str, torch.Tensor]],
    has_dropout: bool,
    layer_types: Sequence[str],
) -> str | None:
    """Return how (loss, gradients) differ from TRL's if they differ by more than rounding, or are NaN.

    `layer_types` is as in the model's configuration, empty if all layers are of one type.
    """
    (loss, gradients), (expected_loss, expected_gradients) = found, expected
    max_difference = MAX_LOSS_DIFFERENCE_WITH_DROPOUT if has_dropout else MAX_LOSS_DIFFERENCE
    if not abs(loss - expected_loss) <= max_difference * expected_loss:
        return f"has a loss of {loss:.5f} in the first step, and TRL's has {expected_loss:.5f}"
    expected_norm = get_total_norm(expected_gradients.values())
    if has_dropout:
        difference = abs(get_total_norm(gradients.values()) / expected_norm - 1).item()
        max_difference = MAX_NORM_DIFFERENCE_WITH_DROPOUT
    else:
        errors = {name: gradients[name] - gradient for name, gradient in expected_gradients.items()}
        difference = (get_total_norm(errors.values()) / expected_norm).item()
        median = _median_difference(errors, expected_gradients, layer_types)
        is_in_few_layers = median <= MAX_GRADIENT_DIFFERENCE
        max_difference = MAX_DIFFERENCE_IN_FEW_LAYERS if is_in_few_layers else MAX_GRADIENT_DIFFERENCE
    if not difference <= max_difference:
        return f"has a gradient in the first step that differs by {difference:.1%} from TRL's"
    return None


def _median_difference(
    errors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], layer_types: Sequence[str]
) -> float:
    """Return the median of the layers' relative differences, for the kind of parameter for which it is largest.

    Args:
        errors: differences of the gradients by name of the parameter; the A of all `v_proj` of one type of layer are a
            kind.
        expected: TRL's gradients.
        layer_types: as for `_describe_difference`.
    """
    kinds: dict[tuple[str, str], list[torch.Tensor]] = {}
    for name, error in errors.items():
        layer = re.search(r"\blayers\.(\d+)\.", name)
        layer_type = layer_types[int(layer[1])] if layer and layer_types else ""
        kind = layer_type, re.sub(r"\.\d+\.", ".", name)
        kinds.setdefault(kind, []).append(error.norm() / expected[name].norm())
    return max(torch.stack(differences).nanquantile(0.5).item() for differences in kinds.values())


def _describe_memory_shortage(strategy: StepStrategy, device: torch.device) -> str | None:
    """Return how much memory would be left, if that is less than the headroom. The optimizer's state is yet to come."""
    free, total = torch.cuda.mem_get_info(device)
    # Only the graphs can use the memory that their own pool reserves.
    unused = count_unused_reserved_bytes(device, in_graph_pools=False)
    left = free + unused - strategy.memory.optimizer
    if left >= HEADROOM_FRACTION * total:
        return None
    return f"would leave {left / GIB:.1f} of {total / GIB:.1f} GiB free, less than {HEADROOM_FRACTION:.0%}"
