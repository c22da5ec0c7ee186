"""Render sections as HTML and as Markdown. Everything except our own pictures is escaped."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hw3.common.text import escape_invisible
from hw3.report.blocks import Block, Section, Table
from hw3.report.language import html_language, tr

# Characters with a meaning anywhere; `]` before a link's target; list, heading and checkbox marks at the line's start.
_MARKDOWN_SYNTAX = re.compile(r"([\\`*_<>&|~$]|\](?=[(\[])|^[-+=#\[]|(?<=^\d)[.)](?=\s))")


def render_html(title: str, summary: list[Block], sections: list[Section]) -> str:
    """Return a page that loads nothing.

    Style and script are inline, and a Content-Security-Policy forbids everything else.
    """
    folder = files("hw3.report")
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    environment = _create_environment(escape_invisible)
    return environment.get_template("page.html").render(
        title=title,
        summary=summary,
        sections=sections,
        style=Markup(style),
        script=Markup(script),
        language=html_language(),
        style_hash=_policy_hash(style),
        script_hash=_policy_hash(script),
    )


def render_markdown(title: str, summary: list[Block], sections: list[Section]) -> str:
    """Return the same report as GitHub-flavoured Markdown."""
    # `escape_markdown` returns `Markup`, which Jinja's own escaping, made for HTML, leaves unchanged.
    environment = _create_environment(escape_markdown)
    # NUL stands for a line break inside code, so that empty lines in code survive the substitution below.
    filters: dict[str, Callable[..., object]] = {
        "code_block": lambda text: code_block(text).replace("\n", "\0"),
        "link_target": link_target,
        "text_cells": _text_cells,
    }
    environment.filters |= filters
    text = environment.get_template("page.md").render(title=title, summary=summary, sections=sections)
    return re.sub(r"\n{3,}", "\n\n", text).replace("\0", "\n").strip() + "\n"


def escape_markdown(text: str) -> Markup:
    """Escape text so that Markdown shows it unchanged, on one line."""
    escaped = _MARKDOWN_SYNTAX.sub(r"\\\1", escape_invisible(text)).replace("\n", "<br>")
    return Markup(escaped)


def code_block(text: str) -> Markup:
    """Return text as a Markdown code block. Its fence is longer than any run of backticks in the text."""
    longest = max((len(backticks) for backticks in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}text\n{escape_invisible(text)}\n{fence}")


def link_target(path: str) -> Markup:
    """Return a path as the target of a Markdown link."""
    escaped = re.sub(r"[<>]", lambda match: f"%{ord(match[0]):02X}", escape_invisible(path)).replace("\n", "%0A")
    return Markup(f"<{escaped}>")


def _create_environment(escape: Callable[[str], str]) -> Environment:
    """Return an environment whose templates pass all text through `escape`, then through Jinja's HTML escaping."""
    environment = Environment(
        loader=PackageLoader("hw3.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else escape(str(value)),
    )
    environment.globals["tr"] = tr
    return environment


def _text_cells(table: Table) -> list[list[str]]:
    """Return a table's header and rows without columns of pictures."""
    pictures = {index for row in table.rows for index, cell in enumerate(row) if isinstance(cell, Markup)}
    return [[cell for index, cell in enumerate(row) if index not in pictures] for row in (table.header, *table.rows)]


def _policy_hash(text: str) -> str:
    """Return the hash of an inline style or script, as a Content-Security-Policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
