"""`hw3 report`: runs as one HTML page and one Markdown file, from their results files alone."""

from __future__ import annotations

from pathlib import Path

from hw3.common.atomic_io import write_atomically
from hw3.common.errors import UserError
from hw3.report.render import to_html, to_markdown
from hw3.report.run_data import read_run
from hw3.report.sections import lead, sections
from hw3.runs.run_dir import portable


def write_report(folders: list[Path], out: Path | None = None) -> int:
    """Write `report.html` and `report.md`. The same files give the same bytes.

    Args:
        folders: the runs, the main one first; it answers the homework's questions, the others are compared with it.
        out: the folder to write to; the first run's if None.

    Returns:
        0.

    Raises:
        UserError: a run is not there, is named twice, or holds a file that cannot be read.
    """
    twice = [folder for at, folder in enumerate(folders) if folder.resolve() in {f.resolve() for f in folders[:at]}]
    if twice:
        raise UserError(f"{twice[0]}: named twice")
    runs = [read_run(folder) for folder in folders]
    out = out or folders[0]
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a folder: --out DIR")
    title = "Report: " + ", ".join(run.name for run in runs)
    opening, parts = lead(runs), sections(runs, out)
    pages = {out / "report.html": to_html(title, opening, parts), out / "report.md": to_markdown(title, opening, parts)}
    for path, text in pages.items():
        write_atomically(path, text)
        print(f"{portable(path)}: {len(text.encode()) / 1024:.0f} kB")
    return 0
