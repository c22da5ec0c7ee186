"""Choose how optimizer steps are computed: resolve `speed: auto`, `plain` or `lean` for a machine.

`auto` prefers the CUDA-graph step on a dequantized base model, then on a 4-bit one with fewer tokens per replay, then
TRL's own step. None of these choices changes the mathematics of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch.utils._triton import has_triton

from hw3.common.disk import format_bytes
from hw3.config.recipe import Recipe
from hw3.modeling.attention_masks import MASK_PER_LAYER_TYPE
from hw3.runs.manifest import Manifest
from hw3.training.batch_layout import BatchLayout
from hw3.training.cuda_graph_support import (
    TOKENS_PER_REPLAY,
    compute_bucket_lengths,
    compute_rows_per_replay,
    why_cuda_graphs_unavailable,
)
from hw3.training.memory_estimate import (
    GIB,
    MEMORY_PARTS,
    MemoryEstimate,
    StepShape,
    count_weights,
    estimate_memory,
)
from hw3.training.optimizer_state import EQUIVALENT_ADAMW, FUSED_ADAMW, PAGED_ADAMW
from hw3.training.sharding import Sharding

# Share of a GPU's memory that `speed: auto` leaves free for other programs, fragmentation and longer rows.
HEADROOM_FRACTION = 0.15
# CUDA's context and the graphs themselves, which PyTorch does not count.
CUDA_CONTEXT_BYTES = 0.6 * GIB
# Share of its activations that the CUDA graphs' memory pool leaves unused, because each bucket length divides it
# differently.
POOL_FRAGMENTATION = 0.4


@dataclass(frozen=True)
class Workload:
    """What the steps of a run must compute, whatever the strategy.

    Attributes:
        recipe: the recipe.
        layout: how the recipe's rows per step are divided.
        config: the base model's configuration.
        trained_parameters: number of trained parameters.
        lengths: (tokens, output tokens) of each training row.
        sharding: what the launcher shards the model with.
    """

    recipe: Recipe
    layout: BatchLayout
    config: Any
    trained_parameters: int
    lengths: Sequence[tuple[int, int]]
    sharding: Sharding | None = None


@dataclass(frozen=True)
class StepStrategy:
    """How the steps of a run are computed.

    Attributes:
        layout: how a step's rows are divided; the micro-batches may have been merged.
        cuda_graphs: whether the CUDA-graph step is used rather than TRL's.
        dequantized: whether 4-bit weights are dequantized after loading.
        activation_checkpointing: whether activations are recomputed in the backward pass.
        optim: the optimizer's name, as in `training.optim`.
        memory: estimated memory of a step on one GPU; zeros until it is estimated.
        bucket_lengths: lengths that batches are padded to; empty to pad to a batch's longest row.
        tokens_per_replay: most tokens of one replay of the CUDA-graph step, unless a row has more.
        notes: lines for the user that report the choice and its reasons.
    """

    layout: BatchLayout
    cuda_graphs: bool
    dequantized: bool
    activation_checkpointing: bool
    optim: str
    memory: MemoryEstimate = field(default_factory=MemoryEstimate)
    bucket_lengths: tuple[int, ...] = ()
    tokens_per_replay: int = 0
    notes: list[str] = field(default_factory=list)


def choose_step_strategy(
    workload: Workload,
    device: torch.device,
    gpu_memory: tuple[int, int] | None,
    failure: str | None = None,
    previous: Manifest | None = None,
) -> StepStrategy:
    """Resolve the recipe's `speed` for a machine.

    Strategies round differently. A resumed run takes the strategy of its previous session if it can, so that it ends
    with the weights of an uninterrupted run.

    Args:
        workload: what must be computed.
        device: device of the run.
        gpu_memory: (free, total) bytes of the GPU; None to assume a GPU that is large enough.
        failure: why the CUDA-graph step cannot be used, if it has been tried already.
        previous: the manifest of the run that is resumed.
    """
    chooser = _Chooser(workload, device, gpu_memory)
    speed = workload.recipe.speed
    if speed == "plain":
        return chooser.choose_plain()
    if speed == "lean":
        return chooser.choose_lean()
    if device.type == "cpu":
        return replace(chooser.as_written, notes=["speed auto: TRL's own step, because this run is on the CPU"])
    if previous is None or previous.speed.requested != speed:
        return chooser.choose_auto(failure)
    return chooser.choose_auto(failure, previous)


class _Chooser:
    """Plan strategies for one workload on one machine, and choose among them.

    Attributes:
        as_written: TRL's step with the recipe's own settings.
        notes: lines for the user on TRL's step, for every strategy.
    """

    def __init__(self, workload: Workload, device: torch.device, gpu_memory: tuple[int, int] | None) -> None:
        self.workload, self.device, self.gpu_memory = workload, device, gpu_memory
        recipe, sharding = workload.recipe, workload.sharding
        self.weight_counts = count_weights(workload.config)
        self.checkpointing = bool(recipe.training.get("activation_checkpointing", False))
        self.optim, self.notes = recipe.training.get("optim", FUSED_ADAMW), []
        if sharding is not None and self.optim in EQUIVALENT_ADAMW - {FUSED_ADAMW} and device.type == "cuda":
            # The optimizers of bitsandbytes do not support sharded parameters.
            self.notes.append(f"  {FUSED_ADAMW} replaces {self.optim}: the same update, for sharded parameters")
            self.optim = FUSED_ADAMW
        self.as_written = self.plan_trl_step(workload.layout, activation_checkpointing=self.checkpointing)
        if sharding == "FSDP" or (sharding == "DeepSpeed" and recipe.quantization is not None):
            unsharded = self.estimate(replace(self._longest_batch(self.as_written), sharding=None)).weights
            self.notes.append(f"  while loading, each GPU holds the complete base model, {format_bytes(unsharded)}")

    def choose_plain(self) -> StepStrategy:
        """Return TRL's step with the recipe's own settings."""
        note = "speed plain: TRL's own step, with the recipe's settings"
        return replace(self.as_written, notes=[note, *self.notes])

    def choose_lean(self) -> StepStrategy:
        """Return TRL's step with the settings that need the least memory."""
        can_page = self.optim in EQUIVALENT_ADAMW and self.device.type == "cuda" and self.workload.sharding is None
        optim = PAGED_ADAMW if can_page else self.optim
        strategy = self.plan_trl_step(self.workload.layout, activation_checkpointing=True, optim=optim)
        note = f"speed lean: activation checkpointing, {optim}, the quantized base model"
        return replace(strategy, notes=[note, *self.notes])

    def choose_auto(self, failure: str | None, previous: Manifest | None = None) -> StepStrategy:
        """Return the strategy of the previous session if it fits into the GPU's memory, else the fastest that does."""
        chosen = self._choose_auto(failure, previous)
        if previous is None or _rounds_as(chosen, previous):
            return chosen
        note = "  The run was begun with another choice, so its weights will differ by rounding"
        return replace(chosen, notes=[*chosen.notes, note])

    def _choose_auto(self, failure: str | None, previous: Manifest | None) -> StepStrategy:
        reason = failure or _why_no_cuda_graphs(self.workload)
        if reason is None and previous is not None and not previous.speed.cuda_graphs:
            reason = "the run was begun with it"
        if reason is None:
            candidates = _put_previous_first(self._cuda_graph_candidates(), previous)
            chosen = next(filter(self.fits, candidates), None)
            if chosen is not None:
                buckets = chosen.bucket_lengths
                note = f"speed auto: the CUDA-graph step, {len(buckets)} bucket lengths of up to {buckets[-1]} tokens"
                return replace(chosen, notes=[note, *self._describe(chosen)])
            assert self.gpu_memory is not None, "every strategy fits on a GPU that is assumed to be large enough"
            reason = (
                f"the CUDA-graph step needs {self.required_bytes(candidates[-1]) / GIB:.1f} GiB and "
                f"{HEADROOM_FRACTION:.0%} of the GPU to spare; {self.gpu_memory[0] / GIB:.1f} are free"
            )
        trl_candidates = self._trl_candidates()
        chosen = next(filter(self.fits, _put_previous_first(trl_candidates, previous)), trl_candidates[-1])
        notes = [f"speed auto: TRL's own step, because {reason}", *self.notes, *self._describe(chosen)]
        if not self.fits(chosen):
            notes.append(f"  {self._describe_shortage(chosen)}")
        return replace(chosen, notes=notes)

    def _describe_shortage(self, chosen: StepStrategy) -> str:
        """Return whether a strategy that does not leave the headroom fits at all, and what needs less memory."""
        assert self.gpu_memory is not None, "every strategy fits on a GPU that is assumed to be large enough"
        free, left = self.gpu_memory[0], int(self.gpu_memory[0] - self.required_bytes(chosen))
        if left >= 0:
            return f"It fits, but leaves only {format_bytes(left)} of {format_bytes(free)} free"
        lean = self.choose_lean()
        one_row = replace(
            lean.layout, rows_per_device=1, accumulation=lean.layout.rows_per_device * lean.layout.accumulation
        )
        smallest = self.plan_trl_step(one_row, activation_checkpointing=True, optim=lean.optim)
        if self.required_bytes(smallest) <= free:
            return "This is more than the free memory. Set speed=lean or reduce training.per_device_train_batch_size"
        return "This is more than the free memory, also with speed=lean and one row at once. Use a smaller base model"

    def _cuda_graph_candidates(self) -> list[StepStrategy]:
        """Return CUDA-graph strategies, the fastest first: dequantized if possible, then with fewer tokens at once."""
        recipe = self.workload.recipe
        # A 4-bit layer can be captured only as a part of `FusedLoraLinear`. If a layer cannot be fused, the CUDA-graph
        # step needs a dequantized base model in every candidate.
        always_dequantized = _can_dequantize(recipe) and not _all_4bit_layers_are_fusable(recipe)
        settings = [
            (_can_dequantize(recipe), TOKENS_PER_REPLAY[0]),
            *((always_dequantized, tokens) for tokens in TOKENS_PER_REPLAY),
        ]
        return [self.plan_cuda_graph_step(dequantized, tokens) for dequantized, tokens in settings]

    def _trl_candidates(self) -> list[StepStrategy]:
        """Return strategies of TRL's step, the fastest first; each needs less memory than the one before."""
        if self.workload.sharding is not None:
            return [self.as_written]
        merged = self.workload.layout.merge_micro_batches()
        return [
            self.plan_trl_step(merged, dequantized=_can_dequantize(self.workload.recipe)),
            self.plan_trl_step(merged),
            self.as_written,
        ]

    def plan_trl_step(
        self,
        layout: BatchLayout,
        *,
        dequantized: bool = False,
        activation_checkpointing: bool = False,
        optim: str | None = None,
    ) -> StepStrategy:
        """Plan TRL's step with these settings, and estimate its memory."""
        strategy = StepStrategy(
            layout,
            cuda_graphs=False,
            dequantized=dequantized,
            activation_checkpointing=activation_checkpointing,
            optim=optim or self.optim,
        )
        return replace(strategy, memory=self.estimate(self._longest_batch(strategy)))

    def plan_cuda_graph_step(self, dequantized: bool, tokens_per_replay: int) -> StepStrategy:
        """Plan the CUDA-graph step on merged micro-batches, and estimate its memory."""
        layout = self.workload.layout.merge_micro_batches()
        optim = FUSED_ADAMW if self.optim in EQUIVALENT_ADAMW else self.optim
        buckets = compute_bucket_lengths([tokens for tokens, _ in self.workload.lengths])
        strategy = StepStrategy(
            layout,
            cuda_graphs=True,
            dequantized=dequantized,
            activation_checkpointing=False,
            optim=optim,
            bucket_lengths=buckets,
            tokens_per_replay=tokens_per_replay,
        )
        shapes = [
            self._shape(strategy, compute_rows_per_replay(layout.rows_per_device, length, tokens_per_replay), length)
            for length in buckets
        ]
        return replace(strategy, memory=max(map(self.estimate, shapes), key=lambda memory: memory.total))

    def _longest_batch(self, strategy: StepStrategy) -> StepShape:
        longest = max(tokens for tokens, _ in self.workload.lengths)
        return self._shape(strategy, strategy.layout.rows_per_device, longest)

    def _shape(self, strategy: StepStrategy, rows: int, length: int) -> StepShape:
        return StepShape(
            rows=rows,
            length=length,
            output_tokens=rows * max(outputs for _, outputs in self.workload.lengths),
            optim=strategy.optim,
            cuda_graphs=strategy.cuda_graphs,
            dequantized=strategy.dequantized,
            activation_checkpointing=strategy.activation_checkpointing,
            processes=strategy.layout.processes,
            sharding=self.workload.sharding,
        )

    def estimate(self, step: StepShape) -> MemoryEstimate:
        """Estimate the memory of a step of this workload."""
        workload = self.workload
        return estimate_memory(workload.recipe, workload.config, self.weight_counts, workload.trained_parameters, step)

    def required_bytes(self, strategy: StepStrategy) -> float:
        """Return the bytes that a strategy takes on the GPU, memory that PyTorch does not count included."""
        fragmentation = POOL_FRAGMENTATION * strategy.memory.activations if strategy.cuda_graphs else 0
        return strategy.memory.total + CUDA_CONTEXT_BYTES + fragmentation

    def fits(self, strategy: StepStrategy) -> bool:
        """Return whether a strategy and the headroom fit into the GPU's free memory."""
        if self.gpu_memory is None:
            return True
        free, total = self.gpu_memory
        return self.required_bytes(strategy) <= free - HEADROOM_FRACTION * total

    def _describe(self, chosen: StepStrategy) -> list[str]:
        """Return lines on how a strategy differs from the recipe's own settings, and on its memory."""
        recipe, changes = self.workload.recipe, []
        if chosen.dequantized:
            changes.append(
                "the 4-bit base model is dequantized after loading, to the weights that each forward would compute"
            )
        elif chosen.cuda_graphs and recipe.quantization is not None:
            changes.append("the base model stays in 4 bits, which is slower and needs less memory")
        if chosen.cuda_graphs and chosen.tokens_per_replay < TOKENS_PER_REPLAY[0]:
            changes.append(f"at most {chosen.tokens_per_replay} tokens at once, to fit into memory")
        if chosen.layout != self.as_written.layout:
            dropout = "" if not (recipe.lora or {}).get("lora_dropout") else "; dropout draws other numbers"
            changes.append(f"micro-batches are merged: the same loss over the step's tokens{dropout}")
        if chosen.activation_checkpointing != self.as_written.activation_checkpointing:
            changes.append("activations are not recomputed, because there is enough memory")
        if chosen.optim != self.as_written.optim:
            replaced = self.as_written.optim
            changes.append(f"{chosen.optim} replaces {replaced}: same update; its states fit into GPU memory")
        parts = ", ".join(f"{part} {format_bytes(getattr(chosen.memory, part))}" for part in MEMORY_PARTS)
        changes.append(f"about {format_bytes(chosen.memory.total)} per GPU: {parts}")
        return [f"  {change}" for change in changes]


