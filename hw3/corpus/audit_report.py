"""The report of `hw3 data check`: its JSON, the warnings drawn from it, and the printed table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hw3.data.templates import TEMPLATES

SHORT_OUTPUT_CHARACTERS = 4  # the mean of row perplexities depends strongly on outputs as short as this
_MAX_S2TW_DIFFERENCE = 0.01  # share of characters; above it, another conversion has written the file
_MIN_COLUMN_WIDTH = 26  # characters; the four lengths of a long file fit
_BALANCED_SHARE = (0.4, 0.6)  # of modern to Classical among the rows of known direction


@dataclass(frozen=True)
class LengthStats:
    """Lengths of texts or token sequences; `median` and `p95` are rounded to 2 decimals."""

    min: int
    median: float
    p95: float
    max: int


@dataclass(frozen=True)
class CharacterStats:
    """Lengths in characters; None where no row has the part.

    Attributes:
        text: the text that the instruction asks to translate.
    """

    instruction: LengthStats | None
    text: LengthStats | None
    output: LengthStats | None


@dataclass(frozen=True)
class TokenStats:
    """Lengths in tokens, and tokens that a run would handle badly.

    Attributes:
        prompt, output, row: lengths; None where no row has the part.
        over_max_length: rows longer than the recipe's `max_length`.
        unknown_in_prompts, unknown_in_outputs: unknown tokens.
        special_tokens_in_text: for each special or other added token of the tokenizer, rows that contain its text.
    """

    prompt: LengthStats | None
    output: LengthStats | None
    row: LengthStats | None
    over_max_length: int
    unknown_in_prompts: int
    unknown_in_outputs: int
    special_tokens_in_text: dict[str, int]


@dataclass(frozen=True)
class DuplicateCounts:
    """Duplicates inside one file. All but `repeated_instructions` compare normalized texts.

    Attributes:
        repeated_instructions: rows whose instruction an earlier row has.
        repeated_texts: rows whose text to translate an earlier row has.
        repeated_pairs: rows whose text and output an earlier row has.
        reversed_pairs: rows whose text and output another row has as output and text.
        near_duplicates: rows whose text is a near duplicate of another row's text.
    """

    repeated_instructions: int
    repeated_texts: int
    repeated_pairs: int
    reversed_pairs: int
    near_duplicates: int


@dataclass(frozen=True)
class CopiedInputCounts:
    """Rows whose output equals the text to translate: exactly, and after normalization."""

    exact: int
    normalized: int


@dataclass(frozen=True)
class OddCharacterCounts:
    """Rows with characters that `hw3 data build` rejects, and rows per character for the 10 most frequent ones."""

    rows: int
    most_frequent: dict[str, int]


@dataclass(frozen=True)
class ScriptCounts:
    """Rows per script.

    Attributes:
        traditional, simplified: rows with characters that only this script has.
        mixed: rows with characters of both.
        undetermined: rows with neither.
        differs_from_s2tw: share of characters that OpenCC's `s2tw` would write differently; None if its text is longer
            or shorter.
    """

    traditional: int
    simplified: int
    mixed: int
    undetermined: int
    differs_from_s2tw: float | None


@dataclass(frozen=True)
class DirectionCounts:
    """Rows modern to Classical (m2c), Classical to modern (c2m) and unknown, and the distinct templates in use."""

    m2c: int
    c2m: int
    unknown: int
    templates: int


@dataclass(frozen=True)
class FileAudit:
    """The findings in one file. Counts are rows unless stated otherwise.

    Attributes:
        special_tokens_in_text: for each common special token, rows that contain its text.
        tokens: None if no recipe was given.
    """

    sha256: str
    rows: int
    without_output: int
    characters: CharacterStats
    tokens: TokenStats | None
    duplicates: DuplicateCounts
    output_equals_input: CopiedInputCounts
    short_outputs: int
    special_tokens_in_text: dict[str, int]
    odd_characters: OddCharacterCounts
    scripts: ScriptCounts
    directions: DirectionCounts


@dataclass(frozen=True)
class LeakageReport:
    """Rows of the smaller of two files that have a side in the larger file.

    Attributes:
        rows: rows of the smaller file.
        same, contained, near: leaked rows by how their closest side is a copy (`hw3.corpus.dedup.CopyKind`).
        both_sides: leaked rows whose two sides are both copies.
        ids: the first leaked rows.
    """

    smaller_file: str
    larger_file: str
    rows: int
    same: int
    contained: int
    near: int
    both_sides: int
    ids: list[str]

    @property
    def leaked(self) -> int:
        """Rows with a side in the larger file."""
        return self.same + self.contained + self.near


@dataclass(frozen=True)
class AuditReport:
    """The JSON of `hw3 data check`; `files` is by path, and `tokenizer` and `max_length` are the recipe's."""

    schema: int
    tokenizer: str | None
    max_length: int | None
    files: dict[str, FileAudit]
    leakage: list[LeakageReport]
    warnings: list[str]


