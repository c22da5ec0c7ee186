"""Import `hw3.cuda_graphs` if it is available. This is the only module of `hw3.training` that imports it.

The package can be deleted. `speed: plain` and `speed: lean` then work as before, and `speed: auto` takes TRL's own step
and reports why.
"""

from __future__ import annotations

_import_error: ImportError | None = None
try:
    from hw3.cuda_graphs.fused_lora import FusedLoraLinear, find_fusable_layers, get_adapter_weights
    from hw3.cuda_graphs.output_head import HEAD_CHUNK_POSITIONS
    from hw3.cuda_graphs.training_step import (
        NUM_METRICS,
        TOKENS_PER_REPLAY,
        CudaGraphStep,
        compute_bucket_lengths,
        compute_rows_per_replay,
        count_unused_reserved_bytes,
    )
except ImportError as error:
    _import_error = error
    # Placeholders of other types, never used: `speed: auto` takes TRL's own step if the package is not available.
    FusedLoraLinear = find_fusable_layers = get_adapter_weights = None  # type: ignore[assignment, misc]
    CudaGraphStep = compute_bucket_lengths = None  # type: ignore[assignment, misc]
    compute_rows_per_replay = count_unused_reserved_bytes = None  # type: ignore[assignment]
    HEAD_CHUNK_POSITIONS, NUM_METRICS, TOKENS_PER_REPLAY = 0, 0, ()  # type: ignore[assignment]

__all__ = [
    "HEAD_CHUNK_POSITIONS",
    "NUM_METRICS",
    "TOKENS_PER_REPLAY",
    "CudaGraphStep",
    "FusedLoraLinear",
    "compute_bucket_lengths",
    "compute_rows_per_replay",
    "count_unused_reserved_bytes",
    "find_fusable_layers",
    "get_adapter_weights",
    "why_cuda_graphs_unavailable",
]


def why_cuda_graphs_unavailable() -> str | None:
    """Return why `hw3.cuda_graphs` cannot be imported, or None if it can."""
    return None if _import_error is None else f"hw3.cuda_graphs cannot be imported ({_import_error})"
