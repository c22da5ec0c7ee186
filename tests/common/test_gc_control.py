"""The garbage collector is paused inside the block, and only resumed if it was enabled before."""

import gc

from hw3.common.gc_control import gc_paused


def test_gc_paused_restores_the_state_before_the_block() -> None:
    assert gc.isenabled()
    with gc_paused():
        assert not gc.isenabled()
        with gc_paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
