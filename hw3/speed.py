"""What `speed: auto` chooses, and why: the captured step or TRL's own, and how each shares out memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils._triton import has_triton
from transformers import AutoModelForCausalLM

from hw3.captured_step import HEAD_POSITIONS, MASKS_BY_KIND, TOKENS, rows_at_once, widths_for
from hw3.errors import UserError
from hw3.recipe import Recipe, StepLayout

GIB = 2**30
HEADROOM = 0.15  # of a GPU's memory that the captured step leaves free: other programs, fragments, longer rows
# AdamW with float32 states, the same update in each: the recipe's choice among them is one of memory and speed.
FUSED_ADAMW, PAGED_ADAMW = "adamw_torch_fused", "paged_adamw_32bit"
EQUAL_ADAMW = {"adamw_torch", FUSED_ADAMW, PAGED_ADAMW}
PARTS = ("weights", "adapters", "optimizer", "activations", "head")
CONTEXT = 0.6 * GIB  # CUDA's context and the graphs, outside of PyTorch's count
GAPS = 0.4  # of its activations: what the graphs' memory pool leaves unused, since every width divides it otherwise
# DeepSpeed's defaults, in parameters: how many stay gathered, how large the buffer is in which gradients are reduced.
ZERO3_LIVE, ZERO3_BUCKET = 10**9, 5 * 10**8


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by part, as PyTorch counts them at the peak of a step."""

    weights: int
    adapters: int
    optimizer: int
    activations: int
    head: int

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return sum(getattr(self, part) for part in PARTS)


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


def weight_counts(config: Any) -> tuple[int, int]:
    """(in linear layers, elsewhere): parameters that 4-bit loading packs, and those that it leaves alone."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = sum(module.weight.numel() for module in model.base_model.modules() if isinstance(module, torch.nn.Linear))
    return linear, model.num_parameters() - linear


def memory_of(
    recipe: Recipe,
    config: Any,
    counts: tuple[int, int],
    trained: int,
    *,
    rows: int,
    width: int,
    outputs: int,
    captured: bool,
    dequantized: bool,
    checkpointing: bool,
    optim: str,
    processes: int,
    sharded: str | None = None,
) -> Memory:
    """Memory of a step, counted from shapes; weights need not be loaded.

    Sharded, a GPU holds its part of weights, gradients and optimizer state, and what is gathered to compute with: under
    FSDP two layers, the one at work and the one that is fetched, and the head; under ZeRO-3 as many parameters as it
    lets live at once, or the head where that is larger. The scales of 4-bit weights are not sharded.

    Args:
        recipe: the recipe.
        config: the base's configuration.
        counts: from `weight_counts`.
        trained: trained parameters.
        rows: rows of one forward.
        width: tokens of the widest of them.
        outputs: most output tokens of one forward.
        captured: the captured step rather than TRL's.
        dequantized: 4-bit weights made plain.
        checkpointing: activations computed again.
        optim: the optimizer.
        processes: of the run.
        sharded: what shards the model among them, from `sharded_by`.
    """
    text = config.get_text_config()
    size = getattr(torch, recipe.model.dtype).itemsize
    linear, other = counts
    packed = recipe.quantization is not None and not dequantized
    # NF4: half a byte a weight and the scale of each 64, one byte (double quantization) or four.
    scale = 0 if not packed else (1 + 4 / 256 if recipe.quantization.bnb_4bit_use_double_quant else 4) / 64
    if packed and captured:
        scale += 4 / 64  # plain scales, made once
    full = recipe.lora is None
    # Trained weights are float32, with autocast's copies beside them.
    weights = (4 + size) * trained if full else int(linear * (0.5 + scale if packed else size) + other * size)
    adapters = (0 if full else 4 * trained) + 4 * trained  # themselves and their gradients
    if captured:
        adapters += size * trained  # copies in the compute dtype
    # Paged states are CUDA's managed memory, which moves to the CPU when the card is full; PyTorch does not count it.
    moments = 0 if optim.startswith("paged") else 2 if "8bit" in optim else 8
    optimizer = moments * trained // (processes if sharded else 1)
    if sharded is None and processes > 1:
        adapters += 4 * trained  # DistributedDataParallel's buckets
    if sharded is not None:
        whole = 0 if full else int(linear * scale)
        layers = linear * (0.5 if packed else size) / text.num_hidden_layers
        gathered = 2 * layers + text.vocab_size * text.hidden_size * size
        if sharded == "DeepSpeed":
            gathered = min(weights - whole, max(ZERO3_LIVE, text.vocab_size * text.hidden_size) * size)
            # In the base's dtype, with gradients; the optimizer's float32 copies of both, and the buffer.
            adapters = (2 * size + 8) * trained // processes + ZERO3_BUCKET * size
        else:
            adapters = 8 * trained // processes  # themselves and their gradients
        weights = int((weights - whole) / processes + whole + gathered)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads, tokens = text.num_attention_heads, rows * width
    eager = recipe.model.attn_implementation == "eager" or text.model_type == "gemma2"
    if captured:
        # Both inputs of the gated product, residuals, queries, keys, values and outputs a head; where no kernel hides
        # them, the scores, in float32 too.
        linear_inputs = 2 * text.intermediate_size + 3 * text.hidden_size + 4 * heads * head_dim
        scores = (4 + size) * heads * width if eager else 0
        kept = tokens * (size * linear_inputs + scores) * text.num_hidden_layers
        head = 2 * size * min(outputs, HEAD_POSITIONS) * text.vocab_size
        return Memory(weights, adapters, optimizer, kept, head)
    # TRL's step: four tensors of the gated product, norms in float32, what each adapter takes; scores as they are,
    # capped, masked, and in float32. Fitted to what Gemma-2-2B's and Llama-3-8B's shapes took.
    attention = head_dim * (heads + 2 * text.num_key_value_heads)
    scores = 12 * heads * width if eager else 0
    layer = int(tokens * (size * (4 * text.intermediate_size + 8.3 * text.hidden_size + attention) + scores))
    # The largest weights, made plain for a product and the one before it.
    unpacked = 2 * size * text.intermediate_size * text.hidden_size if packed else 0
    head = 4 * 3 * min(outputs, 4096) * min(text.vocab_size, 32768)  # TRL's head works in tiles of this size
    if not checkpointing:
        return Memory(weights, adapters, optimizer, layer * text.num_hidden_layers + unpacked, head)
    # Inputs of all layers, and one layer at work with its gradients: then the head's part is there no more.
    work = int(1.25 * layer) + unpacked
    kept = size * tokens * text.hidden_size * text.num_hidden_layers + work
    return Memory(weights, adapters, optimizer, kept, max(0, head - work))


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


def sharded_by() -> str | None:
    """What the launcher shards the model with: `FSDP`, `DeepSpeed` or nothing."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return "FSDP"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return "DeepSpeed"
    return None


def sharded_as(file: Path) -> str | None:
    """What a launch with this accelerate file will shard the model with, as `sharded_by` would say there.

    Raises:
        UserError: it is no accelerate file.
    """
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))["distributed_type"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{file}: no file of accelerate's that names a distributed_type") from error
    return {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed"}.get(found)


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
