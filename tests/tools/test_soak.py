"""`tools/soak.py`: faults depend on the seed only; a stopped soak continues, and repeats the rounds that failed."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY
from soak import main
from soak_log import write_summary
from soak_process import Command, Fault, run_in_children


def test_faults_depend_on_the_seed_only() -> None:
    command = Command("train", ["train"], flip_in="run/*")
    first, again, other = (command.draw_faults(random.Random(seed), ["kill", "bit_flip"]) for seed in (5, 5, 6))
    assert first == again != other
    assert all(isinstance(fault, Fault) and 0 <= fault.moment < 1 for fault in first + other)


def test_no_bit_is_flipped_for_a_command_without_files() -> None:
    draws = [Command("export", ["export"]).draw_faults(random.Random(seed), ["kill", "bit_flip"]) for seed in range(20)]
    assert {fault.kind for faults in draws for fault in faults} == {"kill"}


def test_summary_counts_rounds_and_faults(tmp_path: Path) -> None:
    faults = [
        {"command": "train", "kind": "kill", "moment": 0.5, "outcome": "not reached"},
        {"command": "eval", "kind": "disk_full", "moment": 0.5, "outcome": "status 1"},
    ]
    passed = {"seed": 0, "round": 0, "faults": faults, "seconds": 4.0, "outcome": "passed"}
    failed = {"seed": 0, "round": 1, "faults": [], "seconds": 2.0, "outcome": "failed", "reason": "eval: lost\nmore"}
    log, summary = tmp_path / "log.jsonl", tmp_path / "summary.md"
    log.write_text("".join(json.dumps(line) + "\n" for line in (passed, failed)), encoding="utf-8")
    write_summary(log, summary)
    assert summary.read_text(encoding="utf-8") == (
        "# Soak test\n\n`python tools/soak.py` wrote this page from `log.jsonl`.\n\n"
        "- rounds: 2, of which 1 passed; seed 0; 3.0 s each\n"
        "- faults: 2, of which 1 came after the command had ended\n\n"
        "| fault | eval | train | all |\n|---|--:|--:|--:|\n| disk full | 1 | 0 | 1 |\n| kill | 0 | 1 | 1 |\n\n"
        "Round 1 failed: eval: lost\n"
    )


def test_summary_counts_a_repeated_round_as_it_ended_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Round 0 failed and then passed; round 1 failed twice."""
    failed = {"seed": 0, "faults": [{"command": "eval", "kind": "kill"}], "seconds": 2.0, "outcome": "failed"}
    lines = [
        failed | {"round": 0, "reason": "eval: lost"},
        failed | {"round": 1, "reason": "eval: found"},
        failed | {"round": 1, "reason": "eval: found again"},
        failed | {"round": 0, "outcome": "passed", "seconds": 4.0},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert main(["--rounds", "0", "--output", str(tmp_path)]) == 1
    assert "2 rounds, 1 failed" in capsys.readouterr().out
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "- rounds: 2, of which 1 passed; seed 0; 3.0 s each\n" in summary
    assert "| kill | 2 | 2 |\n" in summary
    assert summary.endswith(
        "\nRound 0 failed at first, and passed when it was repeated: eval: lost\n"
        "\nRound 1 failed: eval: found\n\nRound 1 failed: eval: found again\n"
    )


def test_run_in_children_adds_the_results_and_counts_a_child_that_fails() -> None:
    def fail() -> int:
        raise ValueError("a child that fails")

    assert run_in_children([lambda: 0, lambda: 0]) == 0
    assert run_in_children([lambda: 2, fail]) == 3


@pytest.mark.slow
def test_a_stopped_soak_continues_with_the_missing_and_the_failed_rounds(tmp_path: Path) -> None:
    line = {"seed": 3, "round": 0, "faults": [], "seconds": 1.0, "outcome": "passed"}
    failed = line | {"round": 2, "outcome": "failed", "reason": "eval: lost"}
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps(line) + "\n" + json.dumps(failed) + "\n", encoding="utf-8")
    command = [sys.executable, "tools/soak.py", "--seed", "3", "--rounds", "3", "--output", str(tmp_path)]
    completed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    lines = [json.loads(text) for text in log.read_text(encoding="utf-8").splitlines()]
    rounds = [(line["round"], line["outcome"]) for line in lines]
    assert rounds == [(0, "passed"), (2, "failed"), (1, "passed"), (2, "passed")]
    assert "rounds: 3, of which 3 passed" in (tmp_path / "summary.md").read_text(encoding="utf-8")
