"""Run the tests with the newest packages, and record the versions that were tried.

    python tools/test_latest.py               the fast tests in .venv-latest, with the newest packages
    python tools/test_latest.py --pinned      the same tests in this environment
    python tools/test_latest.py tests/data    the tests of some packages; the counts of the others are kept

`.venv-latest` gets the newest release of every package in `pyproject.toml`, whatever its upper bound there. PyTorch
stays at the version of `constraints.txt`, because other versions may come with gigabytes of CUDA. Writes
docs/versions.json, and the tables in docs/versions.md from it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections import Counter
from pathlib import Path
from typing import Any

from junit_report import read_test_cases

REPOSITORY = Path(__file__).parent.parent
RECORD = REPOSITORY / "docs/versions.json"
EXTRAS = ("dev", "tools")  # that tests use


def main() -> int:
    """Run the tests with one set of packages; return pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="*", help="folders of tests; default: all")
    parser.add_argument("--pinned", action="store_true", help="use this environment, with the pinned packages")
    parser.add_argument("--environment", type=Path, default=REPOSITORY / ".venv-latest", help="folder to create")
    parser.add_argument("--no-install", action="store_true", help="use the environment as it is")
    parser.add_argument("--processes", default="auto", help="number of test processes")
    arguments = parser.parse_args()
    os.chdir(REPOSITORY)
    # Not resolved: the python of a virtual environment is a symbolic link.
    python = Path(sys.executable) if arguments.pinned else arguments.environment.absolute() / "bin/python"
    if not arguments.pinned and not arguments.no_install:
        create_environment(arguments.environment)
    environment = describe_environment(python)
    status, counts = run_tests(python, arguments.folders, arguments.processes)
    name = "pinned" if arguments.pinned else "latest"
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    earlier = record.get(name, {})
    kept = earlier["tests"] if arguments.folders and earlier.get("packages") == environment["packages"] else {}
    record[name] = environment | {"tests": dict(sorted((kept | counts).items()))}
    RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    subprocess.run([sys.executable, "tools/fill_readme.py"], check=True)
    return status


def read_requirements(*extras: str) -> list[str]:
    """Return the names of the packages that the project and some of its extras need, without versions."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = sum((project["optional-dependencies"][extra] for extra in extras), project["dependencies"])
    return [re.split(r"[<>=!~;\[ ]", requirement)[0] for requirement in requirements]


def create_environment(folder: Path) -> None:
    """Create or update a virtual environment with the newest packages and this checkout."""
    venv.create(folder, with_pip=True, symlinks=True)
    constraints = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    torch = next(line for line in constraints if line.startswith("torch=="))
    packages = [torch if name == "torch" else name for name in read_requirements(*EXTRAS)]
    pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--upgrade", "--upgrade-strategy", "eager", *packages], check=True)
    # Without the bounds of pyproject.toml, which the newest packages may exceed.
    subprocess.run([*pip, "--no-deps", "-e", str(REPOSITORY)], check=True)


def run_tests(python: Path, folders: list[str], processes: str) -> tuple[int, dict[str, dict[str, int]]]:
    """Run the tests that are fast and need no GPU.

    Returns:
        pytest's exit status, and by package the number of tests with each outcome.
    """
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.xml")
        command = [str(python), "-m", "pytest", "-q", "-n", processes, "--dist", "loadfile"]
        command += ["-m", "not slow and not gpu", f"--junitxml={report}", *folders]
        # Tests find `hw3`, `accelerate` and `ruff` of the same environment.
        path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "GOMP_SPINCOUNT": "20000"}  # as in the Makefile
        status = subprocess.run(command, env=environment).returncode
        if not report.exists():
            raise SystemExit("pytest has written no report, so nothing is recorded")
        return status, count_outcomes(report)


def count_outcomes(report: Path) -> dict[str, dict[str, int]]:
    """Return by package the number of tests with each outcome, from a JUnit file of pytest."""
    counts: dict[str, Counter[str]] = {}
    for case, outcome in read_test_cases(report):
        # A file that cannot be imported has no class name.
        _, package, *_ = (case.get("classname") or case.get("name", "")).split(".")
        counts.setdefault(package, Counter(passed=0, failed=0, skipped=0))[outcome] += 1
    return {package: dict(outcomes) for package, outcomes in counts.items()}


def describe_environment(python: Path) -> dict[str, Any]:
    """Return the versions of Python and of the packages that the project needs in an environment, and the system."""
    code = (
        "import json, platform, sys; from importlib.metadata import version\n"
        "print(json.dumps({'python': platform.python_version(), 'system': f'{platform.system()} {platform.machine()}, "
        "CPU', 'packages': {name: version(name) for name in sys.argv[1:]}}))"
    )
    names = sorted({*read_requirements(), "huggingface_hub", "safetensors", "tokenizers"}, key=str.lower)
    completed = subprocess.run([str(python), "-c", code, *names], check=True, capture_output=True, text=True)
    described: dict[str, Any] = json.loads(completed.stdout)
    return described


if __name__ == "__main__":
    sys.exit(main())
