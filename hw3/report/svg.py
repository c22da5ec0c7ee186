"""Elements of inline SVG pictures. Text stays text, and colors come from the page's style, for light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup, escape
from matplotlib.ticker import MaxNLocator

from hw3.runs.results_file import ScoreEntry

# Multiples of powers of ten that a log axis can show as ticks; the first that give enough ticks are used.
_LOG_TICK_MULTIPLES = ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 4, 5, 6, 8))
_MIN_LOG_TICKS = 4


class LogScale:
    """A logarithmic scale from values to pixels.

    Args:
        values: values that must lie on the scale.
        start: pixel of the lowest value.
        end: pixel of the highest value.
        margin: free part at both ends, as a share of the scale.
    """

    def __init__(self, values: Sequence[float], start: float, end: float, margin: float = 0.06) -> None:
        low, high = math.log(min(values)), math.log(max(values))
        padding = margin * (high - low) or 0.1
        self.low, self.high, self.start, self.end = low - padding, high + padding, start, end

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        return self.start + (math.log(value) - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return round values inside the scale."""
        low, high = math.exp(self.low), math.exp(self.high)
        powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
        for multiples in _LOG_TICK_MULTIPLES:
            ticks = [multiple * power for power in powers for multiple in multiples if low <= multiple * power <= high]
            if len(ticks) >= _MIN_LOG_TICKS:
                return ticks
        return [value for value in MaxNLocator(nbins=5).tick_values(low, high) if low <= value <= high]


def interval_drawer(entries: Sequence[ScoreEntry]) -> Callable[[ScoreEntry], Markup]:
    """Return a function that draws an entry's mean perplexity and interval for a table cell.

    Args:
        entries: the entries of the table; all pictures use one log scale.
    """
    width, height = 132, 16
    values = [value for entry in entries for value in (entry.mean_perplexity, *entry.mean_perplexity_ci95)]
    x = LogScale(values, 6, width - 6, margin=0.02)

    def draw(entry: ScoreEntry) -> Markup:
        low, high = map(x, entry.mean_perplexity_ci95)
        style = "base" if entry.is_base else "score"
        return Markup(
            f'<svg class="interval" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            + 'aria-hidden="true">'
            + line("grid", 4, height / 2, width - 4, height / 2)
            + line(f"span {style}", low, height / 2, high, height / 2)
            + f'<circle class="{style}" cx="{x(entry.mean_perplexity):.1f}" cy="{height / 2:g}" r="3.5"/></svg>'
        )

    return draw


def line(style: str, x1: float, y1: float, x2: float, y2: float) -> str:
    """Return a straight line; `style` is its CSS class."""
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def polyline(style: str, points: Sequence[tuple[float, float]]) -> str:
    """Return a line through points."""
    return f'<polyline class="{style}" points="{_format_points(points)}"/>'


def polygon(style: str, points: Sequence[tuple[float, float]]) -> str:
    """Return a filled area."""
    return f'<polygon class="{style}" points="{_format_points(points)}"/>'


def dot(style: str, x: float, y: float, radius: float, tooltip: str) -> str:
    """Return a dot that shows a text when the mouse is over it."""
    return f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"><title>{escape(tooltip)}</title></circle>'


def text(style: str, x: float, y: float, content: str) -> str:
    """Return a line of text."""
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(content)}</text>'


def _format_points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
