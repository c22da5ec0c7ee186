"""Pictures as inline SVG: text stays text, colours come from the page's style, so light and dark both work."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup, escape
from matplotlib.ticker import MaxNLocator

from hw3.evaluation.learning_curve import own_entries, spread
from hw3.evaluation.results import Results
from hw3.report.formatting import figure, shots

# Multiples of powers of ten to mark on a log axis, the coarsest first that gives enough marks.
_LOG_MARKS = ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 4, 5, 6, 8))
_LABEL_GAP = 14.0


class _Log:
    """A log scale from values to pixels."""

    def __init__(self, values: Sequence[float], start: float, end: float, margin: float = 0.06) -> None:
        low, high = math.log(min(values)), math.log(max(values))
        room = margin * (high - low) or 0.1
        self.low, self.high, self.start, self.end = low - room, high + room, start, end

    def __call__(self, value: float) -> float:
        return self.start + (math.log(value) - self.low) / (self.high - self.low) * (self.end - self.start)

    def marks(self) -> list[float]:
        """Round values inside the scale."""
        low, high = math.exp(self.low), math.exp(self.high)
        found: list[float] = []
        for multiples in _LOG_MARKS:
            powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            found = [m * 10.0**p for p in powers for m in multiples if low <= m * 10.0**p <= high]
            if len(found) >= 4:
                return found
        return [value for value in MaxNLocator(nbins=5).tick_values(low, high) if low <= value <= high]


def curve(results: Results, losses: list[tuple[int, float]], width: int) -> Markup:
    """The learning curve of `width` pixels: the score with its interval above, the training loss below.

    Shown are tuned zero-shot entries under the recipe's prompt, the base as step 0 and as level lines by worked
    examples, the dev file's scores where one chooses, and the best step. Every point tells its figures when pointed at.

    Args:
        results: on the run's scored file.
        losses: (step, loss) as logged.
        width: pixels; text keeps its size, so a narrow picture is for a narrow screen.
    """
    base, tuned = own_entries(results)
    chooser = results.chosen_on
    dev: list[dict[str, Any]] = []
    if chooser is not None and chooser is not results:
        dev_base, dev_tuned = own_entries(chooser)
        dev = [*(entry for entry in dev_base if entry["shots"] == 0), *dev_tuned]
    line = [*(entry for entry in base if entry["shots"] == 0), *tuned]
    best = results.best_entry()

    labels = [f"{shots(e) if e['shots'] else 'base'} {figure(e['mean_perplexity'])}" for e in base]
    left, right, top, upper, lower = 44, 12 + 7 * max((len(label) for label in labels), default=0), 24, 260, 84
    bottom = top + upper
    height = bottom + 44 + (lower + 30 if losses else 0)
    values = [entry["mean_perplexity"] for entry in (*base, *line, *dev)]
    values += [bound for entry in tuned for bound in entry["mean_perplexity_ci95"]]
    last = max([entry["step"] for entry in line] + [step for step, _ in losses] + [1])

    def x(step: float) -> float:
        return left + 6 + step / last * (width - left - right - 12)

    y = _Log(values, bottom, top)
    parts = [
        f'<svg class="curve" viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'aria-label="{escape(_in_words(results, best))}">',
        f'<text class="axis" x="{left}" y="13">mean perplexity, log scale</text>',
    ]
    for value in y.marks():
        parts.append(_line("grid", left, y(value), width - right, y(value)))
        parts.append(_text("tick end", left - 6, y(value) + 4, f"{value:g}"))
    places = spread([y(entry["mean_perplexity"]) for entry in base], _LABEL_GAP)
    for entry, label, place in zip(base, labels, places, strict=True):
        level = y(entry["mean_perplexity"])
        parts.append(_line("level zero" if entry["shots"] == 0 else "level", left, level, width - right, level))
        parts.append(_text("base", width - right + 6, place + 4, label))
    if tuned:
        steps = [x(entry["step"]) for entry in tuned]
        low, high = ([y(entry["mean_perplexity_ci95"][end]) for entry in tuned] for end in (0, 1))
        around = [*zip(steps, high, strict=True), *reversed(list(zip(steps, low, strict=True)))]
        if len(tuned) > 1:
            parts.append(f'<polygon class="band" points="{_points(around)}"/>')
        else:
            parts.append(_line("band", steps[0], low[0], steps[0], high[0]))
    if dev:
        parts.append(_path("dev", [(x(entry["step"]), y(entry["mean_perplexity"])) for entry in dev]))
        parts += [
            _dot("dev", x(entry["step"]), y(entry["mean_perplexity"]), 2.5, f"dev, {_told(entry)}") for entry in dev
        ]
    parts.append(_path("score", [(x(entry["step"]), y(entry["mean_perplexity"])) for entry in line]))
    parts += [_dot("score", x(entry["step"]), y(entry["mean_perplexity"]), 3.5, _told(entry)) for entry in line]
    if best is not None:
        at, level = x(best["step"]), y(best["mean_perplexity"])
        parts.append(_dot("best", at, level, 6.5, f"best: {_told(best)}"))
        anchor = "start" if at < left + 70 else "end" if at > width - right - 70 else "middle"
        below = y(best["mean_perplexity_ci95"][0]) + 15
        parts.append(
            _text(
                f"best {anchor}",
                at,
                min(below, bottom - 4),
                f"best {figure(best['mean_perplexity'])}, step {best['step']:,}",
            )
        )
    parts.append(_line("frame", left, bottom, width - right, bottom))
    end = bottom
    if losses:
        start, end = bottom + 30, bottom + 30 + lower
        most = max(loss for _, loss in losses) * 1.05 or 1.0
        parts.append(_text("axis", left, start - 6, "training loss, nats a token"))
        for value in MaxNLocator(nbins=3).tick_values(0, most):
            if value <= most:
                level = end - value / most * (end - start)
                parts.append(_line("grid", left, level, width - right, level))
                parts.append(_text("tick end", left - 6, level + 4, f"{value:g}"))
        parts.append(_path("loss", [(x(step), end - loss / most * (end - start)) for step, loss in losses]))
        parts.append(_line("frame", left, end, width - right, end))
    for value in MaxNLocator(nbins=max(3, width // 90), integer=True).tick_values(0, last):
        if 0 <= value <= last:
            parts.append(_text("tick middle", x(value), end + 17, f"{value:,.0f}"))
    parts.append(_text("axis end", width - right, end + 35, "optimizer step"))
    parts.append("</svg>")
    return Markup("".join(parts))


def interval_scale(entries: Sequence[dict[str, Any]]) -> Callable[[dict[str, Any]], Markup]:
    """A function that draws one entry's score and interval as a small picture, all on one log scale."""
    width, height = 132, 16
    values = [value for entry in entries for value in (entry["mean_perplexity"], *entry["mean_perplexity_ci95"])]
    x = _Log(values, 6, width - 6, margin=0.02)

    def draw(entry: dict[str, Any]) -> Markup:
        low, high = (x(bound) for bound in entry["mean_perplexity_ci95"])
        kind = "score" if entry["checkpoint"] else "base"
        return Markup(
            f'<svg class="interval" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            + 'aria-hidden="true">'
            + _line("grid", 4, height / 2, width - 4, height / 2)
            + _line(f"span {kind}", low, height / 2, high, height / 2)
            + f'<circle class="{kind}" cx="{x(entry["mean_perplexity"]):.1f}" cy="{height / 2:g}" r="3.5"/></svg>'
        )

    return draw


def _in_words(results: Results, best: dict[str, Any] | None) -> str:
    where = f"Learning curve of {results.head['run']} on {results.head['data']['path']}"
    return where if best is None else f"{where}: best {best['mean_perplexity']:.4g} at step {best['step']}"


def _told(entry: dict[str, Any]) -> str:
    low, high = entry["mean_perplexity_ci95"]
    return f"step {entry['step']:,}: {entry['mean_perplexity']:.3f} [{low:.2f}, {high:.2f}]"


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _path(kind: str, points: Sequence[tuple[float, float]]) -> str:
    return f'<polyline class="{kind}" points="{_points(points)}"/>'


def _dot(kind: str, x: float, y: float, radius: float, told: str) -> str:
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"><title>{escape(told)}</title></circle>'


def _text(kind: str, x: float, y: float, text: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
