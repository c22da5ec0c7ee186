"""Close a search: its winner's recipe, the winner's score on the evaluation file, the record and the picture."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from hw3.common.atomic_io import write_atomically
from hw3.common.errors import RunError
from hw3.common.paths import portable_path
from hw3.common.shell_commands import hw3_command
from hw3.evaluation.evaluate import evaluate_run
from hw3.report.search_trials import rank_trials
from hw3.runs.results_file import ScoreEntry
from hw3.runs.run import Run
from hw3.runs.search_record import (
    BEST_RECIPE_FILE,
    SEARCH_PICTURE,
    BestTrial,
    FinalScore,
    SearchRecord,
    TrialRecord,
)
from hw3.search.record import write_record
from hw3.search.study import DATA_FILE, SearchStudy
from hw3.search.table import print_ranking
from hw3.search.trials import quiet_trials


def finish_search(search: SearchStudy) -> SearchRecord:
    """Choose the best trial, score it on the evaluation file, and write record, recipe and picture.

    Args:
        search: the study, all of whose trials have ended.

    Raises:
        RunError: no trial was trained to its end.
    """
    record = write_record(search)
    ranked = rank_trials(record)
    if not ranked or ranked[0].outcome != "complete":
        problems = dict.fromkeys(trial.problem for trial in record.trials if trial.problem)
        raise RunError("\n".join([f"{search.folder}: no trial was trained to its end", *map(str, problems)]))
    best = _score_best(search, ranked[0])
    record = write_record(search, best)
    run = Run(search.folder / ranked[0].run)
    comment = f"# The best of {len(record.trials)} trials: {run.name}. Train it with: hw3 train {BEST_RECIPE_FILE}\n"
    write_atomically(search.folder / BEST_RECIPE_FILE, comment + run.recipe_path.read_text(encoding="utf-8"))
    draw_search(record, search.folder / SEARCH_PICTURE)
    return record


def draw_search(record: SearchRecord, path: Path) -> None:
    """Draw a search, unless there is nothing to draw."""
    if any(trial.scores for trial in record.trials):
        from hw3.report.search_figure import save_search_figure  # importing Matplotlib takes a second

        save_search_figure(record, path)


def print_summary(search: SearchStudy, record: SearchRecord) -> None:
    """Print the ranking, the winner's score and what can be done next."""
    print_ranking(record)
    best = record.best
    assert best is not None, "the search is finished"
    final = best.final
    low, high = final.mean_perplexity_ci95
    print(
        f"best: {record.trials[best.number].run}, {best.checkpoint}, chosen on {best.chosen_on}. On {final.data_file}: "
        f"{final.mean_perplexity:.3f} [{low:.2f}, {high:.2f}], the base model {final.base_mean_perplexity:.3f}"
    )
    if best.chosen_on == final.data_file:
        print("  chosen and scored on the same rows, so the score is too good; set data.dev or data.dev_fraction")
    saved = f"the pruner saved {record.saved_share:.0%}"
    print(f"{record.steps_done} optimizer steps in {len(record.trials)} trials; {saved}")
    print(f"{search.folder}/: {BEST_RECIPE_FILE}, {SEARCH_PICTURE}, and a run folder for each trial")
    print(f"next: {hw3_command('train', search.folder / BEST_RECIPE_FILE)}")


def _score_best(search: SearchStudy, trial: TrialRecord) -> BestTrial:
    """Return the winner with its score on the evaluation file, which is computed if it is not there yet."""
    run = Run(search.folder / trial.run)
    recipe = run.load_recipe()
    eval_file, checkpoint = Path(recipe.data.eval), f"checkpoint-{trial.step}"
    with quiet_trials(), contextlib.redirect_stdout(io.StringIO()):
        evaluate_run(run, data_file=eval_file, shots=[0], checkpoint=checkpoint)
    stored = run.read_results_on(eval_file)
    assert stored is not None, "the file has just been scored"
    entries = [entry for entry in stored[1].entries if entry.prompt.sha256 == recipe.prompt.sha256 and not entry.shots]
    own = _find(entries, checkpoint)
    return BestTrial(
        number=trial.number,
        checkpoint=checkpoint,
        chosen_on=_chosen_on(search, trial) or portable_path(eval_file),
        final=FinalScore(
            data_file=portable_path(eval_file),
            mean_perplexity=own.mean_perplexity,
            mean_perplexity_ci95=own.mean_perplexity_ci95,
            base_mean_perplexity=_find(entries, None).mean_perplexity,
        ),
    )


def _find(entries: list[ScoreEntry], checkpoint: str | None) -> ScoreEntry:
    found = next((entry for entry in entries if entry.checkpoint == checkpoint), None)
    if found is None:
        raise RunError(f"{checkpoint or 'the base model'}: could not be scored; run the same command again")
    return found


def _chosen_on(search: SearchStudy, trial: TrialRecord) -> str | None:
    return search.trials()[trial.number].user_attrs.get(DATA_FILE)
