"""What `speed: auto` chooses, and why: the captured step or TRL's own, and how each shares out memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._triton import has_triton

from hw3.config.recipe import Recipe
from hw3.cuda_graphs.training_step import TOKENS, rows_at_once, widths_for
from hw3.modeling.attention_masks import MASKS_BY_KIND
from hw3.training.batch_layout import StepLayout
from hw3.training.memory_estimate import GIB, PARTS, Memory, memory_of, weight_counts

HEADROOM = 0.15  # of a GPU's memory that the captured step leaves free: other programs, fragments, longer rows
# AdamW with float32 states, the same update in each: the recipe's choice among them is one of memory and speed.
FUSED_ADAMW, PAGED_ADAMW = "adamw_torch_fused", "paged_adamw_32bit"
EQUAL_ADAMW = {"adamw_torch", FUSED_ADAMW, PAGED_ADAMW}

CONTEXT = 0.6 * GIB  # CUDA's context and the graphs, outside of PyTorch's count
GAPS = 0.4  # of its activations: what the graphs' memory pool leaves unused, since every width divides it otherwise


@dataclass(frozen=True)
class Speed:
    """How a run's steps are made.

    Attributes:
        layout: how a step's rows are shared out; micro-batches merged where that is chosen.
        captured: the captured step rather than TRL's.
        dequantized: 4-bit weights made plain once, after loading.
        activation_checkpointing: whether activations are computed again instead of kept.
        optim: `training.optim` as it is run.
        widths: what batches are padded to; empty for their own longest row.
        replayed: tokens of one replay of the captured step, where a row has no more.
        memory: what a step takes on a GPU.
        notes: lines for the user: what was chosen and why.
    """

    layout: StepLayout
    captured: bool
    dequantized: bool
    activation_checkpointing: bool
    optim: str
    memory: Memory | None = None
    widths: tuple[int, ...] = ()
    replayed: int = TOKENS[0]
    notes: list[str] = field(default_factory=list)


def choose_speed(
    recipe: Recipe,
    layout: StepLayout,
    config: Any,
    trained: int,
    lengths: Sequence[tuple[int, int]],
    device: torch.device,
    memory: tuple[int, int] | None,
    failed: str | None = None,
    *,
    sharded: str | None = None,
) -> Speed:
    """Resolve the recipe's `speed` for a machine.

    Args:
        recipe: the recipe.
        layout: how the recipe's rows are shared out.
        config: the base's configuration.
        trained: trained parameters.
        lengths: (tokens, output tokens) of every training row.
        device: where the run will be.
        memory: bytes of the GPU, free and in all; None to plan for one that is large enough.
        failed: why the captured step did not work, where it was tried already.
        sharded: what the launcher shards the model with, from `sharded_by`.
    """
    counts = weight_counts(config)
    optim, given = recipe.training.get("optim", FUSED_ADAMW), []
    if sharded is not None and optim in EQUAL_ADAMW - {FUSED_ADAMW} and device.type == "cuda":
        # bitsandbytes' know no sharded parameters.
        given = [f"  {FUSED_ADAMW} for {optim}: the same update, on parameters that are sharded"]
        optim = FUSED_ADAMW
    checkpointing = bool(recipe.training.get("activation_checkpointing", False))
    widest, most_outputs = max(tokens for tokens, _ in lengths), max(outputs for _, outputs in lengths)

    def plan(
        layout: StepLayout,
        *,
        replayed: int | None = None,
        dequantized: bool,
        checkpointing: bool,
        optim: str,
        sharded: str | None = sharded,
    ) -> Speed:
        captured, batches, widths = replayed is not None, [(layout.rows_per_device, widest)], ()
        if captured:
            widths = widths_for([tokens for tokens, _ in lengths])
            batches = [(rows_at_once(layout.rows_per_device, width, replayed), width) for width in widths]
        needed = [
            memory_of(
                recipe,
                config,
                counts,
                trained,
                rows=rows,
                width=width,
                outputs=rows * most_outputs,
                captured=captured,
                dequantized=dequantized,
                checkpointing=checkpointing,
                optim=optim,
                processes=layout.processes,
                sharded=sharded,
            )
            for rows, width in batches
        ]
        memory = max(needed, key=lambda memory: memory.total)
        return Speed(layout, captured, dequantized, checkpointing, optim, memory, widths, replayed or TOKENS[0])

    written = plan(layout, dequantized=False, checkpointing=checkpointing, optim=optim)
    if sharded == "FSDP" or (sharded == "DeepSpeed" and recipe.quantization is not None):
        whole = plan(layout, dequantized=False, checkpointing=checkpointing, optim=optim, sharded=None).memory.weights
        given.append(f"  while it is loaded a GPU holds the whole base, {whole / GIB:.1f} GiB")
    if recipe.speed == "plain":
        return replace(written, notes=["speed plain: TRL's own step, as the recipe is written", *given])
    if recipe.speed == "lean":
        optim = PAGED_ADAMW if optim in EQUAL_ADAMW and device.type == "cuda" and sharded is None else optim
        lean = plan(layout, dequantized=False, checkpointing=True, optim=optim)
        note = f"speed lean: activation checkpointing, {optim}, the base as it is quantized"
        return replace(lean, notes=[note, *given])
    if device.type == "cpu":
        return replace(written, notes=["speed auto: TRL's own step, since this run is on the CPU"])

    def taken(speed: Speed) -> float:
        return speed.memory.total + CONTEXT + (GAPS * speed.memory.activations if speed.captured else 0)

    def fits(speed: Speed) -> bool:
        if memory is None:
            return True
        return taken(speed) <= memory[0] - HEADROOM * memory[1]

    merged = StepLayout(layout.processes, layout.rows_per_device * layout.accumulation, 1)
    fused = FUSED_ADAMW if optim in EQUAL_ADAMW else optim
    plain_weights = recipe.quantization is not None and (
        recipe.quantization.bnb_4bit_compute_dtype == recipe.model.dtype
    )
    why_not = failed or _why_not_captured(recipe, config, sharded)
    # The base plain where that fits; else packed, and fewer tokens at once.
    else_plain = plain_weights and not _packed_can_be_captured(recipe)
    for dequantized, replayed in [(plain_weights, TOKENS[0]), *((else_plain, replayed) for replayed in TOKENS)]:
        captured = plan(merged, replayed=replayed, dequantized=dequantized, checkpointing=False, optim=fused)
        if why_not is None and fits(captured):
            note = f"speed auto: the captured step, {len(captured.widths)} widths of up to {captured.widths[-1]} tokens"
            return replace(captured, notes=[note, *_changes(recipe, written, captured), _in_words(captured.memory)])
    reason = why_not or (
        f"the captured step needs {taken(captured) / GIB:.1f} GiB and {HEADROOM:.0%} of the card to spare, "
        f"{memory[0] / GIB:.1f} are free"
    )
    # By steps: each gives up what the one before it could not have.
    choices = [(merged, plain_weights, False), (merged, False, False), (layout, False, checkpointing)]
    for shared, dequantized, again in choices if sharded is None else choices[-1:]:
        chosen = plan(shared, dequantized=dequantized, checkpointing=again, optim=optim)
        if fits(chosen):
            break
    short = [] if fits(chosen) else ["  more than is free: speed=lean, or fewer rows per device, takes less"]
    note = f"speed auto: TRL's own step, since {reason}"
    return replace(chosen, notes=[note, *given, *_changes(recipe, written, chosen), _in_words(chosen.memory), *short])


def _why_not_captured(recipe: Recipe, config: Any, sharded: str | None) -> str | None:
    """What stands against the captured step, memory apart; None if nothing does."""
    lora = recipe.lora or {}
    beyond = [
        key for key in ("use_dora", "modules_to_save", "target_parameters", "trainable_token_indices") if lora.get(key)
    ]
    training, attention = recipe.training, recipe.model.attn_implementation
    optim = training.get("optim", FUSED_ADAMW)
    reasons = [
        (sharded is not None, f"{sharded} shards the model"),
        (recipe.lora is None, "every weight is trained, not adapters alone"),
        (bool(beyond), f"lora.{beyond[0] if beyond else ''} is set"),
        (lora.get("bias", "none") != "none", "lora.bias is set"),
        (config.model_type not in MASKS_BY_KIND, f"it does not know {config.model_type}"),
        (recipe.model.device_map is not None, "model.device_map spreads the model"),
        (attention not in (None, "eager", "sdpa"), f"model.attn_implementation is {attention}"),
        (recipe.model.dtype != "bfloat16", f"model.dtype is {recipe.model.dtype}, not bfloat16"),
        (training.get("bf16", True) is False, "training.bf16 is false"),
        (bool(training.get("fp16")), "training.fp16 is true"),
        (
            recipe.quantization is not None and recipe.quantization.bnb_4bit_compute_dtype != "bfloat16",
            "quantization.bnb_4bit_compute_dtype is not bfloat16",
        ),
        (training.get("loss_type", "nll") != "nll", "training.loss_type is not nll"),
        (training.get("neftune_noise_alpha") is not None, "training.neftune_noise_alpha changes TRL's forward"),
        (bool(training.get("debug")), "training.debug watches TRL's forward"),
        (
            optim.startswith("schedule_free") or optim.endswith("layerwise") or "lomo" in optim,
            f"training.optim={optim} works inside TRL's step",
        ),
        (torch.cuda.is_available() and not has_triton(), "there is no Triton on this machine"),
    ]
    return next((reason for holds, reason in reasons if holds), None)


def _packed_can_be_captured(recipe: Recipe) -> bool:
    """Whether every 4-bit layer has an adapter that goes into one operation with it."""
    lora = recipe.lora or {}
    fewer = any(lora.get(key) for key in ("lora_dropout", "exclude_modules", "layers_to_transform"))
    return lora.get("target_modules") == "all-linear" and not fewer


def _changes(recipe: Recipe, written: Speed, chosen: Speed) -> list[str]:
    """What differs from the recipe as it is written, none of it the mathematics."""
    changes = []
    if chosen.dequantized:
        changes.append("the 4-bit base is dequantized once, to the weights that each of its forwards would make")
    elif chosen.captured and recipe.quantization is not None:
        changes.append("the 4-bit base stays packed, which is slower and needs less memory")
    if chosen.captured and chosen.replayed < TOKENS[0]:
        changes.append(f"at most {chosen.replayed} tokens at once, to fit")
    if chosen.layout != written.layout:
        dropout = "" if not (recipe.lora or {}).get("lora_dropout") else ", other draws of dropout"
        changes.append(f"micro-batches are merged: one loss over the step's tokens, as accumulated{dropout}")
    if chosen.activation_checkpointing != written.activation_checkpointing:
        changes.append("activations are kept, there is memory for them")
    if chosen.optim != written.optim:
        changes.append(f"{chosen.optim} for {written.optim}: the same update, its states fit")
    return [f"  {change}" for change in changes]


def _in_words(memory: Memory) -> str:
    parts = ", ".join(f"{part} {getattr(memory, part) / GIB:.1f}" for part in PARTS)
    return f"  about {memory.total / GIB:.1f} GiB a GPU: {parts}"
