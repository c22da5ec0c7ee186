"""Limits of new tokens by the lengths of training rows."""

from helpers import CHARACTERS

from hw3.data.rows import Row
from hw3.data.tokenization import Encoder
from hw3.generation.output_limits import OutputLengthLimits


def test_get_max_new_tokens_follows_the_training_rows(encoder: Encoder) -> None:
    """Training outputs of 10, 25 and 20 tokens, EOS included, to instructions of 4, 10 and 20 characters."""
    training_rows = [
        Row(str(size), CHARACTERS[:size], CHARACTERS[0] * output) for size, output in ((4, 9), (10, 24), (20, 19))
    ]
    lengths = OutputLengthLimits(training_rows, encoder)
    limits = {size: lengths.get_max_new_tokens("問" * size) for size in (1, 4, 9, 10, 20, 30, 40)}
    assert limits == {1: 32, 4: 32, 9: 32, 10: 50, 20: 50, 30: 75, 40: 100}
