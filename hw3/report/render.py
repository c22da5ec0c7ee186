"""Sections to HTML and Markdown. Everything that is not a picture of ours is escaped."""

from __future__ import annotations

import base64
import hashlib
import re
import unicodedata
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hw3.report.blocks import Block, Section

# Characters that mean something anywhere; what makes a link; what makes a list, a heading or a box at the beginning.
_MARKDOWN = re.compile(r"([\\`*_<>&|~$]|\](?=[(\[])|^[-+=#\[]|(?<=^\d)[.)](?=\s))")
# Control, formatting (the bidirectional ones among them), half a surrogate pair, line and paragraph separators.
_INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")


def visible(text: str) -> str:
    """Text whose invisible characters are spelled out (`\\u202e`): they could turn the text around them about."""
    return "".join(
        f"\\u{ord(character):04x}"
        if unicodedata.category(character) in _INVISIBLE and character not in "\n\t"
        else character
        for character in text
    )


def _environment(shown: Callable[[str], str]) -> Environment:
    """Templates that escape everything; text goes through `shown` first."""
    return Environment(
        loader=PackageLoader("hw3.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else shown(str(value)),
    )


def to_html(title: str, lead: list[Block], sections: list[Section]) -> str:
    """One page that loads nothing: style and script inside, and a policy that forbids everything else."""
    folder = files("hw3.report")
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    environment = _environment(visible)
    return environment.get_template("page.html").render(
        title=title,
        lead=lead,
        sections=sections,
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def to_markdown(title: str, lead: list[Block], sections: list[Section]) -> str:
    """The same as GitHub-flavoured Markdown."""
    # Escaped by `markdown`, before Jinja's own escaping, which knows HTML alone and leaves `Markup` as it is.
    environment = _environment(markdown)
    # Lines of code keep their distance when empty lines between blocks are taken out; no text holds a NUL.
    environment.filters |= {"fence": lambda text: fence(text).replace("\n", "\0"), "link": link, "shown": _shown}
    text = environment.get_template("page.md").render(title=title, lead=lead, sections=sections)
    return re.sub(r"\n{3,}", "\n\n", text).replace("\0", "\n").strip() + "\n"


def markdown(text: str) -> Markup:
    """Text that Markdown shows as it stands, on one line."""
    escaped = _MARKDOWN.sub(r"\\\1", visible(text)).replace("\n", "<br>")
    return Markup(escaped)


def fence(text: str) -> Markup:
    """Text as a code block, its fence longer than any inside."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return Markup(f"{ticks}text\n{visible(text)}\n{ticks}")


def link(path: str) -> Markup:
    """A path as a link's target."""
    return Markup(f"<{re.sub(r'[<>]', lambda found: f'%{ord(found[0]):02X}', visible(path)).replace(chr(10), '%0A')}>")


def _shown(table: Any) -> list[list[str]]:
    """A table's rows with their head, without columns of pictures."""
    pictures = {at for row in table.rows for at, cell in enumerate(row) if isinstance(cell, Markup)}
    return [[cell for at, cell in enumerate(row) if at not in pictures] for row in (table.head, *table.rows)]


def _hash(text: str) -> str:
    """A source's hash, as a Content-Security-Policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
