"""Lists of problems in messages."""

from hw3.common.errors import UserError, first_line, truncate_problems


def test_truncate_problems_shows_20_and_counts_the_others() -> None:
    problems = [str(number) for number in range(23)]
    assert truncate_problems(problems[:20]) == problems[:20]
    assert truncate_problems(problems) == [*problems[:20], "... and 3 more"]


def test_user_error_has_one_line_per_problem() -> None:
    error = UserError("a", "b")
    assert error.problems == ["a", "b"] and str(error) == "a\nb"
    assert first_line(error) == "a"
