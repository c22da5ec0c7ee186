"""Run the tests that need a GPU, and record their outcomes with the machine and the versions.

    python tools/test_gpu.py                    all tests of tests/gpu
    python tools/test_gpu.py -k decoding        arguments are pytest's; the record is written only without any

Tests see the first GPU, or the one that `HW3_TEST_GPU` names. The tests of SmolLM2 need its folder, from `make smollm2`
or in `HW3_SMOLLM2`. Writes docs/gpu-tests.json, and the table in docs/versions.md from it. The exit status is pytest's,
and 1 if PyTorch finds no GPU.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from junit_report import read_test_cases

REPOSITORY = Path(__file__).parent.parent
RECORD = REPOSITORY / "docs/gpu-tests.json"
# These tests occupy the GPU's memory, so nothing runs beside them.
OCCUPIED_CARD_TESTS = "tests/gpu/test_occupied_card.py"
NO_TESTS_COLLECTED = 5  # exit status of pytest
# What each of several processes that run tests at the same time needs.
CORES_PER_PROCESS, GIB_PER_PROCESS = 3, 10


def main() -> int:
    """Run the tests; return the exit status."""
    os.chdir(REPOSITORY)
    os.environ.setdefault("HW3_TEST_GPU", "0")
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HW3_TEST_GPU"]  # as tests/helpers.py sets it
    machine = describe_machine()
    if "gpu" not in machine:
        print(f"PyTorch finds no GPU with HW3_TEST_GPU={os.environ['HW3_TEST_GPU']}", file=sys.stderr)
        return 1
    processes = max(1, min(machine["cpu_cores"] // CORES_PER_PROCESS, int(machine["gpu_gib"]) // GIB_PER_PROCESS))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(CORES_PER_PROCESS))
    started, statuses, tests = time.monotonic(), [], []
    with tempfile.TemporaryDirectory() as scratch:
        parallel = ["-n", str(processes), "--dist", "loadgroup", f"--ignore={OCCUPIED_CARD_TESTS}"]
        for options in ([OCCUPIED_CARD_TESTS], ["tests/gpu", *parallel]):
            report = Path(scratch, f"{len(statuses)}.xml")
            command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", f"--junitxml={report}", *options]
            statuses.append(subprocess.run([*command, *sys.argv[1:]]).returncode)
            tests += read_outcomes(report) if report.exists() else []
    # Negative if a signal has ended pytest.
    status = next((status for status in statuses if status not in (0, NO_TESTS_COLLECTED)), min(statuses))
    if len(sys.argv) > 1:
        return status
    write_record(machine, round(time.monotonic() - started), tests)
    subprocess.run([sys.executable, "tools/fill_readme.py"], check=True)
    return status


def describe_machine() -> dict[str, Any]:
    """Return the GPU, its memory in GiB, PyTorch's CUDA version and the number of CPU cores.

    The process that runs the tests creates its own CUDA context, so this one reads them in a process that ends.
    """
    code = (
        "import json, sys; sys.path.insert(0, 'benchmarks'); from benchmark_report import describe_machine\n"
        "import torch; machine = describe_machine()\n"
        "if 'gpu' in machine: machine['gpu_gib'] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)\n"
        "print(json.dumps(machine))"
    )
    import_path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": import_path}
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, env=environment)
    machine: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return machine


def read_outcomes(report: Path) -> list[dict[str, Any]]:
    """Return name, outcome and seconds of each test, from a JUnit file of pytest."""
    tests = []
    for case, outcome in read_test_cases(report):
        file = case.get("classname", "").rpartition(".")[2]
        name, seconds = f"{file}::{case.get('name')}", round(float(case.get("time", "0")), 1)
        tests.append({"test": name, "outcome": outcome, "seconds": seconds})
    return tests


def write_record(machine: dict[str, Any], seconds: int, tests: list[dict[str, Any]]) -> None:
    """Write docs/gpu-tests.json."""
    sys.path.insert(0, str(REPOSITORY))
    from hw3.common.atomic_io import write_json
    from hw3.runs.manifest import git_commit, installed_versions, python_version

    record = {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "machine": machine}
    record |= {"python": python_version(), "versions": installed_versions(), "commit": git_commit()}
    write_json(RECORD, record | {"seconds": seconds, "tests": tests})


if __name__ == "__main__":
    sys.exit(main())