def _rounds_as(strategy: StepStrategy, previous: Manifest) -> bool:
    """Return whether a strategy's steps round as those of a run's previous session."""
    recorded = previous.speed.cuda_graphs, previous.speed.dequantized, previous.speed.tokens_per_replay
    values = strategy.cuda_graphs, strategy.dequantized, strategy.tokens_per_replay
    return values == recorded and asdict(strategy.layout) == previous.layout.model_dump()


def _put_previous_first(candidates: list[StepStrategy], previous: Manifest | None) -> list[StepStrategy]:
    return candidates if previous is None else sorted(candidates, key=lambda one: not _rounds_as(one, previous))


def _can_dequantize(recipe: Recipe) -> bool:
    """Return whether a dequantized base model computes in the same dtype as the 4-bit one."""
    return recipe.quantization is not None and recipe.quantization.bnb_4bit_compute_dtype == recipe.model.dtype


def _all_4bit_layers_are_fusable(recipe: Recipe) -> bool:
    """Return whether each 4-bit layer has an adapter that can be fused with it into one operation."""
    lora = recipe.lora or {}
    is_restricted = any(lora.get(key) for key in ("lora_dropout", "exclude_modules", "layers_to_transform"))
    return lora.get("target_modules") == "all-linear" and not is_restricted


