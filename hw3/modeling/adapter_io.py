"""Adapters read from disk: each file once, so that what is loaded is what was hashed; the next one read ahead."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig

from hw3.common.errors import first_line
from hw3.modeling.fingerprint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, weights_sha256

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class BadAdapter(Exception):
    """A checkpoint's adapter is incomplete, empty, inert or not what it was, so its score would be another's."""


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """What a PEFT adapter folder holds.

    Attributes:
        folder: where it was read.
        sha256: of the very bytes that configuration and weights are made from, as `Checkpoint.sha256`.
        config: PEFT's configuration.
        weights: tensors on the CPU by name.
    """

    folder: Path
    sha256: str
    config: PeftConfig
    weights: dict[str, torch.Tensor]


def read_adapter(folder: Path, *, pinned: bool = False) -> AdapterFiles:
    """Read an adapter folder's configuration and weights.

    Args:
        folder: a PEFT adapter folder, weights in safetensors form.
        pinned: whether into page-locked memory, from where a GPU copies while it works.

    Raises:
        BadAdapter: a file is missing or is no such file.
    """
    try:
        described = (folder / ADAPTER_CONFIG).read_bytes()
        attributes = json.loads(described)
        attributes.pop("runtime_config", None)  # as `PeftConfig.from_pretrained`
        config = PeftConfig.from_peft_type(**attributes)
        content = _content(folder / ADAPTER_WEIGHTS, pinned)
        weights = tensors_of(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadAdapter(f"{folder}: cannot be read: {first_line(error)}") from error
    files = {ADAPTER_CONFIG: described, ADAPTER_WEIGHTS: content.numpy()}
    sha256 = weights_sha256({name: hashlib.sha256(data).hexdigest() for name, data in files.items()})
    return AdapterFiles(folder, sha256, config, weights)


def _content(file: Path, pinned: bool) -> torch.Tensor:
    with file.open("rb") as stream:
        content = torch.empty(os.fstat(stream.fileno()).st_size, dtype=torch.uint8, pin_memory=pinned)
        if stream.readinto(content.numpy()) != len(content):
            raise ValueError(f"{file.name} was cut while it was read")
    return content


def tensors_of(content: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file in memory, as views: `safetensors.torch.load` copies, and stops other threads.

    The format (https://github.com/huggingface/safetensors): 8 bytes that give the header's length, the header in JSON,
    then the data, to which the header's offsets refer.

    Args:
        content: the file's bytes, uint8, shape (N,).

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is no such file, or cut short.
    """
    start = 8 + int.from_bytes(content[:8].numpy().tobytes(), "little")
    if not 8 < start <= len(content):
        raise ValueError(f"no safetensors file: {len(content)} bytes")
    header: dict[str, Any] = json.loads(content[8:start].numpy().tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = (start + offset for offset in entry["data_offsets"])
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ValueError(f"{name} is of dtype {entry['dtype']}; adapters are {', '.join(_DTYPES)}")
        if not start <= begin <= end <= len(content):
            raise ValueError(f"{name} ends at byte {end} of {len(content)}")
        shape = entry["shape"]
        if any(size < 0 for size in shape) or math.prod(shape) * dtype.itemsize != end - begin:
            raise ValueError(f"{name} is of shape {shape}, but has {end - begin} bytes")
        data = content[begin:end]
        if begin % dtype.itemsize:  # old files; a view has to be aligned
            data = data.clone()
        tensors[name] = data.view(dtype).view(shape)
    return tensors


class ReadAhead:
    """Adapters in a given order, each read and hashed while the one before is at work.

    Reading and hashing let go of the interpreter's lock, so neither holds up the thread that feeds a GPU.

    Args:
        folders: adapter folders in the order in which they will be taken.
        pinned: see `read_adapter`.
    """

    def __init__(self, folders: Sequence[Path], *, pinned: bool) -> None:
        self.folders = frozenset(folders)
        self._folders = iter(folders)
        self._pinned = pinned
        self._thread = ThreadPoolExecutor(1)
        self._next = self._begin()

    def _begin(self) -> tuple[Path, Future[AdapterFiles]] | None:
        folder = next(self._folders, None)
        return folder and (folder, self._thread.submit(read_adapter, folder, pinned=self._pinned))

    def take(self, folder: Path) -> AdapterFiles:
        """The next one, which is that of `folder`; the one after it is begun.

        Raises:
            BadAdapter: as `read_adapter`.
        """
        assert self._next is not None and self._next[0] == folder, "taken in another order"
        reading = self._next[1]
        try:
            return reading.result()
        finally:
            self._next = self._begin()

    def close(self) -> None:
        """Wait for the one being read; no further one is begun."""
        self._thread.shutdown(cancel_futures=True)
