"""Few-shot examples from the prompt and from the training file."""

import pytest

from hw3.common.errors import UserError
from hw3.data.few_shot import prompt_examples, sample_examples
from hw3.data.prompt import Example, Prompt
from hw3.data.rows import Row

EXAMPLES = [Example(instruction="甲", output="乙"), Example(instruction="丙", output="丁")]
TRAINING = [
    *(Row(f"m{number}", f"句{number}\n翻譯成文言文：", f"文{number}") for number in range(4)),
    *(Row(f"c{number}", f"句{number}\n翻譯成現代文：", f"白{number}") for number in range(4)),
]


def test_prompt_examples_are_the_first_of_the_prompt_or_of_the_fallback() -> None:
    with_examples, without = Prompt(examples=EXAMPLES), Prompt()
    assert prompt_examples(with_examples, without, 1) == (EXAMPLES[:1], None)
    assert prompt_examples(without, with_examples, 2) == (EXAMPLES, None)
    with pytest.raises(UserError, match="--shots 3: the prompt has 2 few-shot examples; choose 0 to 2"):
        prompt_examples(with_examples, without, 3)


def test_sample_examples_are_nested_and_alternate_directions() -> None:
    _, four = sample_examples(TRAINING, [], 4, seed=1)
    assert [row_id[0] for row_id in four] == ["m", "c", "m", "c"]
    for shots in range(4):
        examples, ids = sample_examples(TRAINING, [], shots, seed=1)
        assert ids == four[:shots] and len(examples) == shots


def test_sample_examples_never_occur_in_the_scored_file() -> None:
    scored = [Row("a", TRAINING[0].instruction, "x"), Row("b", "y", TRAINING[1].output)]
    _, ids = sample_examples(TRAINING, scored, 6, seed=1)
    assert sorted(ids) == ["c0", "c1", "c2", "c3", "m2", "m3"]
    with pytest.raises(UserError, match="--shots 7: 6 training rows do not occur in the scored file; choose 0 to 6"):
        sample_examples(TRAINING, scored, 7, seed=1)
