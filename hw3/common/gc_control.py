"""Control of Python's garbage collector, which wastes time where many objects are created and none can be freed."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

# When Python exits, a last collection would visit every object, although the system frees the memory anyway.
atexit.register(gc.freeze)


@contextmanager
def gc_paused() -> Iterator[None]:
    """Pause the garbage collector inside the block.

    Imports and the JSON of a large vocabulary create millions of objects. The collector runs after every so many new
    objects, visits all of them again, and finds nothing to free.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
