"""Batches by length, and the prefix that prompts share."""

from hypothesis import given
from hypothesis import strategies as st

from hw3.data.batching import batch_by_length, common_prefix_length
from hw3.data.tokenization import EncodedRow


@given(lengths=st.lists(st.integers(1, 60), max_size=40), budget=st.sampled_from([1, 90, 400]))
def test_batch_by_length_respects_the_budget_and_loses_no_row(lengths: list[int], budget: int) -> None:
    batches = list(batch_by_length(lengths, budget))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget


def test_common_prefix_length_leaves_one_id_per_prompt() -> None:
    def prefix(*prompts: list[int]) -> int:
        return common_prefix_length([EncodedRow(str(number), prompt, [1], 0) for number, prompt in enumerate(prompts)])

    assert prefix([2, 5, 6, 7], [2, 5, 6, 8, 9]) == 3
    # The last id of a prompt is not shared: its logits predict the first output token.
    assert prefix([2, 5, 6], [2, 5, 6, 7]) == 2 and prefix([2, 5], [2, 5]) == 1
    assert prefix([2], [3]) == 0 and prefix([4, 5], [3, 5]) == 0
