"""`hw3 doctor`: show what this machine has and lacks. Each library is imported by the check that needs it."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tomllib
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hw3.cli.parsing import Commands, add_command
from hw3.common.disk import format_bytes
from hw3.common.errors import first_line

OK, NOTE, PROBLEM = "ok", "note", "PROBLEM"
Finding = tuple[str, str, str]  # one of the three, what was checked, what was found and what to do about it
FOUR_BIT = "4-bit product"

REQUIRED_PYTHON = (3, 11)
LIBRARIES = ("transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "evaluate", "pydantic", "opencc")
_PYTHON = Path(sys.executable)
_PYTHON_COMMAND = shlex.quote(str(_PYTHON.relative_to(Path.cwd()) if _PYTHON.is_relative_to(Path.cwd()) else _PYTHON))
REINSTALL = f"install again: {_PYTHON_COMMAND} -m pip install -c constraints.txt -e ."
# Training the model in this repository: its peak of memory on the CPU, and its run folder with room to spare.
MIN_MEMORY_BYTES, MIN_DISK_BYTES = 1 * 2**30, 100 * 2**20
LOW_DISK_BYTES = 20 * 2**30  # an 8-billion-parameter model in 16 bits, with room to spare
TIMEOUT_SECONDS = 3


def add_doctor_command(commands: Commands) -> None:
    """Add the parser of `hw3 doctor`."""
    add_command(
        commands,
        "doctor",
        run_doctor,
        "show what this machine has and lacks: Python, packages, GPU, memory, disk, fonts, the Hugging Face hub",
    )


def run_doctor(arguments: argparse.Namespace) -> int:
    """Print one line per finding; return 1 if the model in this repository cannot be trained here, otherwise 0."""
    can_train, command = True, "make train"
    checks = (
        check_python, check_versions, check_torch, check_libraries, check_memory, check_disk, check_fonts, check_hub,
    )  # fmt: skip
    for check in checks:
        for status, subject, text in check():
            can_train &= status != PROBLEM
            if (status, subject) == (NOTE, FOUR_BIT):
                command = 'make train SET="quantization=null"'
            print(f"{status:<8} {subject:<14} {text}", flush=True)
    if not can_train:
        print("\nTraining will fail on this machine: first mend what is marked PROBLEM")
        return 1
    print(f"\nThe model in this repository can be trained on this machine: {command}")
    return 0


def check_python() -> list[Finding]:
    """Check the version of Python."""
    system = platform.system()
    version = f"{platform.python_version()} on {system} {platform.machine()}, {os.cpu_count()} CPU cores"
    if sys.version_info < REQUIRED_PYTHON:
        return [(PROBLEM, "Python", f"{version}; 3.11 or newer is needed (make: PYTHON=python3.11)")]
    if system != "Linux":
        return [(NOTE, "Python", f"{version}; hw3 has been tried on Linux only (docs/versions.md)")]
    return [(OK, "Python", version)]


def check_versions() -> list[Finding]:
    """Compare the installed packages with the bounds in `pyproject.toml`."""
    try:
        from packaging.requirements import Requirement

        requirements = [Requirement(text) for text in _read_requirements()]
    except (ImportError, OSError, ValueError, importlib.metadata.PackageNotFoundError) as error:
        return [(PROBLEM, "packages", f"{type(error).__name__}: {first_line(error)}; {REINSTALL}")]
    missing, other = [], []
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(str(requirement))
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            other.append(f"{requirement.name} {version} (tested: {requirement.specifier})")
    findings: list[Finding] = []
    if missing:
        findings.append((PROBLEM, "packages", f"missing: {', '.join(missing)}; {REINSTALL}"))
    if other:
        findings.append((NOTE, "packages", f"not the tested versions: {', '.join(other)}; {REINSTALL}"))
    return findings or [(OK, "packages", f"{len(requirements)} packages within the bounds of pyproject.toml")]


def _read_requirements() -> list[str]:
    """Return the project's requirements, of the checkout if there is one, else of the installed package."""
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    if pyproject.is_file():
        return tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]
    return importlib.metadata.requires("hw3") or []


