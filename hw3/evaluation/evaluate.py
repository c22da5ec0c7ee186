"""`hw3 eval`: output-only perplexity of the base model and of every complete checkpoint.

Each row is rendered with the prompt and encoded as in training. The score of a row is the perplexity of its output
tokens and the EOS token under the model. The base model is loaded once, and adapters are swapped in it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from hw3.common.atomic_io import write_atomically
from hw3.common.disk import check_writable
from hw3.common.distributed import gather_objects, get_rank
from hw3.common.paths import shown_path
from hw3.config.recipe import Recipe, load_recipe
from hw3.data.chat_rendering import FIXED_DATE_NOTE, get_chat_template_date
from hw3.evaluation.metric_choices import find_metric_choices
from hw3.evaluation.results_table import print_metric_choices, print_ranking, print_results
from hw3.evaluation.score_tasks import encode_tasks, score_tasks
from hw3.evaluation.selection import select_checkpoint
from hw3.evaluation.tasks import EvalDataset, EvalTask, list_prompts, list_tasks, load_eval_datasets
from hw3.modeling.devices import resolve_dtype
from hw3.runs.checkpoints import Checkpoint, external_adapter
from hw3.runs.eval_rows import write_dev_rows
from hw3.runs.open_run import OpenedRun, open_run
from hw3.runs.resume import check_trained_as
from hw3.runs.run import CURVE_FILE, RESULTS_FILE, ROWS_FILE, Run

logger = logging.getLogger(__name__)


def evaluate_run(
    run: Run,
    *,
    recipe_path: Path | None = None,
    data_file: Path | None = None,
    shots: list[int],
    prompts: Sequence[str] = (),
    checkpoint: str | None = None,
    adapters: list[Path] | None = None,
    examples_source: str = "prompt",
    baseline: str | None = None,
    allow_mismatch: bool = False,
) -> int:
    """Score what has not been scored yet, print the table, write the results and the learning curve.

    Args:
        run: the run.
        recipe_path: with the checkpoint `base`, the recipe for a new run folder.
        data_file: rows to score; if None, the recipe's `data.dev` and `data.eval`.
        shots: numbers of few-shot examples.
        prompts: further prompts to score beside the recipe's: names in `recipes/prompts/`, `all`, or paths.
        checkpoint: the checkpoint to score beside the base model, `base` for none; all of them if None.
        adapters: further PEFT adapter folders to score beside the run's checkpoints.
        examples_source: `prompt` for the prompt's few-shot examples, `train` to draw them from the training file.
        baseline: name of the entry that all others are compared with, row by row; the best checkpoint if None.
        allow_mismatch: use checkpoints that were trained with another prompt, base model or quantization.

    Returns:
        0, or 1 if `checkpoint` or one of `adapters` cannot be scored.

    Raises:
        UserError: there is no such run, or data, prompts, few-shot examples or checkpoints do not fit it.
    """
    is_base_only = checkpoint == "base"
    if is_base_only and recipe_path is not None and not run.exists():
        recipe = resolve_dtype(load_recipe(recipe_path))
    else:
        recipe = run.load_recipe()
    checkpoints = [] if is_base_only else _find_checkpoints(run, recipe, checkpoint, allow_mismatch)
    other_adapters = [external_adapter(folder) for folder in adapters or []]
    named = other_adapters if checkpoint is None else [*checkpoints, *other_adapters]
    opened = open_run(run, recipe)
    datasets = load_eval_datasets(run, recipe, opened.identity, data_file)
    tasks = list_tasks(
        datasets,
        list_prompts(recipe, prompts),
        shots,
        [*checkpoints, *other_adapters],
        recipe=recipe,
        identity=opened.identity,
        examples_source=examples_source,
    )
    skipped = _score_missing_entries(run, recipe, opened, tasks)
    if get_rank() != 0:
        return 0  # a launcher stops all processes if one fails, and the first one still has to write the results
    _report(run, recipe, datasets, tasks, baseline)
    unscored = [checkpoint.name for checkpoint in named if checkpoint.sha256 in skipped]
    if unscored:
        logger.error(f"not scored, as explained above: {', '.join(unscored)}")
    return 1 if unscored else 0


def _find_checkpoints(run: Run, recipe: Recipe, name: str | None, allow_mismatch: bool) -> list[Checkpoint]:
    """Return the checkpoint with a name, or all complete checkpoints."""
    if not allow_mismatch:
        check_trained_as(run, recipe)
    if name is not None:
        checkpoint, description = select_checkpoint(run, recipe, name)
        logger.info(f"checkpoint: {description}")
        return [] if checkpoint is None else [checkpoint]
    for folder in run.incomplete_checkpoints():
        logger.warning(f"{folder}: incomplete, skipped")
    return run.complete_checkpoints()


def _score_missing_entries(run: Run, recipe: Recipe, opened: OpenedRun, tasks: Sequence[EvalTask]) -> set[str]:
    """Score the tasks without an entry; return the hashes of skipped checkpoints. Create the run folder if needed."""
    # The first process decides: another one may read result files while the first process replaces them.
    unscored = [task.entry_key for task in tasks if task.entry_key not in task.dataset.results.row_scores]
    missing = set(gather_objects(unscored)[0])
    pending = [task for task in tasks if task.entry_key in missing]
    if not pending:
        return set()
    check_writable(run.path)
    encoded_rows = encode_tasks(pending, opened)
    pending = [task for task in pending if task.encoding_key in encoded_rows]
    if not pending:
        return set()
    logger.info(f"{len(pending)} of {len(tasks)} entries to score")
    if any(task.prompt.chat_template for task in pending) and get_chat_template_date(opened.tokenizer):
        logger.info(FIXED_DATE_NOTE)
    if get_rank() == 0 and not run.exists():
        write_atomically(run.recipe_path, recipe.to_yaml())
        write_dev_rows(run, recipe)
    try:
        return score_tasks(pending, encoded_rows, recipe, opened)
    except KeyboardInterrupt:
        logger.warning("stopped: finished entries are saved; run the same command to continue")
        raise


def _report(
    run: Run, recipe: Recipe, datasets: Sequence[EvalDataset], tasks: Sequence[EvalTask], baseline: str | None
) -> None:
    """Write the results, print the tables, and draw the learning curves. Several prompts are ranked instead."""
    selecting_dataset = datasets[0]
    for dataset in datasets:
        dataset.results.write()
        keys = {task.entry_key for task in tasks if task.dataset is dataset}
        if len({task.prompt.sha256 for task in tasks}) > 1:
            print_ranking(dataset.results, keys, baseline, recipe.evaluation)
        else:
            print_results(dataset.results, baseline, recipe.evaluation)
            records = [record for _, record in run.read_prediction_records()]
            print_metric_choices(dataset.results, find_metric_choices(dataset.results, records))
        # The curve also shows the scores on the dev file, if a dev file selects the best checkpoint.
        has_changed = dataset.results.changed or selecting_dataset.results.changed
        _draw_learning_curve(run, dataset, redraw=has_changed)
        print(f"{shown_path(dataset.results.folder)}/: {RESULTS_FILE}, {ROWS_FILE}, {CURVE_FILE}")


def _draw_learning_curve(run: Run, dataset: EvalDataset, *, redraw: bool) -> None:
    curve_path = dataset.results.folder / CURVE_FILE
    if dataset.results.entries and (redraw or not curve_path.exists()):
        from hw3.evaluation.learning_curve import save_learning_curve  # importing Matplotlib takes a second

        save_learning_curve(dataset.results, run.training_losses(), curve_path)