def _why_no_cuda_graphs(workload: Workload) -> str | None:
    """Return why the CUDA-graph step cannot compute this workload, memory aside; None if it can."""
    unavailable = why_cuda_graphs_unavailable()
    reasons = [
        (unavailable is not None, unavailable),
        (workload.sharding is not None, f"{workload.sharding} shards the model"),
        *_model_reasons(workload.recipe, workload.config),
        *_training_reasons(workload.recipe),
        (torch.cuda.is_available() and not has_triton(), "there is no Triton on this machine"),
    ]
    return next((reason for applies, reason in reasons if applies), None)


def _model_reasons(recipe: Recipe, config: Any) -> list[tuple[bool, str]]:
    """Return (whether it applies, reason) for the settings of model, adapters and quantization."""
    lora, model, quantization = recipe.lora or {}, recipe.model, recipe.quantization
    unsupported = ("use_dora", "modules_to_save", "target_parameters", "trainable_token_indices")
    return [
        (recipe.lora is None, "every weight is trained, not only adapters"),
        *((bool(lora.get(key)), f"lora.{key} is set") for key in unsupported),
        (lora.get("bias", "none") != "none", "lora.bias is set"),
        (config.model_type not in MASK_PER_LAYER_TYPE, f"it does not support {config.model_type}"),
        (model.device_map is not None, "model.device_map distributes the model over devices"),
        (
            model.attn_implementation not in (None, "eager", "sdpa"),
            f"model.attn_implementation is {model.attn_implementation}",
        ),
        (model.dtype == "float32", "model.dtype is float32, not bfloat16 or float16"),
        (
            quantization is not None and quantization.bnb_4bit_compute_dtype != model.dtype,
            f"quantization.bnb_4bit_compute_dtype is not {model.dtype}",
        ),
    ]


def _training_reasons(recipe: Recipe) -> list[tuple[bool, str]]:
    """Return (whether it applies, reason) for the settings of the `training` section."""
    training = recipe.training
    optim = training.get("optim", FUSED_ADAMW)
    steps_in_backward = optim.startswith("schedule_free") or optim.endswith("layerwise") or "lomo" in optim
    return [
        (recipe.model.dtype == "bfloat16" and training.get("bf16", True) is False, "training.bf16 is false"),
        (bool(training.get("fp16")), "training.fp16 is true"),
        (training.get("loss_type", "nll") != "nll", "training.loss_type is not nll"),
        (training.get("neftune_noise_alpha") is not None, "training.neftune_noise_alpha changes TRL's forward"),
        (bool(training.get("activation_offloading")), "training.activation_offloading wraps TRL's step"),
        (bool(training.get("debug")), "training.debug observes TRL's forward"),
        (steps_in_backward, f"training.optim={optim} works inside TRL's step"),
    ]
