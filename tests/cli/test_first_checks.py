"""The first round of checks: all problems together, before PyTorch and the libraries built on it are imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ENVIRONMENT, REPOSITORY

# Runs `hw3`, then prints its status, the libraries that were imported, and the CPU time of the process.
MEASURED = """
import json, resource, sys
from hw3.cli import main
status = main(sys.argv[1:])
usage = resource.getrusage(resource.RUSAGE_SELF)
heavy = {"torch", "transformers", "trl", "peft", "datasets"} & sys.modules.keys()
print(json.dumps([status, sorted(heavy), usage.ru_utime + usage.ru_stime]))
"""
# On an idle machine each takes 0.2 to 0.4 s. The bound leaves room for a machine that is busy with other tests.
MAX_CPU_SECONDS = 2.0
RECIPE = "recipes/tiny/qlora.yaml"
NO_RUN = "{run}: no such run; train it first (make train, hw3 train RECIPE.yaml --run {run})"


def run_measured(arguments: list[str]) -> tuple[list[str], float]:
    """Run a command with a mistake; return the lines of its message, and its CPU seconds."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True, env=ENVIRONMENT, cwd=REPOSITORY
    )
    status, imported, cpu_seconds = json.loads(done.stdout.splitlines()[-1])
    assert (status, imported) == (2, []), done.stderr
    return done.stderr.removeprefix("hw3: ").splitlines(), cpu_seconds


@pytest.mark.parametrize(
    ("arguments", "problems"),
    [
        (
            ["train", RECIPE, "--run", "{run}", "training.lr=1", "training.seed=4294967296", "data.eval=none.json"],
            [
                "command line: training.seed: found 4294967296, expected a number less than 4294967296",
                "command line: training.lr: no such key; did you mean learning_rate?",
                "command line: data.eval: none.json: no such file",
            ],
        ),
        (["train", "recipes/tiny/none.yaml"], ["recipes/tiny/none.yaml: no such file"]),
        (
            ["train", RECIPE, "prompt=none.yaml", "speed=fast"],
            [
                "command line: prompt: none.yaml: no such file",
                'command line: speed: found "fast", expected one of auto, plain, lean',
            ],
        ),
        (
            ["check", RECIPE, "--accelerate", "none.yaml", "--run", "README.md/run"],
            [
                "README.md/run: README.md is a file, but a folder is needed; set another one with RUN= (--run)",
                "--accelerate none.yaml: no such file",
            ],
        ),
        (
            ["eval", "{run}", "--data", "none.json", "--prompt", "none.yaml", "--adapter", "{run}"],
            [
                NO_RUN,
                "none.json: no such file",
                "none.yaml: no such file",
                "{run}: not a PEFT adapter: adapter_config.json and adapter_model.safetensors missing",
            ],
        ),
        (
            ["eval", "{run}", "--recipe", RECIPE, "--base-only", "--shots", "9"],
            [
                "--shots 9: the prompt has 4 few-shot examples; choose 0 to 4, or sample them from the training file "
                "with --examples train"
            ],
        ),
        (
            ["predict", "{run}", "none.json", "lora.r=2", "--output", "hw3"],
            [
                "lora.r=2: only generation.key=value may be set here; the run's recipe fixes the rest",
                NO_RUN,
                "none.json: no such file",
                "--output hw3: is a folder; give the name of a file",
            ],
        ),
        (
            ["pack", "{run}", "--input", "none.json", "--url", "ftp://x"],
            [
                NO_RUN,
                "none.json: no such file",
                "--url ftp://x: expected an http(s) address, that of the folder with the adapter's two files",
            ],
        ),
        (
            ["export", "{run}", "--output", "hw3"],
            [
                NO_RUN,
                "hw3: already exists, and existing files are never overwritten; delete it or set OUTPUT= (--output)",
            ],
        ),
    ],
    ids=lambda value: value[0] if value[0].isalpha() else "",
)
def test_mistakes_are_reported_together_without_the_libraries(
    tmp_path: Path, arguments: list[str], problems: list[str]
) -> None:
    run = str(tmp_path / "run")
    lines, cpu_seconds = run_measured([argument.format(run=run) for argument in arguments])
    assert lines == [problem.format(run=run) for problem in problems]
    assert cpu_seconds < MAX_CPU_SECONDS
    assert not (tmp_path / "run").exists()


def test_invalid_rows_are_reported_without_the_libraries(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text('[{"id": "1", "instruction": "a"}]', encoding="utf-8")
    lines, _ = run_measured(["train", RECIPE, f"data.train={rows}", f"data.eval={tmp_path / 'none.json'}"])
    assert lines == [
        f"command line: data.eval: {tmp_path}/none.json: no such file",
        f"{rows}: row 1 (id 1): output is missing",
    ]
