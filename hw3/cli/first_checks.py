"""The first round of checks: what each command can refuse without PyTorch and the libraries built on it.

A mistake that is found here is reported within a second. The commands repeat these checks where they need the results,
and add those that need the libraries. Nothing that this module imports may import PyTorch, transformers, TRL, PEFT or
datasets.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from hw3.common.disk import check_writable
from hw3.common.errors import ProblemCollector, UserError
from hw3.config.recipe import Recipe, check_generation_overrides, list_prompt_files, load_prompt, load_recipe
from hw3.config.yaml_loader import read_yaml
from hw3.data.few_shot import check_shots, prompt_examples
from hw3.data.rows import read_rows
from hw3.evaluation.selection import select_checkpoint, select_scored_checkpoint
from hw3.export.gguf import GgufOptions, check_gguf_arguments
from hw3.runs.checkpoints import check_adapter_folder
from hw3.runs.eval_rows import read_eval_rows
from hw3.runs.output_file import check_output_file, list_recipe_inputs
from hw3.runs.resume import check_trained_as
from hw3.runs.run import Run
from hw3.runs.search_record import SEARCH_FILE
from hw3.runs.staging import check_output_is_new


def check_training_arguments(
    recipe_path: Path, overrides: list[str], run_dir: Path | None, *, processes: int = 1, accelerate: Path | None = None
) -> tuple[Recipe, Path]:
    """Check the arguments of `hw3 train` and `hw3 check`; return the recipe and the run folder.

    Args:
        recipe_path: the recipe's file.
        overrides: `section.key=value` assignments.
        run_dir: the run folder; None for the recipe's default.
        processes: number of processes that will share the rows of a step.
        accelerate: accelerate configuration of the launch.

    Raises:
        UserError: lists all problems.
    """
    found = ProblemCollector()
    recipe = found.collect(load_recipe, recipe_path, overrides, check_data_files=True, processes=processes)
    if recipe is not None:
        run_dir = run_dir or Path("outputs") / recipe.name
    if run_dir is not None:
        found.collect(check_writable, run_dir)
        if (run_dir / SEARCH_FILE).exists():
            found.problems.append(f"{run_dir}: holds a search; give a run another folder: --run DIR (make: RUN=DIR)")
    if accelerate is not None and not accelerate.is_file():
        found.problems.append(f"--accelerate {accelerate}: no such file")
    elif accelerate is not None:
        launch = found.collect(read_yaml, accelerate)
        launches_on_cpu = launch is not None and launch.values.get("use_cpu")
        if launches_on_cpu and recipe is not None and not recipe.training.get("use_cpu"):
            found.problems.append(
                f"--accelerate {accelerate}: its processes run on the CPU, but the recipe needs a GPU; set "
                "training.use_cpu=true and float32 (make: CPU=1)"
            )
    found.raise_problems()
    assert recipe is not None and run_dir is not None, "a recipe that cannot be loaded is a problem"
    return recipe, run_dir


def check_eval_arguments(arguments: argparse.Namespace) -> None:
    """Check the run, the recipe, and every file and folder that `hw3 eval` is to read.

    Raises:
        UserError: lists all problems.
    """
    found, run = ProblemCollector(), Run(arguments.run)
    is_base_only = arguments.checkpoint == "base"
    if arguments.recipe is not None and not is_base_only:
        found.problems.append(f"--recipe {arguments.recipe}: --recipe needs --base-only")
    is_new = is_base_only and arguments.recipe is not None and not run.exists()
    recipe = found.collect(load_recipe, arguments.recipe) if is_new else found.collect(run.load_recipe)
    if is_new:
        found.collect(check_writable, run.path)
    files = [] if arguments.data is None else [arguments.data]
    if recipe is not None and not files:
        files = run.eval_files(recipe)
    for file in files:
        if recipe is None:
            found.collect(read_rows, file)
        else:
            found.collect(read_eval_rows, run, recipe, file)
    prompt_files = [file for name in arguments.prompt for file in found.collect(list_prompt_files, name) or []]
    prompts = [found.collect(load_prompt, file) for file in prompt_files]
    if recipe is not None and arguments.examples == "prompt":
        for prompt in (recipe.prompt, *(prompt for prompt in prompts if prompt is not None)):
            for shots in arguments.shots:
                found.collect(prompt_examples, prompt, recipe.prompt, shots)
    for folder in arguments.adapter:
        found.collect(check_adapter_folder, folder)
    if recipe is not None and not is_base_only:
        if not arguments.allow_mismatch:
            found.collect(check_trained_as, run, recipe)
        if arguments.checkpoint is not None:
            found.collect(select_checkpoint, run, recipe, arguments.checkpoint)
    found.raise_problems()


def check_predict_arguments(arguments: argparse.Namespace, input_file: Path | None, overrides: list[str]) -> None:
    """Check the run, its checkpoint, the overrides and the rows of `hw3 predict`.

    Args:
        arguments: the parsed arguments.
        input_file: the file of rows; None for the recipe's `data.eval`, or for lines.
        overrides: `generation.key=value` assignments.

    Raises:
        UserError: lists all problems.
    """
    found, run = ProblemCollector(), Run(arguments.run)
    found.collect(check_generation_overrides, overrides)
    recipe = found.collect(run.load_recipe, overrides)
    if input_file is not None and str(input_file) != "-":
        found.collect(read_rows, input_file, require_output=False)
    if arguments.output is not None:
        inputs = [] if input_file is None else [input_file]
        inputs += [] if recipe is None else list_recipe_inputs(recipe)
        found.collect(check_output_file, arguments.output, "--output", inputs)
    if recipe is not None:
        found.collect(check_shots, recipe.prompt, arguments.shots)
        selected = found.collect(select_checkpoint, run, recipe, arguments.checkpoint)
        if selected is not None and selected[0] is not None and not arguments.allow_mismatch:
            found.collect(check_trained_as, run, recipe)
    found.raise_problems()


def check_pack_arguments(arguments: argparse.Namespace) -> None:
    """Check the run, its scored checkpoint, the rows, the folder to create and the address of `hw3 pack`.

    Raises:
        UserError: lists all problems.
    """
    found = _check_folder_of_checkpoint(arguments, "-pack")
    if arguments.input is not None:
        found.collect(read_rows, arguments.input, require_output=False)
    found.collect(_check_url, arguments.url)
    found.raise_problems()


def check_export_arguments(arguments: argparse.Namespace) -> GgufOptions | None:
    """Check the run, its scored checkpoint, the folder to create and llama.cpp's converter of `hw3 export`.

    Returns:
        How to write a GGUF file; None without `--format`.

    Raises:
        UserError: lists all problems.
    """
    found, run = _check_folder_of_checkpoint(arguments, "-export"), Run(arguments.run)
    options = found.collect(check_gguf_arguments, run, arguments.format, arguments.quant, arguments.llama_cpp)
    found.raise_problems()
    return options


def _check_folder_of_checkpoint(arguments: argparse.Namespace, suffix: str) -> ProblemCollector:
    """Return the problems of a command that writes a new folder, beside the run by default, from a checkpoint."""
    found, run = ProblemCollector(), Run(arguments.run)
    found.collect(select_scored_checkpoint, run, arguments.checkpoint)
    found.collect(check_output_is_new, arguments.output or run.folder_beside(suffix))
    return found


def _check_url(url: str | None) -> None:
    if url is not None and not re.fullmatch(r"https?://\S+", url):
        raise UserError(f"--url {url}: expected an http(s) address, that of the folder with the adapter's two files")
