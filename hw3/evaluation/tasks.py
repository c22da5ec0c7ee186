"""List what `hw3 eval` has to score: data files, and for each the base model or a checkpoint under a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hw3.config.recipe import ALL_PROMPTS, Recipe, list_prompt_files, load_prompt
from hw3.data.few_shot import prompt_examples, sample_examples
from hw3.data.prompt import Example, Prompt
from hw3.data.rows import Row, read_rows
from hw3.evaluation.results import EvalResults
from hw3.runs.checkpoints import Checkpoint
from hw3.runs.eval_rows import read_eval_rows
from hw3.runs.identity import SCORING_VERSION, ModelIdentity, prompt_name
from hw3.runs.results_file import ScoringSettings
from hw3.runs.run import Run


@dataclass(frozen=True)
class EvalDataset:
    """A data file, and the scores on it so far."""

    path: Path
    rows: list[Row]
    results: EvalResults


@dataclass(frozen=True, slots=True)
class NamedPrompt:
    """A prompt, and its name for tables.

    Attributes:
        name: the name.
        prompt: the prompt.
        is_optional: whether it is skipped, with a notice, if the model cannot take it.
    """

    name: str
    prompt: Prompt
    is_optional: bool = False


@dataclass(frozen=True, slots=True)
class EvalTask:
    """One entry to score: the base model or a checkpoint, a prompt with few-shot examples, a data file.

    Attributes:
        entry_key: hash of everything that the scores depend on.
        dataset: the data file.
        checkpoint: None for the base model.
        prompt: the prompt.
        prompt_name: the prompt's name.
        examples: few-shot examples in the prompt.
        example_ids: ids of examples that were drawn from the training file; None for the prompt's own.
        is_optional: whether the task is skipped, with a notice, if the model cannot take its prompt.
    """

    entry_key: str
    dataset: EvalDataset
    checkpoint: Checkpoint | None
    prompt: Prompt
    prompt_name: str
    examples: list[Example]
    example_ids: list[str] | None
    is_optional: bool

    @property
    def encoding_key(self) -> tuple[Path, str, tuple[Example, ...]]:
        """What the encoded rows depend on. Tasks of different checkpoints share them."""
        return self.dataset.path, self.prompt.sha256, tuple(self.examples)

    @property
    def checkpoint_dir(self) -> Path | None:
        """The checkpoint's folder; None for the base model."""
        return None if self.checkpoint is None else self.checkpoint.path

    @property
    def title(self) -> str:
        """Name for progress bars and messages."""
        return "base" if self.checkpoint is None else self.checkpoint.path.name


def load_eval_datasets(run: Run, recipe: Recipe, identity: ModelIdentity, data_file: Path | None) -> list[EvalDataset]:
    """Read the rows to score, and the scores that exist.

    The scores on the first data file select the best checkpoint: the recipe's dev file, if it has one.

    Args:
        run: the run.
        recipe: the run's recipe.
        identity: the run's base model.
        data_file: the file to score; if None, the recipe's `data.dev` and `data.eval`.

    Raises:
        UserError: a file is missing or has bad rows.
    """
    manifest = run.read_manifest()
    present = {checkpoint.name: checkpoint.sha256 for checkpoint in run.complete_checkpoints()}
    datasets = []
    for path in run.eval_files(recipe) if data_file is None else [data_file]:
        rows, fingerprint = read_eval_rows(run, recipe, path)
        results = EvalResults.load(
            run.eval_dir(path, fingerprint),
            run_name=run.name,
            started=None if manifest is None else manifest.started,
            data=fingerprint,
            settings=scoring_settings(recipe, identity),
            prompt_sha256=recipe.prompt.sha256,
            best_by=recipe.evaluation.best_by,
        )
        results.drop_damaged()
        results.drop_stale(present)
        datasets.append(EvalDataset(path, rows, results))
    selecting_dataset = datasets[0]
    for dataset in datasets:
        dataset.results.select_on(selecting_dataset.results)
    return datasets


