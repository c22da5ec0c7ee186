"""The parts that a report is put together from. Texts are plain: each output escapes them in its own way."""

from __future__ import annotations

from dataclasses import dataclass, field

from markupsafe import Markup


@dataclass(frozen=True)
class Heading:
    """A heading inside a section; links within the page go to its `id`."""

    text: str
    id: str = ""
    kind: str = "heading"


@dataclass(frozen=True)
class Text:
    """A paragraph; `aside` for what qualifies the one before."""

    text: str
    aside: bool = False
    kind: str = "text"


@dataclass(frozen=True)
class Missing:
    """What is not there, and the commands that make it."""

    text: str
    commands: list[str]
    kind: str = "missing"


@dataclass(frozen=True)
class Tiles:
    """Headline figures: (figure, what it is, its qualification)."""

    tiles: list[tuple[str, str, str]]
    kind: str = "tiles"


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    facts: list[tuple[str, str]]
    kind: str = "facts"


@dataclass(frozen=True)
class Code:
    """Text as it stands. Folded away, it is opened by its title."""

    title: str
    text: str
    folded: bool = False
    chinese: bool = False
    kind: str = "code"


@dataclass(frozen=True)
class Table:
    """A table. Cells that are pictures (`Markup`) are left out of Markdown, with their column.

    Attributes:
        title: what it shows.
        head: column names.
        rows: cells.
        strong: numbers of the rows that matter most.
        texts: how many of the first columns are text; the others are figures, set flush right.
        folded: whether it is opened by its title.
    """

    title: str
    head: list[str]
    rows: list[list[str | Markup]]
    strong: set[int] = field(default_factory=set)
    texts: int = 1
    folded: bool = False
    kind: str = "table"


@dataclass(frozen=True)
class Curve:
    """The learning curve for a wide and a narrow screen, and the picture that Markdown shows."""

    wide: Markup
    narrow: Markup
    picture: str | None
    dev: bool
    kind: str = "curve"


@dataclass(frozen=True)
class Answer:
    """One system on one row.

    Attributes:
        system: its name.
        perplexity: of the reference; None where it was not scored.
        pieces: its answer, (text, differs from the reference); None where it has not answered.
        cut: whether the answer had not ended when the room for it did.
    """

    system: str
    perplexity: float | None
    pieces: list[tuple[str, bool]] | None
    cut: bool


@dataclass(frozen=True)
class Card:
    """One row with all answers; `keys` are what the page sorts by, in the order of `Answers.orders`."""

    id: str
    direction: str
    instruction: str | None
    reference: str | None
    answers: list[Answer]
    keys: list[float]


@dataclass(frozen=True)
class Answers:
    """Rows to search and sort; `sample` are those that Markdown shows."""

    cards: list[Card]
    orders: list[str]
    sample: list[Card]
    kind: str = "answers"


Block = Heading | Text | Missing | Tiles | Facts | Code | Table | Curve | Answers


@dataclass(frozen=True)
class Section:
    """A part of the report; `question` is what it answers."""

    id: str
    title: str
    question: str
    blocks: list[Block]