def find_warnings(
    files: Mapping[str, FileAudit], leakage: Sequence[LeakageReport], max_length: int | None
) -> list[str]:
    """Return one line for each finding that can spoil a run or its score."""
    warnings = [
        f"{name}: {warning}"
        for name, audit in files.items()
        for warning in (*_row_warnings(audit, max_length), *_file_warnings(audit))
    ]
    for pair in leakage:
        if pair.leaked:
            warnings.append(
                f"leakage: {pair.leaked:,} of {pair.rows:,} rows of {pair.smaller_file} have a side that is also in "
                f"{pair.larger_file} ({pair.same:,} the same, {pair.contained:,} one contained in the other, "
                f"{pair.near:,} near duplicates; {pair.both_sides:,} with both sides): {', '.join(pair.ids)}"
                + (" ..." if pair.leaked > len(pair.ids) else "")
            )
    return warnings


def _row_warnings(audit: FileAudit, max_length: int | None) -> Iterator[str]:
    """Yield warnings of the form "n of m rows ..."."""
    for count, description in (
        (audit.without_output, "have no output: they can be predicted, but not trained on or scored"),
        (audit.duplicates.repeated_pairs, "repeat the text and output of an earlier row"),
        (audit.output_equals_input.normalized, "have an output equal to their input"),
        (
            audit.short_outputs,
            f"have outputs of at most {SHORT_OUTPUT_CHARACTERS} characters; the mean perplexity depends strongly on "
            "such rows",
        ),
        (
            sum(audit.special_tokens_in_text.values()),
            "contain the text of a special token; it is encoded as ordinary text",
        ),
        (audit.scripts.mixed, "mix simplified and traditional characters"),
        (audit.odd_characters.rows, "have odd characters, such as Latin letters, gap marks, bare radicals"),
        (audit.directions.unknown, "follow none of the homework's templates, so their direction is unknown"),
        (audit.tokens.over_max_length if audit.tokens else 0, f"have more than {max_length} tokens"),
    ):
        if count:
            yield f"{count:,} of {audit.rows:,} rows {description}"


def _file_warnings(audit: FileAudit) -> Iterator[str]:
    """Yield warnings about a file's scripts, directions and unknown tokens."""
    scripts, directions = audit.scripts, audit.directions
    if scripts.simplified and scripts.traditional:
        yield f"{scripts.simplified:,} rows are simplified and {scripts.traditional:,} traditional"
    difference = scripts.differs_from_s2tw
    if difference and difference > _MAX_S2TW_DIFFERENCE and scripts.traditional > scripts.simplified:
        yield (
            f"OpenCC (s2tw) would write {difference:.1%} of the characters differently: the file was converted by "
            "something else, such as the homework's map"
        )
    known = directions.m2c + directions.c2m
    low, high = _BALANCED_SHARE
    if known and not low <= directions.m2c / known <= high:
        yield (
            f"the directions are unbalanced: {directions.m2c:,} modern to Classical, {directions.c2m:,} Classical to "
            "modern"
        )
    if audit.tokens and audit.tokens.unknown_in_outputs:
        yield f"{audit.tokens.unknown_in_outputs:,} output tokens are unknown to the tokenizer"


