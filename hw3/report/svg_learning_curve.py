"""Draw the learning curve as inline SVG: mean perplexity above, training loss below."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape
from matplotlib.ticker import MaxNLocator

from hw3.evaluation.label_layout import spread_positions
from hw3.evaluation.learning_curve import CurveEntries, curve_entries
from hw3.evaluation.results import EvalResults
from hw3.report.formatting import format_perplexity, format_shots
from hw3.report.svg import LogScale, dot, line, polygon, polyline, text
from hw3.runs.results_file import ScoreEntry

# All in pixels.
_LEFT, _TOP = 44, 24
_SCORES_HEIGHT, _LOSSES_HEIGHT, _PANEL_GAP = 260, 84, 30
_STEP_AXIS_HEIGHT = 44
_CHARACTER_WIDTH = 7
_LABEL_GAP = 14.0
_BOTTOM = _TOP + _SCORES_HEIGHT


class LearningCurve:
    """A drawing of the learning curve.

    It shows the zero-shot scores of the base model (step 0) and of the checkpoints with their intervals, and the base
    model's scores as horizontal lines. It also shows the scores on the dev file if that file selects the checkpoint,
    the best checkpoint, and the training loss. Every point has a tooltip with its values.

    Args:
        results: scores on `data.eval`.
        losses: (step, training loss) pairs.
        width: width in pixels. The text size does not depend on it, so a narrow screen needs a narrow drawing.
    """

    def __init__(self, results: EvalResults, losses: Sequence[tuple[int, float]], width: int) -> None:
        self.results, self.losses, self.width = results, losses, width
        self.entries = curve_entries(results)
        self.best = results.best_entry()
        selector = results.selector
        has_dev_scores = selector is not None and selector is not results
        self.dev_line = curve_entries(selector).line if selector is not None and has_dev_scores else []
        self.base_labels = [
            f"{format_shots(entry) if entry.shots else 'base'} {format_perplexity(entry.mean_perplexity)}"
            for entry in self.entries.base
        ]
        self.right = width - 12 - _CHARACTER_WIDTH * max(map(len, self.base_labels), default=0)
        self.last_step = max([entry.step for entry in self.entries.line] + [step for step, _ in losses] + [1])
        self.y = LogScale(_shown_values(self.entries, self.dev_line), _BOTTOM, _TOP)

    def x(self, step: float) -> float:
        """Return the pixel of an optimizer step."""
        return _LEFT + 6 + step / self.last_step * (self.right - _LEFT - 12)

    def draw(self) -> Markup:
        """Return the SVG element."""
        bottom = _BOTTOM + (_PANEL_GAP + _LOSSES_HEIGHT if self.losses else 0)
        height = bottom + _STEP_AXIS_HEIGHT
        parts = [
            f'<svg class="curve" viewBox="0 0 {self.width} {height}" width="{self.width}" role="img" '
            f'aria-label="{escape(self._description())}">',
            f'<text class="axis" x="{_LEFT}" y="13">mean perplexity, log scale</text>',
            *self._draw_grid(),
            *self._draw_base_lines(),
            *self._draw_intervals(),
            *self._draw_line("dev", self.dev_line, 2.5, "dev, "),
            *self._draw_line("score", self.entries.line, 3.5),
            *self._draw_best(),
            line("frame", _LEFT, _BOTTOM, self.right, _BOTTOM),
            *(self._draw_losses(bottom) if self.losses else []),
            *self._draw_step_axis(bottom),
            "</svg>",
        ]
        return Markup("".join(parts))

    def _description(self) -> str:
        description = f"Learning curve of {self.results.run_name} on {self.results.data.path}"
        if self.best is None:
            return description
        return f"{description}: best {self.best.mean_perplexity:.4g} at step {self.best.step}"

    def _point(self, entry: ScoreEntry) -> tuple[float, float]:
        return self.x(entry.step), self.y(entry.mean_perplexity)

    def _draw_grid(self) -> list[str]:
        return [part for value in self.y.ticks() for part in self._grid_line(value, self.y(value))]

    def _grid_line(self, value: float, y: float) -> tuple[str, str]:
        return line("grid", _LEFT, y, self.right, y), text("tick end", _LEFT - 6, y + 4, f"{value:g}")

    def _draw_base_lines(self) -> list[str]:
        parts = []
        levels = [self.y(entry.mean_perplexity) for entry in self.entries.base]
        positions = spread_positions(levels, _LABEL_GAP)
        for entry, label, level, position in zip(self.entries.base, self.base_labels, levels, positions, strict=True):
            parts.append(line("level" if entry.shots else "level zero", _LEFT, level, self.right, level))
            parts.append(text("base", self.right + 6, position + 4, label))
        return parts

    def _draw_intervals(self) -> list[str]:
        lower = [(self.x(entry.step), self.y(entry.mean_perplexity_ci95[0])) for entry in self.entries.finetuned]
        upper = [(self.x(entry.step), self.y(entry.mean_perplexity_ci95[1])) for entry in self.entries.finetuned]
        if len(lower) == 1:
            return [line("band", *lower[0], *upper[0])]
        return [polygon("band", [*upper, *reversed(lower)])] if lower else []

    def _draw_line(self, style: str, entries: Sequence[ScoreEntry], radius: float, prefix: str = "") -> list[str]:
        if not entries:
            return []
        points = [self._point(entry) for entry in entries]
        dots = [
            dot(style, *point, radius, prefix + _tooltip(entry)) for point, entry in zip(points, entries, strict=True)
        ]
        return [polyline(style, points), *dots]

    def _draw_best(self) -> list[str]:
        if self.best is None:
            return []
        x, y = self._point(self.best)
        anchor = "start" if x < _LEFT + 70 else "end" if x > self.right - 70 else "middle"
        label_y = min(self.y(self.best.mean_perplexity_ci95[0]) + 15, _BOTTOM - 4)
        label = f"best {format_perplexity(self.best.mean_perplexity)}, step {self.best.step:,}"
        return [dot("best", x, y, 6.5, f"best: {_tooltip(self.best)}"), text(f"best {anchor}", x, label_y, label)]

    def _draw_losses(self, bottom: float) -> list[str]:
        highest = max(loss for _, loss in self.losses) * 1.05 or 1.0
        parts = [text("axis", _LEFT, bottom - _LOSSES_HEIGHT - 6, "training loss, nats per token")]
        for value in MaxNLocator(nbins=3).tick_values(0, highest):
            if value <= highest:
                parts += self._grid_line(value, bottom - value / highest * _LOSSES_HEIGHT)
        points = [(self.x(step), bottom - loss / highest * _LOSSES_HEIGHT) for step, loss in self.losses]
        return [*parts, polyline("loss", points), line("frame", _LEFT, bottom, self.right, bottom)]

    def _draw_step_axis(self, bottom: float) -> list[str]:
        locator = MaxNLocator(nbins=max(3, self.width // 90), integer=True)
        ticks = [value for value in locator.tick_values(0, self.last_step) if 0 <= value <= self.last_step]
        labels = [text("tick middle", self.x(value), bottom + 17, f"{value:,.0f}") for value in ticks]
        return [*labels, text("axis end", self.right, bottom + 35, "optimizer step")]


def _shown_values(entries: CurveEntries, dev_line: Sequence[ScoreEntry]) -> list[float]:
    values = [entry.mean_perplexity for entry in (*entries.base, *entries.line, *dev_line)]
    return values + [bound for entry in entries.finetuned for bound in entry.mean_perplexity_ci95]


def _tooltip(entry: ScoreEntry) -> str:
    low, high = entry.mean_perplexity_ci95
    return f"step {entry.step:,}: {entry.mean_perplexity:.3f} [{low:.2f}, {high:.2f}]"
