"""The output head of the CUDA-graph step: loss, gradient and metrics of hidden states, compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hw3.modeling.float16_products import multiply, round_to_float16

# Positions whose logits are in memory at once: a quarter GiB of bfloat16 with Gemma's vocabulary.
HEAD_CHUNK_POSITIONS = 512
# Their number is padded to a multiple of this, so that few shapes are compiled, all of them fast on the hardware.
HEAD_PADDING_MULTIPLE = 64
# Positions in the example for which the head is compiled. No model has it as its hidden size; the compiler would take
# two equal sizes for the same variable.
EXAMPLE_POSITIONS = HEAD_CHUNK_POSITIONS - HEAD_PADDING_MULTIPLE
# Kernels that add in different orders round differently. Inductor would measure several configurations of a kernel and
# take the fastest, and it would load kernels that another process compiled for rows of other lengths.
INDUCTOR_OPTIONS: dict[str, Any] = {"deterministic": True, "fx_graph_cache": False}


def output_head_loss_and_grad(
    states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    step_output_tokens: torch.Tensor,
    logit_cap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the cross-entropy of hidden states under the output head, and its gradient in closed form.

    With z = c * tanh(x / c), c the cap (Gemma-2, arXiv:2408.00118, section 2; z = x without a cap), the gradient of
    -log softmax(z)[target] with respect to x is (softmax(z) - onehot(target)) * (1 - (z / c)^2).

    Args:
        states: last hidden states, shape (K, D).
        weight: of the head, shape (V, D). If it is float16, `states` are float32.
        targets: token ids to predict, shape (K,); -1 for a position to ignore.
        step_output_tokens: output tokens of the complete optimizer step, a scalar.
        logit_cap: soft-cap of the logits; None without one.

    Returns:
        float32 sums over the K positions, shape (3,): the loss divided by `step_output_tokens`, the entropy in nats,
        and the number of targets that had the highest probability. Then the gradient of that loss with respect to
        `states`, shape (K, D).
    """
    if weight.dtype == torch.float16:
        rounded, scale = round_to_float16(states)
        logits = multiply(rounded, weight.T) * scale
    else:
        logits = (states @ weight.T).float()
    if logit_cap is not None:
        logits = torch.tanh(logits / logit_cap) * logit_cap
    is_counted = (targets >= 0).float()
    log_total = torch.logsumexp(logits, dim=-1)
    target_logits = logits.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    probabilities = torch.exp(logits - log_total[:, None])
    entropy = log_total - (probabilities * logits).sum(-1)
    is_correct = (target_logits >= logits.amax(-1)).float()
    onehot = torch.arange(weight.shape[0], device=states.device) == targets[:, None]
    gradient = (probabilities - onehot.to(probabilities.dtype)) * (is_counted / step_output_tokens)[:, None]
    if logit_cap is not None:
        gradient = gradient * (1 - (logits / logit_cap) ** 2)
    loss = (log_total - target_logits) / step_output_tokens
    sums = (torch.stack([loss, entropy, is_correct]) * is_counted).sum(1)
    if weight.dtype == torch.float16:
        rounded, scale = round_to_float16(gradient)
        return sums, multiply(rounded, weight) * scale
    return sums, gradient.to(states.dtype) @ weight


@torch.no_grad()
def compile_output_head(
    weight: torch.Tensor, dtype: torch.dtype, logit_cap: float | None
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Compile `output_head_loss_and_grad`.

    The compiler chooses the order of sums by the sizes that it sees first. It sees an example here, so that the kernels
    of a resumed run do not depend on the rows of its first step.

    Args:
        weight: of the head, shape (V, D).
        dtype: of the hidden states.
        logit_cap: soft-cap of the logits; None without one.
    """
    head = torch.compile(output_head_loss_and_grad, dynamic=True, options=INDUCTOR_OPTIONS)
    states = torch.zeros(EXAMPLE_POSITIONS, weight.shape[1], dtype=dtype, device=weight.device)
    targets = torch.zeros(EXAMPLE_POSITIONS, dtype=torch.long, device=weight.device)
    head(states, weight, targets, torch.ones((), device=weight.device), logit_cap)
    return head
