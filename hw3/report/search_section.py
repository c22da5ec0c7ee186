"""The section on a search, if a report is made of its folder: the winner, the picture and the table of the trials."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hw3.common.errors import UserError
from hw3.common.paths import portable_path
from hw3.report.blocks import Block, Curve, Facts, Section, Table, Text
from hw3.report.formatting import format_interval, format_perplexity
from hw3.report.language import tr
from hw3.report.search_figure import draw_search_figure
from hw3.report.search_trials import format_score, format_setting, rank_trials, short_names
from hw3.report.svg import render_figure
from hw3.runs.run import Run
from hw3.runs.search_record import SEARCH_FILE, SEARCH_PICTURE, BestTrial, SearchRecord

_MAX_OPEN_TABLE_ROWS = 12


@dataclass(frozen=True)
class FinishedSearch:
    """A search that has a winner.

    Attributes:
        folder: its folder.
        record: its trials.
        best: the winner.
    """

    folder: Path
    record: SearchRecord
    best: BestTrial

    @property
    def winner(self) -> Run:
        """The winner's run."""
        return Run(self.folder / self.record.trials[self.best.number].run)


def find_search(run: Run) -> FinishedSearch | None:
    """Return the search in a folder; None if the folder holds a run or nothing.

    Raises:
        UserError: the search has no winner yet.
    """
    if run.exists() or not (run.path / SEARCH_FILE).is_file():
        return None
    record = SearchRecord.read(run.path / SEARCH_FILE)
    if record.best is None:
        raise UserError(f"{run}: the search has no winner yet; run the same `hw3 search` command to resume it")
    return FinishedSearch(run.path, record, record.best)


def build_search_section(search: FinishedSearch, output_dir: Path) -> Section:
    """Return the section.

    Args:
        search: the search.
        output_dir: the folder of the report, for links.
    """
    record, best = search.record, search.best
    final = best.final
    picture = search.folder / SEARCH_PICTURE
    description = tr("Scores, importances and settings of {count} trials", count=len(record.trials))
    figure = render_figure(draw_search_figure(record), "curve", f"{description}: {portable_path(search.folder)}")
    blocks: list[Block] = [
        Text(
            tr(
                "{count} trials of {recipe} with the sampler {sampler} and the pruner {pruner}. The pruner saved "
                "{share} of the optimizer steps. The best trial was chosen on {chosen_on}.",
                count=len(record.trials),
                recipe=record.recipe,
                sampler=record.sampler,
                pruner=record.pruner,
                share=f"{record.saved_share:.0%}",
                chosen_on=best.chosen_on,
            )
        ),
        Facts(
            [
                (tr("best trial"), f"{best.number}, {best.checkpoint}"),
                (
                    tr("mean perplexity on {file}", file=final.data_file),
                    f"{format_perplexity(final.mean_perplexity)} {format_interval(final.mean_perplexity_ci95)}",
                ),
                (tr("base model"), format_perplexity(final.base_mean_perplexity)),
            ]
        ),
        Curve(figure, figure, os.path.relpath(picture, output_dir) if picture.exists() else None),
        _trial_table(record),
    ]
    title = tr("Search: {folder}", folder=portable_path(search.folder))
    return Section("search", title, tr("The settings that were tried, and how they scored."), blocks)


def _trial_table(record: SearchRecord) -> Table:
    ranked = rank_trials(record)
    names = short_names(list(ranked[0].settings))
    rows = [
        [
            str(trial.number),
            *(format_setting(trial.settings[key]) if key in trial.settings else "" for key in names),
            trial.outcome,
            str(trial.steps),
            format_score(trial),
        ]
        for trial in ranked
    ]
    header = [tr("trial"), *names.values(), tr("outcome"), tr("steps"), tr("score")]
    return Table(
        tr("All trials, the best one first"),
        header,
        rows,
        {0},
        text_columns=len(names) + 2,
        is_collapsed=len(rows) > _MAX_OPEN_TABLE_ROWS,
    )
