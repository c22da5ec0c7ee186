"""Inline SVG pictures. Text stays text, and colors come from the page's style, for light and dark."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from xml.etree import ElementTree

from markupsafe import Markup
from matplotlib.figure import Figure

from hw3.common.figures import figure_settings
from hw3.evaluation.learning_curve import COLORS
from hw3.runs.results_file import ScoreEntry

_VARIABLES = {color: f"var(--{name})" for name, color in COLORS.items()}


def render_figure(figure: Figure, style: str, description: str) -> Markup:
    """Return a Matplotlib figure as an SVG element for this page.

    The page's Content-Security-Policy forbids style attributes, so they become attributes of SVG. The colors become
    variables of the page's style; fonts are the page's. An artist's `gid` becomes its tooltip.

    Args:
        figure: the figure. A point of it is a pixel of the page.
        style: the element's CSS class.
        description: text for people who do not see the picture. No two pictures of a page may have the same one and
            the same size.
    """
    file = io.BytesIO()
    # Matplotlib derives the ids inside the picture from this salt; they must be unique in the page.
    salt = f"{description} {figure.get_figwidth()}"
    with figure_settings({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ElementTree.fromstring(file.getvalue())
    tooltips = {artist.get_gid() for artist in figure.findobj()}
    for element in list(root.iter()):
        _adapt_to_page(element, tooltips)
    view_box = root.attrib["viewBox"]
    root.attrib = {"class": style, "viewBox": view_box, "role": "img", "aria-label": description}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _adapt_to_page(element: ElementTree.Element, tooltips: set[str | None]) -> None:
    """Replace names of XML, style attributes, colors and ids of one element by what the page allows."""
    element.tag = element.tag.rpartition("}")[2]
    if element.tag == "defs":  # a style inside a picture would apply to the whole page; nothing needs clipping
        for child in [*element.findall("{*}style"), *element.findall("{*}clipPath")]:
            element.remove(child)
    attributes = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
    attributes.pop("clip-path", None)
    for declaration in attributes.pop("style", "").split(";"):
        name, _, value = map(str.strip, declaration.partition(":"))
        if name and not name.startswith("font"):
            attributes[name] = _VARIABLES.get(value, value)
    gid = attributes.pop("id", None) if element.tag == "g" else None
    if gid in tooltips - {None}:
        title = ElementTree.Element("title")
        title.text = gid
        element.insert(0, title)
    element.attrib = attributes


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
            + f'<path class="grid" d="M4 {height / 2:g}H{width - 4}"/>'
            + f'<path class="span {style}" d="M{low:.1f} {height / 2:g}H{high:.1f}"/>'
            + f'<circle class="{style}" cx="{x(entry.mean_perplexity):.1f}" cy="{height / 2:g}" r="3.5"/></svg>'
        )

    return draw
