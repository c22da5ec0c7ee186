"""Read adapters from disk. Every file is read once, so that the weights in use are those that were hashed."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig

from hw3.common.errors import first_line
from hw3.modeling.fingerprint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, combine_weight_hashes, hash_adapter_config

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,  # indices, in sparse adapters
    "I32": torch.int32,
}


class InvalidAdapterError(Exception):
    """An adapter, or a checkpoint's weights, cannot be used. The message names the folder and the reason.

    It is incomplete, has no effect, has weights that are not finite, does not fit the base, is of a kind that cannot be
    scored, or changed since it was hashed.
    """


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """The content of a PEFT adapter folder.

    Attributes:
        folder: where it was read.
        sha256: hash of the bytes that `config` and `weights` were made from, as `Checkpoint.sha256`.
        config: PEFT's configuration.
        weights: tensors on the CPU by name.
    """

    folder: Path
    sha256: str
    config: PeftConfig
    weights: dict[str, torch.Tensor]


def read_adapter(folder: Path, *, pin_memory: bool = False) -> AdapterFiles:
    """Read an adapter folder's configuration and weights.

    Args:
        folder: a PEFT adapter folder, with weights in safetensors format.
        pin_memory: read weights into page-locked memory, from which a GPU can copy asynchronously.

    Raises:
        InvalidAdapterError: a file is missing or has another format, the adapter is of a kind that cannot be scored, or
            weights are NaN or infinite.
    """
    try:
        config_bytes = (folder / ADAPTER_CONFIG).read_bytes()
        attributes = json.loads(config_bytes)
        attributes.pop("runtime_config", None)  # as `PeftConfig.from_pretrained`
        config = PeftConfig.from_peft_type(**attributes)
        _check_kind(folder, config)
        weight_bytes = _read_bytes(folder / ADAPTER_WEIGHTS, pin_memory)
        weights = parse_safetensors(weight_bytes)
    # PEFT imports the packages that some kinds need when it reads their configuration.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, ImportError) as error:
        raise InvalidAdapterError(f"{folder}: cannot be read: {first_line(error)}") from error
    check_finite(folder, weights)
    hashes = {
        ADAPTER_CONFIG: hash_adapter_config(config_bytes),
        ADAPTER_WEIGHTS: hashlib.sha256(weight_bytes.numpy().data).hexdigest(),
    }
    return AdapterFiles(folder, combine_weight_hashes(hashes), config, weights)


def _check_kind(folder: Path, config: PeftConfig) -> None:
    """Refuse the kinds of adapters whose scores are not determined by the base's layers and the adapter's files."""
    if config.is_prompt_learning:
        kind, reason = getattr(config.peft_type, "value", None), "it changes the model's input"
    elif getattr(config, "alora_invocation_tokens", None) is not None:
        kind, reason = "activated LoRA", "it depends on tokens in the model's input"
    elif str(getattr(config, "init_lora_weights", None)).startswith("pissa_niter"):
        kind, reason = "PiSSA with fast SVD", "PEFT changes the base by random numbers when it loads the adapter"
    else:
        return
    raise InvalidAdapterError(f"{folder}: this kind of adapter ({kind}) cannot be scored: {reason}")


def check_finite(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Check that weights are finite numbers.

    Raises:
        InvalidAdapterError: one is NaN or infinite.
    """
    name = find_nonfinite(weights.items())
    if name is not None:
        raise InvalidAdapterError(
            f"{folder}: {name} has NaN or infinite weights; use an earlier checkpoint, or train again with a lower "
            "learning rate"
        )


def find_nonfinite(weights: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Return the name of the first tensor that has an element that is NaN or infinite; None if there is none."""
    return next((name for name, tensor in weights if not tensor.isfinite().all()), None)


def _read_bytes(file: Path, pin_memory: bool) -> torch.Tensor:
    with file.open("rb") as stream:
        content = torch.empty(os.fstat(stream.fileno()).st_size, dtype=torch.uint8, pin_memory=pin_memory)
        if stream.readinto(content.numpy().data) != len(content):
            raise ValueError(f"{file.name} was truncated while it was read")
    return content


def parse_safetensors(content: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file as views of its bytes in memory.

    `safetensors.torch.load` would copy them, and holds the GIL meanwhile.

    The format (https://github.com/huggingface/safetensors): 8 bytes with the header's length, the header in JSON, then
    the data, to which the header's offsets refer.

    Args:
        content: the file's bytes, uint8, shape (N,).

    Raises:
        ValueError, KeyError, TypeError, AttributeError: the file has another format or is truncated.
    """
    start = 8 + int.from_bytes(content[:8].numpy().tobytes(), "little")
    if not 8 < start <= len(content):
        raise ValueError(f"not a safetensors file: {len(content)} bytes")
    header: dict[str, Any] = json.loads(content[8:start].numpy().tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = (start + offset for offset in entry["data_offsets"])
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ValueError(f"{name} has dtype {entry['dtype']}; expected one of {', '.join(_DTYPES)}")
        if not start <= begin <= end <= len(content):
            raise ValueError(f"{name} ends at byte {end}, but the file has {len(content)}")
        shape = entry["shape"]
        if any(size < 0 for size in shape) or math.prod(shape) * dtype.itemsize != end - begin:
            raise ValueError(f"{name} has shape {shape}, but {end - begin} bytes")
        data = content[begin:end]
        if begin % dtype.itemsize:  # a view must be aligned, which tensors of old files are not
            data = data.clone()
        tensors[name] = data.view(dtype).view(shape)
    return tensors


class AdapterPrefetcher:
    """Read and hash adapters in a given order, each one while the one before is in use.

    Reading and hashing release the GIL, so neither delays the thread that feeds a GPU.

    Args:
        folders: adapter folders, in the order in which they will be requested.
        pin_memory: see `read_adapter`.
    """

    def __init__(self, folders: Sequence[Path], *, pin_memory: bool) -> None:
        self.folders = frozenset(folders)
        self._folders = iter(folders)
        self._pin_memory = pin_memory
        self._thread = ThreadPoolExecutor(1)
        self._next = self._start_next()

    def _start_next(self) -> tuple[Path, Future[AdapterFiles]] | None:
        folder = next(self._folders, None)
        if folder is None:
            return None
        return folder, self._thread.submit(read_adapter, folder, pin_memory=self._pin_memory)

    def get(self, folder: Path) -> AdapterFiles:
        """Return the next adapter, which must be that of `folder`, and start to read the one after it.

        Raises:
            InvalidAdapterError: as `read_adapter`.
        """
        assert self._next is not None and self._next[0] == folder, "requested in another order"
        future = self._next[1]
        try:
            return future.result()
        finally:
            self._next = self._start_next()

    def close(self) -> None:
        """Wait for the adapter that is being read, and start no other."""
        self._thread.shutdown(cancel_futures=True)
