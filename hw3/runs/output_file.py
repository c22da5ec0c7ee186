"""Check the file that `--output` and similar options name, before any work is done for it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from hw3.common.atomic_io import check_replaceable
from hw3.common.disk import check_writable
from hw3.common.errors import UserError
from hw3.config.data_files import list_data_files
from hw3.config.recipe import Recipe
from hw3.runs.checkpoints import MANIFEST_FILE
from hw3.runs.run import DEV_FILE, RECIPE_FILE, TOKENIZER_DIR, Run

# What a run folder holds, apart from checkpoints and reports.
_RUN_CONTENT = frozenset({RECIPE_FILE, MANIFEST_FILE, DEV_FILE, TOKENIZER_DIR, "eval", "predictions"})


def check_output_file(path: Path, option: str, inputs: Iterable[Path] = ()) -> None:
    """Check that a command may write the file: it replaces no input, no device and nothing that belongs to a run.

    Args:
        path: the file, which need not exist. If it is a link, the file that it points to is written.
        option: the option that named it, for the message.
        inputs: files and folders that the command reads.

    Raises:
        UserError: the file must not or cannot be written.
    """
    try:
        check_writable(path, option, is_file=True)
        check_replaceable(path)
    except UserError as error:
        raise UserError(*(f"{option} {problem}" for problem in error.problems)) from None
    target = Path(os.path.realpath(path))
    for source in inputs:
        is_same = path.exists() and source.exists() and os.path.samefile(path, source)  # also a hard link
        if is_same or target.is_relative_to(source.resolve()):
            raise UserError(f"{option} {path}: is the input {source} or a file of it; give the name of another file")
    for folder in target.parents:
        # Some file systems ignore case.
        name = target.relative_to(folder).parts[0].casefold()
        if Run(folder).exists() and (name in _RUN_CONTENT or name.startswith("checkpoint-")):
            raise UserError(f"{option} {path}: belongs to the run {folder}; give a file outside of it")


def list_recipe_inputs(recipe: Recipe) -> list[Path]:
    """Return the files and folders that a command with this recipe may read: data files and a local base model."""
    base = Path(recipe.model.pretrained_model_name_or_path)
    return [*list_data_files(recipe.data).values(), *([base] if base.is_dir() else [])]
