"""Memory estimates of rows against the sizes of keys, values and logits."""

from hypothesis import given
from hypothesis import strategies as st
from tiny_models import build_gemma2

from hw3.data.batching import batch_by_length
from hw3.generation.batch_memory import estimate_row_bytes

GEMMA = build_gemma2()


@given(lengths=st.lists(st.tuples(st.integers(1, 500), st.integers(1, 500)), min_size=1, max_size=30))
def test_estimate_row_bytes_keeps_a_batch_within_memory(lengths: list[tuple[int, int]]) -> None:
    """Per token: two layers of keys and values, one more layer, and two query heads, with 2 x 32 numbers of 4 bytes."""
    prompt_lengths, limits = map(list, zip(*lengths, strict=True))
    batch_bytes = 3_000_000
    for batch in batch_by_length(estimate_row_bytes(GEMMA, prompt_lengths, limits), batch_bytes):
        tokens = max(prompt_lengths[index] for index in batch) + max(limits[index] for index in batch) + 64
        assert len(batch) == 1 or len(batch) * (2 * 32 * 4 * (3 + 2) * tokens + 3 * 4 * 64) <= batch_bytes
    assert estimate_row_bytes(GEMMA, [100], [28]) == [2 * 32 * 4 * 5 * 192 + 768]
