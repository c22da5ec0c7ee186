"""Numbers and names as a report formats them."""

from hw3.report.formatting import (
    format_count,
    format_duration,
    format_interval,
    format_length_group,
    format_percent,
    format_perplexity,
    format_signed,
    format_value,
)


def test_format_count_uses_the_plural_except_for_one() -> None:
    assert format_count(1, "row") == "1 row"
    assert format_count(1200, "row") == "1,200 rows"
    assert format_count(2, "process", "processes") == "2 processes"


def test_format_perplexity_drops_decimals_from_1000() -> None:
    assert [format_perplexity(value) for value in (4.521, 789.98, 1234.5)] == ["4.52", "789.98", "1,234"]
    assert format_interval((3.954, 1500.0)) == "[3.95, 1,500]"


def test_format_signed_always_shows_the_sign() -> None:
    assert [format_signed(value) for value in (0.21, -1.3, 0.0)] == ["+0.21", "−1.30", "+0.00"]


def test_format_percent_takes_a_share() -> None:
    assert format_percent(1 / 3) == "33.3%"


def test_format_duration_chooses_the_unit() -> None:
    assert [format_duration(value) for value in (1.5, 90.4, 600, 9000)] == ["1.5 s", "90 s", "10 min", "2.5 h"]


def test_format_length_group_names_the_characters() -> None:
    assert format_length_group("1-10") == "1–10 characters"
    assert format_length_group("51-") == "51 or more characters"


def test_format_value_is_short_text() -> None:
    values = (True, False, None, 1e-4, ["q_proj", "v_proj"], "linear")
    assert [format_value(value) for value in values] == ["yes", "no", "none", "0.0001", "q_proj, v_proj", "linear"]