def check_torch() -> list[Finding]:
    """Check PyTorch, the GPU and its driver, and a product in 4 bits on the GPU if there is one, or on the CPU."""
    driver = _query_driver()
    torch = _import("torch")
    if isinstance(torch, str):
        return [(PROBLEM, "PyTorch", f"{torch}; {REINSTALL}"), *([] if driver is None else [(NOTE, "GPU", driver)])]
    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    findings: list[Finding] = [(OK, "PyTorch", f"{torch.__version__}, {build}")]
    if not torch.cuda.is_available():
        if driver is None:
            apple = ", and Apple's GPU is not supported" if torch.backends.mps.is_available() else ""
            advice = f"no NVIDIA driver{apple}; small models can be trained on the CPU (make train CPU=1)"
        elif torch.version.cuda:
            advice = f"{driver}, but PyTorch cannot use it; update the driver, or install PyTorch for an older CUDA"
        else:
            advice = f"{driver}, but PyTorch was built without CUDA; install a build with CUDA (https://pytorch.org)"
        return [*findings, (NOTE, "GPU", advice), _check_4bit("cpu")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"compute capability {properties.major}.{properties.minor}"
        memory = format_bytes(properties.total_memory)
        findings.append(
            (OK, f"GPU {index}", f"{properties.name}, {memory}, {capability}, {driver or 'driver unknown'}")
        )
    findings.append(_try("GPU product", lambda: str(float(torch.ones(8, device="cuda").sum()))))
    from hw3.modeling.devices import NO_BF16_OVERRIDES, find_old_gpu

    if (old_gpu := find_old_gpu()) is not None:
        findings.append((NOTE, "GPU", old_gpu))
    elif torch.cuda.is_bf16_supported(including_emulation=False):
        findings.append((OK, "bfloat16", "supported"))
    else:
        findings.append((NOTE, "bfloat16", f'not supported by this GPU; float16 is: SET="{NO_BF16_OVERRIDES}"'))
    return [*findings, _check_4bit("cuda")]


def _query_driver() -> str | None:
    """Return the version of NVIDIA's driver and the names of the GPUs that it knows; None if there is no driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, encoding="utf-8", timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "nvidia-smi does not answer"
    lines = done.stdout.splitlines()
    return f"driver {lines[0]}" if done.returncode == 0 and lines else "nvidia-smi finds no GPU"


def _check_4bit(device: str) -> Finding:
    """Check a product in 4 bits on a device."""
    import torch

    from hw3.modeling.four_bit_product import find_4bit_problem

    problem = find_4bit_problem(torch.device(device))
    if problem is not None:
        return NOTE, FOUR_BIT, problem
    return OK, FOUR_BIT, f"works on {device}, bitsandbytes {importlib.metadata.version('bitsandbytes')}"


def _try(subject: str, function: Callable[[], str]) -> Finding:
    """Call a function; return what it returns, or a note with its error."""
    try:
        return OK, subject, function()
    except Exception as error:  # a broken library or driver raises errors of any class
        return NOTE, subject, f"{type(error).__name__}: {first_line(error)}"


def _import(name: str) -> Any:
    """Import and return a module, or return the error as text."""
    try:
        module = importlib.import_module(name)
        if name == "trl":
            module.SFTTrainer  # noqa: B018  TRL imports its parts when they are first used
        return module
    except Exception as error:  # a broken installation raises errors of any class
        return f"{name} cannot be imported: {type(error).__name__}: {first_line(error)}"


def check_libraries() -> list[Finding]:
    """Import the libraries that training needs."""
    if isinstance(_import("torch"), str):
        return [(NOTE, "libraries", "not tried, because most of them need PyTorch")]
    errors = [module for module in map(_import, LIBRARIES) if isinstance(module, str)]
    if errors:
        return [(PROBLEM, "libraries", f"{error}; {REINSTALL}") for error in errors]
    return [(OK, "libraries", f"{', '.join(LIBRARIES)} can be imported")]


def check_memory() -> list[Finding]:
    """Check the free memory, within the limit of a container; nothing is reported where Linux's files are missing."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
        limit = Path("/sys/fs/cgroup/memory.max")
        if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()) != "max":
            used = int(limit.with_name("memory.current").read_text(encoding="ascii"))
            free = min(free, int(text) - used)
    except (OSError, ValueError, StopIteration):
        return []
    if free < MIN_MEMORY_BYTES:
        return [(PROBLEM, "memory", f"{format_bytes(free)} free, {format_bytes(MIN_MEMORY_BYTES)} are needed")]
    return [(OK, "memory", f"{format_bytes(free)} free")]


def check_disk() -> list[Finding]:
    """Check that the working directory, where runs are saved, can be written and has space."""
    free = shutil.disk_usage(Path.cwd()).free
    if not os.access(Path.cwd(), os.W_OK):
        return [(PROBLEM, "disk", "the working directory cannot be written; call hw3 from another folder")]
    if free < MIN_DISK_BYTES:
        return [(PROBLEM, "disk", f"{format_bytes(free)} free, {format_bytes(MIN_DISK_BYTES)} are needed")]
    if free < LOW_DISK_BYTES:
        return [(NOTE, "disk", f"{format_bytes(free)} free; models of the Hugging Face hub take up to 16 GiB")]
    return [(OK, "disk", f"{format_bytes(free)} free")]


def check_fonts() -> list[Finding]:
    """Check that pictures can show Chinese characters."""
    try:
        from hw3.common.figures import font_families

        families = font_families()
    except Exception as error:  # a broken installation of Matplotlib raises errors of any class
        return [(PROBLEM, "fonts", f"Matplotlib: {type(error).__name__}: {first_line(error)}; {REINSTALL}")]
    if len(families) == 1:
        return [(NOTE, "fonts", "none with Chinese characters, for file names in pictures; install fonts-noto-cjk")]
    return [(OK, "fonts", families[1])]


def check_hub() -> list[Finding]:
    """Check that the Hugging Face hub can be reached, and that there is a token, which is not printed."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    host = urllib.parse.urlsplit(endpoint).hostname  # an address may contain a password
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return [(NOTE, "hub", "not asked, because HF_HUB_OFFLINE is set; only local models can be loaded")]
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=TIMEOUT_SECONDS):
            pass
    except (OSError, ValueError) as error:
        reason = first_line(getattr(error, "reason", None) or error)
        return [(NOTE, "hub", f"{host} cannot be reached ({reason}); give folders of models: make train BASE=DIR")]
    try:
        from huggingface_hub import get_token

        token = "a token is there" if get_token() else "no token, which gated models such as Gemma need: hf auth login"
    except ImportError as error:
        token = f"huggingface_hub cannot be imported: {first_line(error)}"
    return [(OK, "hub", f"{host} can be reached; {token}")]
