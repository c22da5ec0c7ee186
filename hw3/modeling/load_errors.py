"""Find the error of a model's loading in the report that transformers logs."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator

import torch

_OUT_OF_MEMORY = re.compile(r"OutOfMemoryError: ([^\n]*)")


@contextlib.contextmanager
def out_of_memory_raised() -> Iterator[None]:
    """Raise PyTorch's error if memory runs out while a model's weights are quantized inside the block.

    transformers 5.23 (`log_conversion_errors` in core_model_loading.py) catches every error of a conversion, logs a
    report with one traceback per weight, and raises a RuntimeError that does not name the cause. The report is dropped.

    Raises:
        torch.OutOfMemoryError: the report names it.
    """
    found: list[str] = []

    def is_shown(record: logging.LogRecord) -> bool:
        match = _OUT_OF_MEMORY.search(record.getMessage())
        if match is not None:
            found.append(match[1])
        return match is None

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_shown)
    try:
        yield
    except RuntimeError as error:
        if found:
            raise torch.OutOfMemoryError(found[0]) from error
        raise
    finally:
        logger.removeFilter(is_shown)
