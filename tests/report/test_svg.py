"""The log scale of pictures, and the escaping of their texts."""

from hw3.report.svg import LogScale, dot, text


def test_log_scale_maps_equal_ratios_to_equal_distances() -> None:
    scale = LogScale([1.0, 100.0], 0, 100)
    assert round(scale(10.0) - scale(1.0), 9) == round(scale(100.0) - scale(10.0), 9)
    assert 0 < scale(1.0) < scale(100.0) < 100


def test_log_scale_ticks_are_round_and_inside() -> None:
    assert LogScale([1.5, 5000.0], 0, 100).ticks() == [1.0, 10.0, 100.0, 1000.0]
    assert LogScale([4.0, 30.0], 0, 100).ticks() == [4.0, 5.0, 6.0, 8.0, 10.0, 20.0, 30.0]


def test_texts_are_escaped() -> None:
    assert text("tick", 1, 2, "<b>") == '<text class="tick" x="1.0" y="2.0">&lt;b&gt;</text>'
    assert "<title>a &amp; b</title>" in dot("best", 1, 2, 3, "a & b")