def print_report(report: AuditReport) -> None:
    """Print one column per file, then the pairs of files without leakage, then the warnings."""
    paths = list(report.files)
    names = [Path(path).name for path in paths]
    headers = names if len(set(names)) == len(paths) else paths
    widths = [max(_MIN_COLUMN_WIDTH, len(header)) for header in headers]

    def print_line(label: str, cells: Sequence[str]) -> None:
        print(f"{label:<34}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))

    print_line("min / median / 95 % / max", headers)
    for label, format_cell in _table_lines(has_tokens=report.tokenizer is not None):
        print_line(label, [format_cell(audit) for audit in report.files.values()])
    for pair in report.leakage:
        if not pair.leaked:
            print(f"no row of {pair.smaller_file} has a side that is also in {pair.larger_file}")
    print(*(f"! {warning}" for warning in report.warnings), sep="\n")


def _table_lines(has_tokens: bool) -> list[tuple[str, Callable[[FileAudit], str]]]:
    """Return the label of each line, and the function that formats its cell for a file."""
    return [
        ("rows", lambda audit: f"{audit.rows:,}"),
        ("  without output", lambda audit: f"{audit.without_output:,}"),
        ("characters: instruction", lambda audit: _format_lengths(audit.characters.instruction)),
        ("characters: text", lambda audit: _format_lengths(audit.characters.text)),
        ("characters: output", lambda audit: _format_lengths(audit.characters.output)),
        *((label, _from_tokens(format_cell)) for label, format_cell in (_TOKEN_LINES if has_tokens else [])),
        ("same instruction as another row", lambda audit: f"{audit.duplicates.repeated_instructions:,}"),
        ("same text as another row", lambda audit: f"{audit.duplicates.repeated_texts:,}"),
        ("  and the same output", lambda audit: f"{audit.duplicates.repeated_pairs:,}"),
        ("pairs in both directions", lambda audit: f"{audit.duplicates.reversed_pairs:,}"),
        ("near duplicates in the file", lambda audit: f"{audit.duplicates.near_duplicates:,}"),
        (
            "output = input, exact / normalized",
            lambda audit: f"{audit.output_equals_input.exact:,} / {audit.output_equals_input.normalized:,}",
        ),
        (f"outputs of at most {SHORT_OUTPUT_CHARACTERS} characters", lambda audit: f"{audit.short_outputs:,}"),
        ("common special tokens as text", lambda audit: f"{sum(audit.special_tokens_in_text.values()):,}"),
        ("rows with odd characters", lambda audit: f"{audit.odd_characters.rows:,}"),
        (
            "traditional / simplified / mixed",
            lambda audit: f"{audit.scripts.traditional:,} / {audit.scripts.simplified:,} / {audit.scripts.mixed:,}",
        ),
        ("characters that differ from s2tw", lambda audit: _format_share(audit.scripts.differs_from_s2tw)),
        (
            "modern to Classical / the reverse",
            lambda audit: f"{audit.directions.m2c:,} / {audit.directions.c2m:,}",
        ),
        (f"templates, of {len(TEMPLATES)}", lambda audit: f"{audit.directions.templates}"),
    ]


_TOKEN_LINES: list[tuple[str, Callable[[TokenStats], str]]] = [
    ("tokens: prompt", lambda tokens: _format_lengths(tokens.prompt)),
    ("tokens: output", lambda tokens: _format_lengths(tokens.output)),
    ("tokens: row", lambda tokens: _format_lengths(tokens.row)),
    ("  over max length", lambda tokens: f"{tokens.over_max_length:,}"),
    ("  unknown in prompts", lambda tokens: f"{tokens.unknown_in_prompts:,}"),
    ("  unknown in outputs", lambda tokens: f"{tokens.unknown_in_outputs:,}"),
    ("  special tokens as text", lambda tokens: f"{sum(tokens.special_tokens_in_text.values()):,}"),
]


def _from_tokens(format_cell: Callable[[TokenStats], str]) -> Callable[[FileAudit], str]:
    """Return a function that formats a cell from a file's token counts."""

    def format_file(audit: FileAudit) -> str:
        assert audit.tokens is not None, "with a tokenizer, the tokens of every file are counted"
        return format_cell(audit.tokens)

    return format_file


def _format_lengths(lengths: LengthStats | None) -> str:
    if lengths is None:
        return "-"
    values = (lengths.min, lengths.median, lengths.p95, lengths.max)
    return " / ".join(f"{value:,.{0 if value == int(value) else 1}f}" for value in values)


def _format_share(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
