"""Figures and names as a report words them."""

from __future__ import annotations

import math
from typing import Any

from hw3.evaluation.bootstrap import PairedDifference

CI = "[95\u00a0%]"  # in the head of a column
DIRECTIONS = {"all": "all rows", "m2c": "modern to Classical", "c2m": "Classical to modern", "other": "other wording"}

INTO = DIRECTIONS | {"m2c": "into Classical", "c2m": "into modern"}  # where there is little room


def plural(count: int, noun: str, many: str | None = None) -> str:
    """`1 row`, `1,200 rows`, `2 processes`."""
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"


def figure(value: float) -> str:
    """A perplexity: two decimals, none where they say nothing."""
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def interval(bounds: tuple[float, float] | list[float]) -> str:
    """`[3.95, 5.18]`."""
    return f"[{figure(bounds[0])}, {figure(bounds[1])}]"


def score(entry: dict[str, Any]) -> str:
    """`4.52 [3.95, 5.18]`."""
    return f"{figure(entry['mean_perplexity'])} {interval(entry['mean_perplexity_ci95'])}"


def difference(pair: PairedDifference) -> str:
    """`+5.18 [+4.02, +6.55]`, with a true minus."""
    return "{} [{}, {}]".format(*map(signed, (pair.difference, *pair.ci95)))


def signed(value: float) -> str:
    """`+0.21`, `−1.30`."""
    return ("−" if value < 0 else "+") + figure(abs(value))


def share(value: float) -> str:
    """A share of 1 as a percentage."""
    return f"{100 * value:.1f} %"


def seconds(value: float) -> str:
    """A duration for people."""
    if value < 120:
        return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def length_group(name: str) -> str:
    """`1-10` and `51-` of `by_length`."""
    return f"{name.replace('-', '–')} characters" if name[-1] != "-" else f"{name[:-1]} characters and more"


def shots(entry: dict[str, Any]) -> str:
    """`zero-shot`, `4-shot`, with how the examples were come by where they were drawn."""
    name = f"{entry['shots']}-shot" if entry["shots"] else "zero-shot"
    return f"{name}, drawn" if entry["example_ids"] else name


def certain(pair: PairedDifference) -> bool:
    """Whether the interval of a paired difference leaves out 0."""
    return pair.ci95[0] > 0 or pair.ci95[1] < 0


def spread_of(perplexities: list[float]) -> float:
    """How far apart systems are on a row: log of the highest over the lowest perplexity."""
    return math.log(max(perplexities) / min(perplexities)) if perplexities else 0.0


def brief(value: Any) -> str:
    """A setting's value in a word or two."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(brief, value))
    return str(value)
