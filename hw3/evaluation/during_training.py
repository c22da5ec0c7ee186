"""Score the checkpoints of a run in the process that trains it, by the code of `hw3 eval` and with its results."""

from __future__ import annotations

from dataclasses import dataclass

from hw3.common.distributed import gather_objects
from hw3.config.recipe import Recipe
from hw3.config.schema import BestBy
from hw3.evaluation.results import EvalResults
from hw3.evaluation.score_tasks import EncodedRows, encode_tasks, score_tasks
from hw3.evaluation.tasks import EvalDataset, EvalTask, list_prompts, list_tasks, load_eval_datasets
from hw3.modeling.adapter_slot import AdapterSlot
from hw3.runs.checkpoints import Checkpoint
from hw3.runs.open_run import OpenedRun, open_run
from hw3.runs.results_file import finetuned_entries
from hw3.runs.run import Run
from hw3.training.checkpoint_scoring import CheckpointScore, CheckpointScorer
from hw3.training.plan import PlanCache


def build_checkpoint_scorer(run: Run, cache: PlanCache | None = None) -> CheckpointScorer:
    """Return what scores a run's checkpoints while it is trained, on the data file that selects the best one.

    Args:
        run: the run. Its recipe and manifest are read when the first checkpoint is scored, as `hw3 eval` reads them.
        cache: results from other runs of this process.
    """
    return _DuringTrainingScorer(run, cache or PlanCache())


@dataclass(frozen=True)
class _OpenedData:
    """What is read once, before the first checkpoint is scored."""

    recipe: Recipe
    opened: OpenedRun
    dataset: EvalDataset
    encoded_rows: EncodedRows


class _DuringTrainingScorer:
    """Score one checkpoint under the run's own prompt, zero-shot, and write the results as `hw3 eval` does."""

    def __init__(self, run: Run, cache: PlanCache) -> None:
        self._run, self._cache = run, cache
        self._data: _OpenedData | None = None

    def __call__(self, slot: AdapterSlot, checkpoint: Checkpoint | None) -> CheckpointScore | None:
        """See `CheckpointScorer`."""
        data = self._data = self._data or self._open()
        results = data.dataset.results
        results.drop_stale({found.name: found.sha256 for found in self._run.complete_checkpoints()})
        task = _make_task(data.recipe, data.opened, data.dataset, checkpoint)
        # The first process decides, because only its results have all entries.
        if gather_objects(task.entry_key not in results.row_scores)[0]:
            score_tasks([task], data.encoded_rows, data.recipe, data.opened, slot)
        return gather_objects(_find_score(results, task, data.recipe.evaluation.best_by))[0]

    def _open(self) -> _OpenedData:
        recipe = self._run.load_recipe()
        manifest = self._run.read_manifest()
        assert manifest is not None, "it is written before the first step"
        content = manifest.base.sha256, manifest.tokenizer_sha256, manifest.device
        key = ("opened run", recipe.model, recipe.quantization, *content)
        opened = self._cache.get(lambda: open_run(self._run, recipe), key)
        dataset, *_ = load_eval_datasets(self._run, recipe, opened.identity, None)
        encoded_rows = encode_tasks([_make_task(recipe, opened, dataset, None)], opened)
        gather_objects(None)  # no process writes results before all have read them
        return _OpenedData(recipe, opened, dataset, encoded_rows)


def _make_task(recipe: Recipe, opened: OpenedRun, dataset: EvalDataset, checkpoint: Checkpoint | None) -> EvalTask:
    *_, task = list_tasks(
        [dataset],
        list_prompts(recipe, []),
        [0],
        [] if checkpoint is None else [checkpoint],
        recipe=recipe,
        identity=opened.identity,
        examples_source="prompt",
    )
    return task


def _find_score(results: EvalResults, task: EvalTask, best_by: BestBy) -> CheckpointScore | None:
    entry = next((entry for entry in results.entries if entry.key == task.entry_key), None)
    if entry is None:
        return None
    checkpoints = finetuned_entries(results.entries, results.prompt_sha256)
    return CheckpointScore(
        step=entry.step,
        metrics={"mean_perplexity": entry.mean_perplexity, "token_perplexity": entry.token_perplexity},
        data_file=results.data.path,
        history={checkpoint.step: getattr(checkpoint, best_by) for checkpoint in checkpoints},
    )
