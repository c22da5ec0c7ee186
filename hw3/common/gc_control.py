"""When Python's garbage collector had better wait, or stay away."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

# The last collection, as Python ends, would look through everything for memory that the system takes back anyway.
atexit.register(gc.freeze)


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
