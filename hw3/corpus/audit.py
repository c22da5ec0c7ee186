"""`hw3 data check`: describe files of rows, and warn about what would spoil a run or its score."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from opencc import OpenCC

from hw3.common.atomic_io import write_json
from hw3.common.errors import ProblemCollector, UserError
from hw3.common.hashing import file_sha256
from hw3.common.statistics import percentile
from hw3.corpus.audit_report import (
    SHORT_OUTPUT_CHARACTERS,
    AuditReport,
    CharacterStats,
    CopiedInputCounts,
    DirectionCounts,
    DuplicateCounts,
    FileAudit,
    LeakageReport,
    LengthStats,
    OddCharacterCounts,
    ScriptCounts,
    TokenStats,
    find_warnings,
    print_report,
)
from hw3.corpus.dedup import (
    CopyKind,
    LeakageIndex,
    UnionFind,
    closest_copy_kind,
    compute_band_keys,
    union_near_duplicates,
)
from hw3.corpus.filters import find_odd_characters
from hw3.corpus.normalize import detect_script, normalize_texts
from hw3.corpus.row_sides import row_sides
from hw3.data.rows import Row, read_rows
from hw3.data.templates import match_template
from hw3.runs.output_file import check_output_file

if TYPE_CHECKING:
    from hw3.config.recipe import Recipe
    from hw3.data.tokenization import Encoder


_MAX_S2TW_ROWS = 5_000  # of a larger file, evenly spaced rows are compared with OpenCC's spelling
_MAX_IDS_SHOWN = 5
_MAX_ODD_CHARACTERS_SHOWN = 10
# Special tokens of the models in this project's recipes, and of related models.
_COMMON_SPECIAL_TOKEN = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|</?s>|<(?:bos|eos|pad|unk|mask)>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>"
)


def audit_files(
    files: Sequence[Path],
    *,
    recipe_path: Path | None = None,
    report_path: Path | None = None,
    plot_path: Path | None = None,
) -> int:
    """Describe files of rows, compare them with one another, and print warnings.

    Args:
        files: JSON lists or JSON Lines of `{id, instruction, output}`. Rows without an output are described as well.
        recipe_path: a recipe whose tokenizer, prompt and `max_length` are used to count tokens.
        report_path: where to write the report as JSON.
        plot_path: where to draw lengths and directions.

    Returns:
        0.

    Raises:
        UserError: files cannot be read or have bad rows; all of them are named.
    """
    _check_outputs(files, recipe_path, report_path, plot_path)
    rows_by_path = _read_files(files)
    recipe = encoder = None
    if recipe_path is not None:
        recipe, encoder = _load_recipe_and_encoder(recipe_path)
    max_length = recipe.data.max_length if recipe else None
    audits = {str(path): audit_file(path, rows, encoder, max_length) for path, rows in rows_by_path.items()}
    named_rows = [(str(path), rows) for path, rows in rows_by_path.items()]
    leakage = [find_leakage(a, b) for a, b in combinations(named_rows, 2)]
    report = AuditReport(
        schema=1,
        tokenizer=recipe.model.pretrained_model_name_or_path if recipe else None,
        max_length=max_length,
        files=audits,
        leakage=leakage,
        warnings=find_warnings(audits, leakage, max_length),
    )
    print_report(report)
    if report_path is not None:
        write_json(report_path, asdict(report))
        print(f"{report_path}: the report as JSON")
    if plot_path is not None:
        # Importing matplotlib takes about a second.
        from hw3.corpus.audit_plot import plot_files

        plot_files([(path.name, rows, audits[str(path)]) for path, rows in rows_by_path.items()], plot_path)
        print(f"{plot_path}: lengths and directions")
    return 0


def _check_outputs(
    files: Sequence[Path], recipe_path: Path | None, report_path: Path | None, plot_path: Path | None
) -> None:
    inputs, found = [*files, *([] if recipe_path is None else [recipe_path])], ProblemCollector()
    for option, path in ("--output", report_path), ("--plot", plot_path):
        if path is not None:
            found.collect(check_output_file, path, option, inputs)
    if report_path is not None and plot_path is not None and report_path.resolve() == plot_path.resolve():
        found.problems.append(f"--output and --plot: both are {report_path}; give two files")
    found.raise_problems()


def _read_files(files: Sequence[Path]) -> dict[Path, list[Row]]:
    rows_by_path: dict[Path, list[Row]] = {}
    problems: list[str] = []
    for path in dict.fromkeys(files):
        try:
            rows_by_path[path] = read_rows(path, require_output=False)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return rows_by_path


def _load_recipe_and_encoder(path: Path) -> tuple[Recipe, Encoder]:
    # These imports take seconds and are needed for tokens only.
    from hw3.config.recipe import load_recipe
    from hw3.data.tokenization import Encoder
    from hw3.modeling.loading import load_tokenizer

    recipe = load_recipe(path)
    return recipe, Encoder(load_tokenizer(recipe.model), recipe.prompt)


def audit_file(
    path: Path, rows: Sequence[Row], encoder: Encoder | None = None, max_length: int | None = None
) -> FileAudit:
    """Return the findings in one file.

    Args:
        path: the file.
        rows: its rows.
        encoder: counts tokens if given.
        max_length: tokens that a row may have.
    """
    texts, outputs = _split_sides(rows)
    completed = [(text, output) for text, output in zip(texts, outputs, strict=True) if output is not None]
    completed_texts, completed_outputs = [text for text, _ in completed], [output for _, output in completed]
    return FileAudit(
        sha256=file_sha256(path),
        rows=len(rows),
        without_output=len(rows) - len(completed),
        characters=CharacterStats(
            instruction=summarize_lengths([len(row.instruction) for row in rows]),
            text=summarize_lengths([len(text) for text in texts]),
            output=summarize_lengths([len(row.output) for row in rows if row.output is not None]),
        ),
        tokens=_count_tokens(rows, encoder, max_length) if encoder else None,
        duplicates=_count_duplicates(rows),
        output_equals_input=CopiedInputCounts(
            exact=_count_equal(completed_texts, completed_outputs),
            normalized=_count_equal(normalize_texts(completed_texts), normalize_texts(completed_outputs)),
        ),
        short_outputs=sum(len(output) <= SHORT_OUTPUT_CHARACTERS for output in completed_outputs),
        special_tokens_in_text=_count_special_tokens(rows, _COMMON_SPECIAL_TOKEN.findall),
        odd_characters=_count_odd_characters(rows),
        scripts=_count_scripts(rows),
        directions=_count_directions(rows),
    )


def _split_sides(rows: Sequence[Row]) -> tuple[list[str], list[str | None]]:
    """Return the text that each row asks to translate, and its translation (None if the row has no output)."""
    sides = [row_sides(row) for row in rows]
    return [side[0] for side in sides], [side[1] if len(side) > 1 else None for side in sides]


def _join_sides(rows: Sequence[Row]) -> list[str]:
    """Return both sides of each row as one text."""
    return ["".join(row_sides(row)) for row in rows]


def _count_equal(texts: Sequence[str], outputs: Sequence[str]) -> int:
    return sum(text == output for text, output in zip(texts, outputs, strict=True))


def summarize_lengths(lengths: Sequence[int]) -> LengthStats | None:
    """Return minimum, median, 95th percentile and maximum, or None without lengths."""
    if not lengths:
        return None
    return LengthStats(
        min=min(lengths),
        median=round(statistics.median(lengths), 2),
        p95=round(percentile(lengths, 95), 2),
        max=max(lengths),
    )


def _count_duplicates(rows: Sequence[Row]) -> DuplicateCounts:
    original_texts, original_outputs = _split_sides(rows)
    texts = normalize_texts(original_texts)
    outputs = normalize_texts([output or "" for output in original_outputs])
    pairs = Counter(zip(texts, outputs, strict=True))
    distinct_texts = list(dict.fromkeys(texts))
    sets = UnionFind(len(distinct_texts))
    union_near_duplicates(sets, distinct_texts, compute_band_keys(distinct_texts))
    set_of_text = {text: sets.find(index) for index, text in enumerate(distinct_texts)}
    set_sizes = Counter(set_of_text.values())
    return DuplicateCounts(
        repeated_instructions=len(rows) - len({row.instruction for row in rows}),
        repeated_texts=len(texts) - len(distinct_texts),
        repeated_pairs=sum(count - 1 for (_, output), count in pairs.items() if output),
        reversed_pairs=sum((output, text) in pairs for text, output in pairs if output and text != output),
        near_duplicates=sum(set_sizes[set_of_text[text]] > 1 for text in texts),
    )


def _count_special_tokens(rows: Sequence[Row], find_tokens: Callable[[str], list[str]]) -> dict[str, int]:
    """Return the number of rows that contain each special token as text, in their instruction or output."""
    return dict(Counter(token for row in rows for token in set(find_tokens(f"{row.instruction}\n{row.output or ''}"))))


def _count_odd_characters(rows: Sequence[Row]) -> OddCharacterCounts:
    characters_by_row = [set(find_odd_characters(text.replace("\n", ""))) for text in _join_sides(rows)]
    counts = Counter(character for characters in characters_by_row for character in characters)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_MAX_ODD_CHARACTERS_SHOWN]
    return OddCharacterCounts(
        rows=sum(map(bool, characters_by_row)),
        most_frequent={f"U+{ord(character):04X}": count for character, count in ranked},
    )


def _count_scripts(rows: Sequence[Row]) -> ScriptCounts:
    counts: Counter[str] = Counter()
    for text in _join_sides(rows):
        scripts = {script for character in set(text) if (script := detect_script(character)) is not None}
        counts["mixed" if len(scripts) > 1 else next(iter(scripts), "undetermined")] += 1
    step = max(1, -(-len(rows) // _MAX_S2TW_ROWS))
    text = "\n".join(_join_sides(rows[::step]))
    converted = OpenCC("s2tw").convert(OpenCC("t2s").convert(text))
    difference = None
    if len(text) == len(converted):
        difference = round(sum(a != b for a, b in zip(text, converted, strict=True)) / max(1, len(text)), 4)
    return ScriptCounts(
        traditional=counts["traditional"],
        simplified=counts["simplified"],
        mixed=counts["mixed"],
        undetermined=counts["undetermined"],
        differs_from_s2tw=difference,
    )


def _count_directions(rows: Sequence[Row]) -> DirectionCounts:
    templates = [matched[0] for row in rows if (matched := match_template(row.instruction))]
    directions = Counter(template.direction for template in templates)
    return DirectionCounts(
        m2c=directions["m2c"],
        c2m=directions["c2m"],
        unknown=len(rows) - len(templates),
        templates=len({template.text for template in templates}),
    )


def _count_tokens(rows: Sequence[Row], encoder: Encoder, max_length: int | None) -> TokenStats:
    encoded = [encoder.encode(row) for row in rows]
    unknown_id = encoder.tokenizer.unk_token_id

    def count_unknown(ids: Sequence[int]) -> int:
        return 0 if unknown_id is None else ids.count(unknown_id)

    return TokenStats(
        prompt=summarize_lengths([len(row.prompt_ids) for row in encoded]),
        output=summarize_lengths([len(row.output_ids) for row in encoded if row.output_ids]),
        row=summarize_lengths([len(row) for row in encoded]),
        over_max_length=sum(len(row) > max_length for row in encoded) if max_length else 0,
        unknown_in_prompts=sum(count_unknown(row.prompt_ids) for row in encoded),
        unknown_in_outputs=sum(count_unknown(row.output_ids) for row in encoded),
        special_tokens_in_text=_count_special_tokens(
            rows, lambda text: [token for token in encoder.control_tokens.ids if token in text]
        ),
    )


def find_leakage(a: tuple[str, Sequence[Row]], b: tuple[str, Sequence[Row]]) -> LeakageReport:
    """Find rows of the smaller of two files with a side that the larger file has, on either side of its rows.

    Args:
        a, b: name and rows of each file.
    """
    (smaller_name, smaller), (larger_name, larger) = sorted((a, b), key=lambda file: len(file[1]))
    index = LeakageIndex(normalize_texts([side for row in larger for side in row_sides(row)]))
    texts, outputs = _split_sides(smaller)
    text_kinds, output_kinds = (
        index.find_copies(side, compute_band_keys(side))
        for side in (normalize_texts(texts), normalize_texts([output or "" for output in outputs]))
    )
    kinds = closest_copy_kind(text_kinds, output_kinds).tolist()
    return LeakageReport(
        smaller_file=smaller_name,
        larger_file=larger_name,
        rows=len(smaller),
        same=kinds.count(CopyKind.SAME),
        contained=kinds.count(CopyKind.CONTAINED),
        near=kinds.count(CopyKind.NEAR),
        both_sides=int(((text_kinds != CopyKind.NONE) & (output_kinds != CopyKind.NONE)).sum()),
        ids=[row.id for row, kind in zip(smaller, kinds, strict=True) if kind][:_MAX_IDS_SHOWN],
    )
