"""List what `hw3 eval` has to score: data files, and for each the base model or a checkpoint under a prompt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hw3.config.recipe import Recipe
from hw3.data.few_shot import drawn_examples, listed_examples
from hw3.data.prompt import Example, Prompt
from hw3.data.rows import Row, read_rows
from hw3.evaluation.results import RESULTS, Results
from hw3.runs.checkpoints import Checkpoint, complete_checkpoints
from hw3.runs.open_run import content_key, prompt_content
from hw3.runs.run_dir import data_facts, is_other_file, portable, read_manifest


@dataclass(frozen=True)
class Target:
    """A data file to score, and what has been scored on it."""

    path: Path
    rows: list[Row]
    results: Results


@dataclass(frozen=True, slots=True)
class Job:
    """One entry to score: the base or a checkpoint, a prompt and its worked examples, a data file."""

    key: str
    target: Target
    checkpoint: Checkpoint | None
    prompt: Prompt
    prompt_name: str
    examples: list[Example]
    example_ids: list[str] | None

    @property
    def text(self) -> tuple[Any, ...]:
        """What the encoded rows depend on; every checkpoint of a sweep shares them."""
        return self.target.path, self.prompt.sha256, tuple(self.examples)

    @property
    def folder(self) -> Path | None:
        """Of the checkpoint; None for the base."""
        return self.checkpoint and self.checkpoint.path

    @property
    def title(self) -> str:
        """For progress and messages."""
        return "base" if self.checkpoint is None else self.checkpoint.path.name


def eval_datasets(run: Path, recipe: Recipe, data: Path | None, content: dict[str, Any]) -> list[Target]:
    """The files to score. The first one chooses the best checkpoint: the dev file where the recipe has one."""
    names = [data] if data is not None else [name for name in (recipe.data.dev, recipe.data.eval) if name is not None]
    settings = {key: content[key] for key in ("dtype", "attn_implementation", "quantization", "dequantized")}
    settings |= {"base_sha256": content["base"], "tokenizer_sha256": content["tokenizer"]}
    settings |= {key: getattr(recipe.evaluation, key) for key in ("bootstrap_samples", "bootstrap_seed")}
    present = {checkpoint.name: checkpoint.sha256 for checkpoint in complete_checkpoints(run)}
    started = read_manifest(run).get("started")
    targets = []
    for path in map(Path, names):
        rows = read_rows(path)
        head = {
            "schema": 1,
            "run": portable(run),
            "started": started,
            "data": data_facts(path, rows),
            "settings": settings,
        }
        results = Results.load(_results_folder(run, path, head["data"]), head, recipe.prompt.sha256)
        results.drop_replaced(present)
        targets.append(Target(path, rows, results))
    return targets


def _results_folder(run: Path, path: Path, data: dict[str, Any]) -> Path:
    """`eval/<stem>`; with a part of the hash where that is another file's of the same name."""
    folder = run / "eval" / path.stem
    try:
        stored = json.loads((folder / RESULTS).read_text(encoding="utf-8"))["data"]
    except (OSError, ValueError, KeyError):
        return folder
    return folder.with_name(f"{folder.name}-{data['sha256'][:8]}") if is_other_file(stored, data, path) else folder


def select_examples(
    recipe: Recipe, target: Target, prompt: Prompt, shots: int, source: str
) -> tuple[list[Example], list[str] | None]:
    if source == "train" and shots:
        training = read_rows(Path(recipe.data.train))
        return drawn_examples(training, target.rows, shots, recipe.evaluation.examples_seed)
    return listed_examples(prompt, recipe.prompt, shots)


def entry_key(
    content: dict[str, Any], target: Target, checkpoint: Checkpoint | None, prompt: Prompt, examples: list[Example]
) -> str:
    """An entry's identity: the content of everything that its figures depend on."""
    return content_key(
        content
        | {
            "data": target.results.head["data"]["sha256"],
            "adapter": None if checkpoint is None else checkpoint.sha256,
        }
        | prompt_content(prompt, examples)
    )
