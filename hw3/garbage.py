"""When Python's garbage collector had better wait."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection meanwhile, for work that makes many objects to keep.

    Imports and the JSON of a large vocabulary make millions; the collector, which runs by how many there are, looks
    through them over and over and finds nothing.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