def scoring_settings(recipe: Recipe, identity: ModelIdentity) -> ScoringSettings:
    """Return the settings that all entries of a results file share."""
    return ScoringSettings(
        dtype=identity.dtype,
        attn_implementation=identity.attn_implementation,
        quantization=identity.quantization,
        dequantized=identity.dequantized,
        base_sha256=identity.base,
        tokenizer_sha256=identity.tokenizer,
        bootstrap_samples=recipe.evaluation.bootstrap_samples,
        bootstrap_seed=recipe.evaluation.bootstrap_seed,
        scoring_version=SCORING_VERSION,
    )


def list_prompts(recipe: Recipe, names: Sequence[str]) -> list[NamedPrompt]:
    """Return the recipe's prompt, and further ones; those that only `all` stands for are optional.

    Args:
        recipe: the run's recipe.
        names: names in `recipes/prompts/`, `all`, or paths.

    Raises:
        UserError: a prompt file is missing or wrong.
    """
    own = NamedPrompt(prompt_name(recipe.prompt), recipe.prompt)
    # Of equal prompts, the first one counts: a prompt that is named is not optional.
    named = [
        NamedPrompt(file.stem, load_prompt(file), is_optional=name == ALL_PROMPTS)
        for name in sorted(names, key=ALL_PROMPTS.__eq__)
        for file in list_prompt_files(name)
    ]
    return [own, *named]


def list_tasks(
    datasets: Sequence[EvalDataset],
    prompts: Sequence[NamedPrompt],
    shots: Sequence[int],
    checkpoints: Sequence[Checkpoint],
    *,
    recipe: Recipe,
    identity: ModelIdentity,
    examples_source: str,
) -> list[EvalTask]:
    """Return one task per data file, prompt, number of few-shot examples, and model; equal ones only once.

    Args:
        datasets: the data files.
        prompts: the prompts, the recipe's first.
        shots: numbers of few-shot examples.
        checkpoints: the checkpoints; the base model is always scored.
        recipe: the run's recipe.
        identity: the run's base model.
        examples_source: `prompt` for the prompt's few-shot examples, `train` to draw them from the training file.

    Raises:
        UserError: a prompt has fewer examples than asked for.
    """
    tasks: dict[str, EvalTask] = {}
    for dataset in datasets:
        for named, count in ((named, count) for named in prompts for count in shots):
            examples, ids = _select_examples(recipe, dataset, named.prompt, count, examples_source)
            for checkpoint in (None, *checkpoints):
                adapter_sha256 = None if checkpoint is None else checkpoint.sha256
                key = identity.key(adapter_sha256, named.prompt, examples, data=dataset.results.data.sha256)
                task = EvalTask(
                    entry_key=key,
                    dataset=dataset,
                    checkpoint=checkpoint,
                    prompt=named.prompt,
                    prompt_name=named.name,
                    examples=examples,
                    example_ids=ids,
                    is_optional=named.is_optional,
                )
                # Prompts that differ only in their examples are one task at zero shots. The recipe's name wins.
                tasks.setdefault(key, task)
    return list(tasks.values())


def group_by_checkpoint(tasks: Sequence[EvalTask]) -> Iterator[EvalTask]:
    """Yield the tasks by checkpoint, those of the base model first: an adapter wraps the base model's layers."""
    groups: dict[Path | None, list[EvalTask]] = {None: []}
    for task in tasks:
        groups.setdefault(task.checkpoint_dir, []).append(task)
    for group in groups.values():
        yield from group


def _select_examples(
    recipe: Recipe, dataset: EvalDataset, prompt: Prompt, shots: int, source: str
) -> tuple[list[Example], list[str] | None]:
    if source == "train" and shots:
        training_rows = read_rows(Path(recipe.data.train))
        return sample_examples(training_rows, dataset.rows, shots, recipe.evaluation.examples_seed)
    return prompt_examples(prompt, recipe.prompt, shots)
