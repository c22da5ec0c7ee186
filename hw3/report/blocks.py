"""The blocks that a report consists of. Their texts are plain; each output format escapes them in its own way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from markupsafe import Markup


@dataclass(frozen=True)
class Heading:
    """A heading inside a section.

    Attributes:
        text: the heading.
        id: target of links within the page; empty if there are none.
    """

    kind: ClassVar[str] = "heading"
    text: str
    id: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph.

    Attributes:
        text: the paragraph.
        is_note: whether it is a note on the block before, in smaller print.
    """

    kind: ClassVar[str] = "text"
    text: str
    is_note: bool = False


@dataclass(frozen=True)
class Missing:
    """A part of the report that is missing, and the commands that produce it."""

    kind: ClassVar[str] = "missing"
    text: str
    commands: list[str]


@dataclass(frozen=True)
class Tiles:
    """Headline numbers, each as (number, what it measures, detail)."""

    kind: ClassVar[str] = "tiles"
    tiles: list[tuple[str, str, str]]


@dataclass(frozen=True)
class Facts:
    """Pairs of name and value."""

    kind: ClassVar[str] = "facts"
    facts: list[tuple[str, str]]


@dataclass(frozen=True)
class Code:
    """Preformatted text.

    Attributes:
        title: title above the text.
        text: the text.
        is_collapsed: whether a reader has to click on the title to see the text.
        is_chinese: whether the text is Chinese.
    """

    kind: ClassVar[str] = "code"
    title: str
    text: str
    is_collapsed: bool = False
    is_chinese: bool = False


@dataclass(frozen=True)
class Table:
    """A table. Cells with a picture are `Markup`; Markdown leaves out their column.

    Attributes:
        title: what the table shows.
        header: column names.
        rows: cells by row.
        highlighted: indices of the rows that matter most.
        text_columns: how many of the first columns are text. The other columns are numbers, aligned to the right.
        is_collapsed: whether a reader has to click on the title to see the table.
    """

    kind: ClassVar[str] = "table"
    title: str
    header: list[str]
    rows: list[list[str]]
    highlighted: set[int] = field(default_factory=set)
    text_columns: int = 1
    is_collapsed: bool = False


@dataclass(frozen=True)
class Curve:
    """The learning curve.

    Attributes:
        wide: SVG for wide screens.
        narrow: SVG for narrow screens.
        picture: path of the PNG file that Markdown shows, relative to the report; None if there is none.
    """

    kind: ClassVar[str] = "curve"
    wide: Markup
    narrow: Markup
    picture: str | None


@dataclass(frozen=True)
class SystemOutput:
    """What one system made of a row.

    Attributes:
        system: name of the system.
        perplexity: its perplexity of the reference; None if it was not scored.
        pieces: its prediction as (text, differs from the reference); None if it has no prediction.
        is_unfinished: whether the prediction was cut at its length limit.
    """

    system: str
    perplexity: float | None
    pieces: list[tuple[str, bool]] | None
    is_unfinished: bool


@dataclass(frozen=True)
class RowComparison:
    """A row with the outputs of all systems.

    Attributes:
        id: the row's id.
        direction: `m2c`, `c2m` or `other`.
        instruction: the instruction; None if the data file has changed.
        reference: the reference output; None if the data file has changed or has none.
        outputs: one output per system.
        sort_keys: what the page sorts by, in the order of `RowBrowser.orders`.
    """

    id: str
    direction: str
    instruction: str | None
    reference: str | None
    outputs: list[SystemOutput]
    sort_keys: list[float]


@dataclass(frozen=True)
class RowBrowser:
    """Rows to search and sort.

    Attributes:
        rows: all rows.
        orders: names of the orders that a reader can choose.
        sample: the rows that Markdown shows.
    """

    kind: ClassVar[str] = "row_browser"
    rows: list[RowComparison]
    orders: list[str]
    sample: list[RowComparison]


Block = Heading | Text | Missing | Tiles | Facts | Code | Table | Curve | RowBrowser


@dataclass(frozen=True)
class Section:
    """A section of the report.

    Attributes:
        id: target of links within the page.
        title: its title.
        description: what it contains.
        blocks: its blocks.
    """

    id: str
    title: str
    description: str
    blocks: list[Block]
