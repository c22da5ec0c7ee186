"""`hw3 report`: write an HTML page and a Markdown file from the result files of runs."""

from __future__ import annotations

from pathlib import Path

from hw3.common.atomic_io import write_atomically
from hw3.common.errors import UserError
from hw3.common.paths import shown_path
from hw3.report.blocks import Text
from hw3.report.language import report_language, tr
from hw3.report.render import render_html, render_markdown
from hw3.report.run_data import load_run_data
from hw3.report.search_section import build_search_section, find_search
from hw3.report.sections import build_sections, build_summary
from hw3.runs.output_file import check_output_file
from hw3.runs.run import Run

HTML_PAGE, MARKDOWN_PAGE = "report.html", "report.md"


def write_report(
    runs: list[Run],
    output: Path | None = None,
    *,
    title: str | None = None,
    author: str | None = None,
    student_id: str | None = None,
    language: str = "en",
) -> int:
    """Write `report.html` and `report.md`. The same result files give the same bytes.

    Args:
        runs: the runs, the main one first. It answers the homework's questions; the others are compared with it. The
            folder of a search stands for its winner, and the search gets a section.
        output: the folder to write to; by default the first run's.
        title: the title; by default the names of the runs.
        author: who wrote the report.
        student_id: the author's student number.
        language: `en` or `zh-TW`, of all headings and sentences.

    Returns:
        0.

    Raises:
        UserError: a run does not exist, is named twice, or holds a file that cannot be read.
    """
    output = output or runs[0].path
    searches = [search for run in runs if (search := find_search(run)) is not None]
    winners = {search.folder: search.winner for search in searches}
    runs = [winners.get(run.path, run) for run in runs]
    _check_arguments(runs, output)
    names = {"--title": title, "--author": author, "--student-id": student_id}
    options = [word for option, value in names.items() if value for word in (option, value)]
    options += ["--lang", language] if language != "en" else []
    with report_language(language):
        run_data = [load_run_data(run) for run in runs]
        heading = title or tr("Report: {runs}", runs=", ".join(run.name for run in runs))
        number = tr("student number {number}", number=student_id) if student_id else None
        byline = " · ".join(filter(None, (author, number)))
        summary = [*([Text(byline)] if byline else []), *build_summary(run_data[0])]
        *sections, reproducibility = build_sections(run_data, output, options)
        sections += [*(build_search_section(search, output) for search in searches), reproducibility]
        pages = {
            output / HTML_PAGE: render_html(heading, summary, sections),
            output / MARKDOWN_PAGE: render_markdown(heading, summary, sections),
        }
    for path, text in pages.items():
        write_atomically(path, text)
        print(f"{shown_path(path)}: {len(text.encode()) / 1024:.0f} kB")
    return 0


def _check_arguments(runs: list[Run], output: Path) -> None:
    seen = set()
    for run in runs:
        run.load_recipe()  # reports a path that holds no run
        if run.path.resolve() in seen:
            raise UserError(f"{run}: the run is named twice; name each run once")
        seen.add(run.path.resolve())
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file, but a folder is needed; set one with --output DIR")
    for name in HTML_PAGE, MARKDOWN_PAGE:
        check_output_file(output / name, "--output")
