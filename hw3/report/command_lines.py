"""The `hw3` commands that a report prints: how to produce what is missing, and how to reproduce a run."""

from __future__ import annotations

from pathlib import Path

from hw3.common.paths import portable_path
from hw3.common.shell_commands import hw3_command, installed_command
from hw3.config.recipe import find_prompt_file
from hw3.evaluation.results import EvalResults
from hw3.report.run_data import RunData
from hw3.runs.manifest import Manifest
from hw3.runs.results_file import ScoreEntry
from hw3.runs.run import RECIPE_FILE, Run

_SHOTS = (0, 1, 2, 4)


def eval_command(run: RunData, *, base_only: bool = False) -> str:
    """Return the command that scores a run.

    Args:
        run: the run.
        base_only: whether to score only the base model, zero-shot and few-shot.
    """
    words = ["eval", run.name]
    if base_only:
        examples = len(run.recipe.prompt.examples)
        shots = [str(number) for number in _SHOTS if number <= examples or not examples]
        words += ["--base-only", "--shots", *shots, *([] if examples else ["--examples", "train"])]
    return hw3_command(*words)


def predict_command(run: RunData, name: str) -> str:
    """Return the command that predicts the rows of `data.eval`.

    Args:
        run: the run.
        name: name of the system: `base`, `base+4`, `checkpoint-100`.
    """
    checkpoint, _, shots = name.partition("+")
    words = ["predict", run.name, run.recipe.data.eval, "--checkpoint", checkpoint]
    return hw3_command(*words, *(["--shots", shots] if shots else []))


def report_command(runs: list[RunData], output_dir: Path, options: list[str]) -> str:
    """Return the command that writes the report into a folder, with these further options."""
    words = ["report", *(run.name for run in runs)]
    if output_dir.resolve() != runs[0].path.resolve():
        words += ["--output", portable_path(output_dir)]
    return hw3_command(*words, *options)


def reproduction_commands(run: RunData) -> list[str]:
    """Return the commands that train and score a run and generate its predictions."""
    commands = [] if run.manifest is None else [_train_command(run, run.manifest)]
    dev_file = Run(run.path).dev_file(run.recipe)
    for results in run.all_results:
        is_dev = dev_file is not None and results.data.path in (portable_path(dev_file), dev_file.name)
        if results is run.results:
            commands += _eval_commands(run, results, [])
        elif not is_dev:  # the command without --data scores the dev file too
            commands += _eval_commands(run, results, ["--data", results.data.path])
    return commands + [predict_command(run, predictions.name) for predictions in run.predictions]


def _train_command(run: RunData, manifest: Manifest) -> str:
    processes = manifest.layout.processes
    train = ["train", f"{run.name}/{RECIPE_FILE}", "--run", run.name]
    if processes == 1:
        return hw3_command(*train)
    config = f"accelerate_configs/{'cpu2' if manifest.device == 'cpu' else 'ddp'}.yaml"
    launch = ["launch", "--config_file", config, "--num_processes", processes, "-m", "hw3"]
    return installed_command("accelerate", *launch, *train)


def _eval_commands(run: RunData, results: EvalResults, data_option: list[str]) -> list[str]:
    """Return the commands that score the entries of one file.

    For each prompt and each source of few-shot examples, there is one command for the checkpoints and one for the base
    model, where the first does not cover it. Prompts that need the same options share a command.
    """
    groups: dict[tuple[str, str, bool], list[ScoreEntry]] = {}
    for entry in results.entries:
        groups.setdefault((entry.prompt.sha256, entry.prompt.name, bool(entry.example_ids)), []).append(entry)
    prompts: dict[tuple[bool, tuple[str, ...]], list[str]] = {}  # by the other options
    for key in sorted(groups, key=lambda key: (key[0] != results.prompt_sha256, key[1:])):
        (sha256, name, is_sampled), entries = key, groups[key]
        is_own, found = sha256 == results.prompt_sha256, find_prompt_file(sha256)
        files = [] if is_own else [f"{name}.yaml" if found is None else found[0].as_posix()]
        examples_option = ["--examples", "train"] if is_sampled else []
        finetuned_shots = sorted({entry.shots for entry in entries if not entry.is_base})
        base_shots = sorted({entry.shots for entry in entries if entry.is_base})
        adapters = sorted({entry.checkpoint for entry in entries if entry.checkpoint and not entry.is_run_checkpoint})
        if finetuned_shots:
            adapter_option = ["--adapter", *adapters] if adapters else []
            shots_option = [] if finetuned_shots == [0] else ["--shots", *map(str, finetuned_shots)]
            options = (*examples_option, *adapter_option, *shots_option)
            prompts.setdefault((is_own, options), []).extend(files)
        if set(base_shots) - set(finetuned_shots):
            options = (*examples_option, "--base-only", "--shots", *map(str, base_shots))
            prompts.setdefault((is_own, options), []).extend(files)
    return [
        hw3_command("eval", run.name, *data_option, *(["--prompt", *files] if files else []), *options)
        for (_, options), files in prompts.items()
    ]
