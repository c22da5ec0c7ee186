"""`hw3 search`: the settings and prompts that score best."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from hw3.cli.parsing import Commands, add_command, add_overrides
from hw3.common.disk import check_writable
from hw3.common.errors import ProblemCollector
from hw3.common.gc_control import gc_paused

if TYPE_CHECKING:  # importing Optuna takes half a second
    from hw3.search.trial_recipe import TrialRecipes


def add_search_command(commands: Commands) -> None:
    """Add the parser of `hw3 search`."""
    search = add_command(
        commands,
        "search",
        run_search_command,
        "find the settings and prompts that score best; to resume a search, run the same command again",
    )
    search.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="recipe that all trials share")
    search.add_argument("space", type=Path, metavar="SPACE.yaml", help="what varies between trials, and how")
    search.add_argument("--trials", type=int, metavar="N", help="number of trials; default: the space's")
    search.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of the search; default: outputs/search-FOLDER-FILE"
    )
    search.add_argument(
        "--storage",
        metavar="FILE|URL",
        help="where Optuna stores the trials: a journal file, or the URL of a database; default: DIR/journal.log",
    )
    search.add_argument(
        "--workers", type=int, default=1, metavar="N", help="number of processes, one for each GPU; default: 1"
    )
    search.add_argument("--role", choices=["check", "worker"], help=argparse.SUPPRESS)
    add_overrides(search)


def run_search_command(arguments: argparse.Namespace) -> int:
    """Run `hw3 search`; return its exit status."""
    with gc_paused():
        recipes, folder = check_search_arguments(arguments)

        if arguments.workers > 1:
            from hw3.search.workers import run_workers

            command = _command_of_one_worker(arguments, folder)
            return run_workers(recipes, folder, arguments.storage, arguments.workers, command)

        from hw3.common.distributed import explain_runtime_errors
        from hw3.search.search import run_search
        from hw3.search.trials import TrialRunner
        from hw3.search.workers import stop_with_parent

    if arguments.role == "check":
        TrialRunner(recipes, folder)
        return 0
    if is_worker := arguments.role == "worker":
        stop_with_parent()
    with explain_runtime_errors("to use less memory, set `speed: lean` in the recipe; the same command resumes"):
        return run_search(recipes, folder, arguments.storage, is_worker=is_worker)


def check_search_arguments(arguments: argparse.Namespace) -> tuple[TrialRecipes, Path]:
    """Check the arguments of `hw3 search`; return the recipes of its trials, and its folder. PyTorch is not imported.

    Raises:
        UserError: lists all problems.
    """
    from hw3.runs.run import Run
    from hw3.search.space import load_space
    from hw3.search.trial_recipe import TrialRecipes, check_corners

    found = ProblemCollector()
    space = found.collect(load_space, arguments.space, arguments.trials)
    if arguments.workers < 1:
        found.problems.append(f"--workers {arguments.workers}: expected 1 or more")
    recipe_path: Path = arguments.recipe
    folder = arguments.output or Path("outputs") / f"search-{recipe_path.absolute().parent.name}-{recipe_path.stem}"
    found.collect(check_writable, folder, "OUTPUT= (--output)")
    if Run(folder).exists():
        found.problems.append(f"{folder}: holds a run; give a search another folder: --output DIR (make: OUTPUT=DIR)")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        found.problems.append("a search starts its own processes; use --workers N (make: GPUS=N) without a launcher")
    found.raise_problems()
    assert space is not None, "a space that cannot be loaded is a problem"
    recipes = TrialRecipes(recipe_path, space, arguments.overrides)
    check_corners(recipes)
    return recipes, folder


def _command_of_one_worker(arguments: argparse.Namespace, folder: Path) -> list[str]:
    command = ["search", str(arguments.recipe), str(arguments.space), *arguments.overrides, "--output", str(folder)]
    if arguments.trials is not None:
        command += ["--trials", str(arguments.trials)]
    if arguments.storage is not None:
        command += ["--storage", arguments.storage]
    return command
