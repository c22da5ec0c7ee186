"""The Makefile: its variables reach `hw3` as one argument each, and mistakes are refused before anything runs."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ENVIRONMENT, REPOSITORY


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            [
                "train",
                "TRAIN=a b.json",
                'EVAL=it\'s (1) & "x"; y.json',
                "RUN=my run",
                "SET=training.max_steps=2 seed=1",
            ],
            'hw3|train|recipes/tiny/qlora.yaml|--run|my run|data.train=a b.json|data.eval=it\'s (1) & "x"; y.json'
            "|training.max_steps=2|seed=1",
        ),
        (["export", "OUTPUT=a`id`*#b\\c"], "hw3|export|outputs/tiny-qlora|--checkpoint|best|--output|a`id`*#b\\c"),
        (
            ["export", "RUN=my run", "FORMAT=gguf", "QUANT=q8_0", "LLAMA_CPP=my clone"],
            "hw3|export|my run|--checkpoint|best|--format|gguf|--quant|q8_0|--llama-cpp|my clone",
        ),
        (["eval", "RUN=my run", "EVAL=a b.json"], "hw3|eval|my run|--data|a b.json|--shots|0"),
        (
            ["eval", "PROMPTS=all my/own.yaml", "CHECKPOINT=base", "SHOTS=0 4"],
            "hw3|eval|outputs/tiny-qlora|--recipe|recipes/tiny/qlora.yaml|--checkpoint|base|--shots|0|4|--prompt|all"
            "|my/own.yaml",
        ),
        (["eval", "CHECKPOINT=my adapter"], "hw3|eval|outputs/tiny-qlora|--checkpoint|my adapter|--shots|0"),
        (
            ["shots", "SHOTS=0 2", "PROMPTS=bare"],
            "hw3|eval|outputs/tiny-qlora|--recipe|recipes/tiny/qlora.yaml|--prompt|bare|--base-only|--shots|0|2",
        ),
        (
            ["predict", "INPUT=a.json", "CHECKPOINT=base", "SHOTS=4"],
            "hw3|predict|outputs/tiny-qlora|a.json|--checkpoint|base|--shots|4",
        ),
        (["report", "OUTPUT=my report"], "hw3|report|outputs/tiny-qlora|--output|my report"),
        (
            ["predict", "RUN=my run", "INPUT=a b.json", "OUTPUT=c d.json"],
            "hw3|predict|my run|a b.json|--checkpoint|best|--output|c d.json",
        ),
        (
            ["data", "CORPUS=my corpus", "OUTPUT=my data", "EXCLUDE=a.json b.json"],
            "hw3|data|build|--corpus|my corpus|--exclude|a.json|b.json|--output|my data",
        ),
        (["search"], "hw3|search|recipes/tiny/qlora.yaml|recipes/search/tiny.yaml"),
        (
            ["search", "SPACE=my space.yaml", "TRIALS=4", "STORAGE=my.log", "WORKERS=2", "OUTPUT=a b", "SET=lora.r=8"],
            "hw3|search|recipes/tiny/qlora.yaml|my space.yaml|--trials|4|--output|a b|--storage|my.log|--workers|2"
            "|lora.r=8",
        ),
        (
            ["train", "RECIPE=recipes/smollm2/qlora.yaml"],
            "hw3|train|recipes/smollm2/qlora.yaml|--run|outputs/smollm2-qlora",
        ),
        (
            ["pack", "RUN=my run", "URL=https://example.org/?a=1&b=2"],
            "hw3|pack|my run|--checkpoint|best|--url|https://example.org/?a=1&b=2",
        ),
    ],
)
def test_make_passes_values_with_spaces_as_one_argument(words: list[str], expected: str) -> None:
    command = ["make", "-n", "--no-print-directory", "VENV=", *words]
    completed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "|".join(shlex.split(completed.stdout.replace("\\\n", " "))) == expected


def make(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["make", "--no-print-directory", *words],
        cwd=REPOSITORY, env=ENVIRONMENT | {"PATH": path} | environment, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["model=gemma"], "model: no such variable, did you mean MODEL?"),
        (["SHOT=a b"], "SHOT: no such variable, did you mean SHOTS?"),
        (["STEPS=10"], 'STEPS: no such variable, did you mean SET="training.max_steps=..."?'),
        (["max_length=9"], 'max_length: no such variable, did you mean SET="data.max_length=..."?'),
        (["lora_r=8"], 'lora_r: no such variable, did you mean SET="lora.r=..."?'),
        (["load_in_4bit=1"], 'load_in_4bit: no such variable, did you mean SET="quantization.load_in_4bit=..."?'),
        (["zzzz=1"], "zzzz: no such variable, `make help` lists them"),
        (["gemma"], "gemma: no such target; `make help` lists them"),
        (["VENV=my environment"], "VENV=my environment: make cannot handle spaces in this path; choose another one"),
    ],
)
def test_make_refuses_what_it_does_not_know(words: list[str], problem: str) -> None:
    done = make("-n", "train", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.partition("*** ")[2] == f"{problem}.  Stop.\n"


def test_make_accepts_every_variable_that_its_help_names() -> None:
    names = set(re.findall(r"\b([A-Z][A-Z_0-9]+)=", make("help").stdout))
    assert {"MODEL", "SET", "TITLE", "STUDENT_ID"} <= names
    for name in names - {"MODEL", "RECIPE", "VENV", "ACCELERATE", "GPUS"}:
        assert make("-n", "help", f"{name}=1").returncode == 0, name


def test_make_all_runs_every_stage_in_order() -> None:
    done = make("-n", "-j4", "all", "VENV=", "SET=training.max_steps=3 generation.num_beams=2", "RUN=r")
    commands = [shlex.split(line.rstrip("\\")) for line in done.stdout.splitlines() if line.startswith("hw3")]
    assert [words[1] for words in commands] == ["train", "eval", "eval", "predict", "predict", "compare", "report"]
    assert commands[0][-2:] == ["training.max_steps=3", "generation.num_beams=2"]
    assert commands[2][-6:] == ["--base-only", "--shots", "0", "1", "2", "4"]
    assert [words[3:6] for words in commands[3:5]] == [
        ["generation.num_beams=2", "--checkpoint", "best"],
        ["generation.num_beams=2", "--checkpoint", "base"],
    ]


def test_make_predict_takes_one_number_of_examples() -> None:
    done = make("-n", "predict", "VENV=", "SHOTS=0 4")
    assert done.returncode == 2
    assert "*** SHOTS=0 4: predictions are made with one number of few-shot examples." in done.stderr


def test_make_all_scores_with_several_numbers_of_examples_and_predicts_zero_shot() -> None:
    done = make("-n", "all", "VENV=", "SHOTS=0 4", "CHECKPOINT=last", "RUN=r")
    commands = [" ".join(line.rstrip("\\").split()) for line in done.stdout.splitlines() if line.startswith("hw3")]
    assert commands[1:5] == [
        "hw3 eval r --shots 0 4",
        "hw3 eval r --recipe recipes/tiny/qlora.yaml --base-only --shots 0 1 2 4",
        "hw3 predict r --checkpoint last",
        "hw3 predict r --checkpoint base < /dev/null",
    ]


@pytest.mark.parametrize("target", ["train", "eval", "shots", "predict"])
def test_make_refuses_more_gpus_than_there_are(target: str, tmp_path: Path) -> None:
    done = make(target, "VENV=", "GPUS=2", f"RUN={tmp_path / 'run'}", CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, (tmp_path / "run").exists()) == (2, False)
    assert done.stderr.startswith("GPUS=2: PyTorch finds 0 GPUs; leave GPUS out, or try several processes on the CPU")


def test_make_refuses_cpu_processes_for_a_recipe_of_a_gpu(tmp_path: Path) -> None:
    files = ["TRAIN=data/train.json", "EVAL=data/eval.json", f"RUN={tmp_path / 'run'}"]
    done = make("train", "VENV=", "MODEL=gemma", "GPUS=2", "ACCELERATE=cpu2", *files)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("hw3: --accelerate accelerate_configs/cpu2.yaml: its processes run on the CPU, but")


def test_make_installs_the_packages_of_developers_for_tests_only(tmp_path: Path) -> None:
    def installed(target: str, **environment: str) -> list[str]:
        lines = make("-n", target, f"VENV={tmp_path}/venv", **environment).stdout.splitlines()
        return [line.partition("-c constraints.txt ")[2] for line in lines if " install " in line]

    assert installed("train") == ["-e ."]
    assert installed("smollm2") == ["-e .", "-e '.[tools]'"]
    assert installed("test") == ["-e .", "-e '.[dev]'", "-e '.[tools]'"]
    (tmp_path / "uv").touch(mode=0o755)
    (with_uv,) = installed("train", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert with_uv.startswith("-e . || ") and with_uv.endswith(" -c constraints.txt -e .")
