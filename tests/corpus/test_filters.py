"""Every filter rule on literal pairs."""

import pytest

from hw3.corpus.filters import FILTER_RULES, rejection_reason
from hw3.corpus.normalize import normalize_texts


@pytest.mark.parametrize(
    ("classical", "modern", "rule"),
    [
        ("", "今天没有下雨。", "empty"),
        ("今日无□雨。", "今天没有下雨。", "odd characters"),
        ("今日无雨。", "今天没有 OK 下雨。", "odd characters"),
        ("泛舟氵垒水上。", "在氵垒水上划船。", "odd characters"),
        ("今日无雨。", "今日，無雨", "identical"),
        ("无雨。", "没有下雨。", "length"),
        ("今日无雨。" * 20, "今天没有下雨。" * 42 + "今天没下雨。", None),
        ("今日无雨。" * 20, "今天没有下雨。" * 43, "length"),
        ("今日无雨，明日亦无雨。", "今天明天。", "length ratio"),
        ("今日无雨。", "今天和明天都没有下雨，后天和大后天也没有。", "length ratio"),
        ("父胤之宋司空主簿也。", "自从两汉以来推举贤才都是这样。", "character overlap"),
        ("今日无雨。", "今天没有下雨。", None),
    ],
)
def test_rejection_reason_is_the_first_broken_rule(classical: str, modern: str, rule: str | None) -> None:
    reason = rejection_reason(classical, modern, tuple(normalize_texts([classical, modern])))
    assert reason == rule
    assert rule is None or rule in FILTER_RULES
