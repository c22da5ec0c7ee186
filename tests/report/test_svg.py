"""Pictures of the page: scales, colors, tooltips, and what the page's Content-Security-Policy allows."""

import re
from xml.etree import ElementTree

from matplotlib.figure import Figure
from sample_runs import Page

from hw3.common.figures import figure_settings
from hw3.report.svg import LogScale, render_figure


def draw_point(name: str) -> Figure:
    """Return a figure with one named point."""
    with figure_settings():
        figure = Figure(figsize=(4, 3), dpi=72)
        axes = figure.subplots()
        axes.plot(1, 2, marker="o", color="#0072b2", gid=f"tooltip of {name}")
        axes.set_title(name, color="#1c1e21")
    return figure


def test_log_scale_maps_equal_ratios_to_equal_distances() -> None:
    scale = LogScale([1.0, 100.0], 0, 100)
    assert round(scale(10.0) - scale(1.0), 9) == round(scale(100.0) - scale(10.0), 9)
    assert 0 < scale(1.0) < scale(100.0) < 100


def test_render_figure_escapes_names_and_shows_gids_as_tooltips() -> None:
    name = '<b>測試 & "$x$"</b>\ud7ff'
    root = ElementTree.fromstring(render_figure(draw_point(name), "curve", name))
    assert root.attrib == {"class": "curve", "viewBox": "0 0 288 216", "role": "img", "aria-label": name}
    assert [element.text for element in root.iter("title")] == [f"tooltip of {name}"]
    assert name in [element.text for element in root.iter("text")]


def test_render_figure_uses_the_colors_of_the_page_and_no_inline_style() -> None:
    svg = render_figure(draw_point("a"), "curve", "a")
    assert "style" not in svg and "font" not in svg
    assert 'fill="var(--ink)"' in svg and 'fill="var(--score)"' in svg
    assert "#0072b2" not in svg and "#1c1e21" not in svg


def test_render_figure_is_reproducible_and_its_ids_are_those_of_one_picture() -> None:
    first, again, other = (render_figure(draw_point("a"), "curve", description) for description in "aab")
    ids, other_ids = (re.findall(r'\bid="([^"]*)"', svg) for svg in (first, other))
    assert first == again
    assert ids and not set(ids) & set(other_ids)
    assert set(re.findall(r'href="#(\w+)"', first)) <= set(ids)


def test_page_has_no_id_twice(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 10
